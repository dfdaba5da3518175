"""130 alignments: 13 texts over 10 pairs of real tokenizers, byte-level, SentencePiece, NFKC and WordPiece."""

import pytest
from potstill.xtok import Aligner


def test_bytes_of_tokens(case, case_vocab):
    for side in (case["student"], case["teacher"]):
        vocab = case_vocab(side)
        for id, expected in zip(side["ids"], side["bytes"], strict=True):
            assert expected is None or vocab[id].hex() == expected


@pytest.mark.parametrize("with_text", [False, True])
def test_chunks(case, case_vocab, with_text):
    student, teacher = case["student"], case["teacher"]
    aligner = Aligner(case_vocab(student), case_vocab(teacher))
    text = {"text": case["text"]} if with_text else {}
    found = aligner(student["ids"], teacher["ids"], **text)
    assert [list(chunk) for chunk in found.chunks(0)] == case["chunks"]
    assert found.mismatches.item() == 0 and found.row_flags.item() == 0
    swapped = Aligner(aligner.teacher, aligner.student)(teacher["ids"], student["ids"], **text)
    assert [[s0, s1, t0, t1] for t0, t1, s0, s1 in swapped.chunks(0)] == case["chunks"]
