"""Tokenizers that change text, made by the tokenizers library, over random text: its own offsets are the truth."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from potstill.xtok import Aligner, VocabBytes
from potstill.xtok.alignment import UNKNOWN

tokenizers = pytest.importorskip("tokenizers")

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?-'éß日本"
PIECES = [*"abet", "the", "ing", "ab", "12", "ss", "fi"]
PARTS = ["a", "The ", "INGab", " ", "  ", "\n", "\t", "12a", "é", "e\u0301", "É", "日本", "ß", "😊", "!?", "fi ", "-x",
         "\u3000"]  # fmt: skip
bytes_of = VocabBytes.from_callback(256, lambda n: bytes([n]))


@pytest.fixture(scope="module")
def wordpiece():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    names = ["[UNK]", *LETTERS, *("##" + c for c in LETTERS), *("##" + p for p in PIECES if len(p) > 1)]
    vocab = {name: n for n, name in enumerate(dict.fromkeys([*names, *PIECES]))}
    made = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", continuing_subword_prefix="##"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return made, Aligner(made, bytes_of), Aligner(bytes_of, made)


texts = st.lists(st.sampled_from(PARTS), max_size=25).map("".join)


@settings(max_examples=60, deadline=None)
@given(texts)
def test_word_pieces_end_where_the_library_says(wordpiece, text):
    """Each token but an unknown one is a chunk of the bytes up to its end, with what stands before it."""
    made, aligner, swapped = wordpiece
    encoded = made.encode(text, add_special_tokens=False)
    found = aligner(encoded.ids, list(text.encode()))
    assert not found.mismatches.any()
    ends = [len(text[:end].encode()) for _, end in encoded.offsets]
    ends[-1:] = [len(text.encode())] * bool(ends)  # spaces behind the last token are its own
    known = [token != "[UNK]" for token in encoded.tokens]
    plain = {chunk for chunk, flags in zip(found.chunks(0), found.flags.tolist(), strict=True) if not flags & UNKNOWN}
    starts = [0, *ends]  # spaces before a token are its own
    assert plain == {(n, n + 1, starts[n], ends[n]) for n in range(len(ends)) if known[n]}
    back = swapped(list(text.encode()), encoded.ids)
    assert [(s0, s1, t0, t1) for t0, t1, s0, s1 in back.chunks(0)] == found.chunks(0)
