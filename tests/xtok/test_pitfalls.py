"""What goes wrong in aligners of this field, by the number it is known under."""

import random

import pytest
import torch
from potstill.xtok import Aligner, VocabBytes
from potstill.xtok.alignment import INTERRUPTED, INVALID, NORMALISED, REPLACED, SPECIAL, UNKNOWN


def words_of(seed, count):
    random.seed(seed)
    letters = "abcdefghijklmnopqrstuvwxyzéß€"
    return [" " + "".join(random.choices(letters, k=random.randint(1, 9))) for _ in range(count)]


def split(token, n):
    return [token[:n], token[n:]] if 0 < n < len(token) else [token]


def by_vocab(tokens, *rows):
    ids = [tokens(row) for row in rows]
    return tokens.vocab(), ids


@pytest.mark.parametrize("how", ["inserted", "replaced", "dropped", "decoded"])
@pytest.mark.parametrize("place", [3, 300, 598])
def test_pitfall_30_one_stray_byte_makes_no_false_chunk(tokens, how, place):
    """One byte that is no UTF-8 in 600 tokens: every later boundary but its own is kept, and no chunk is false."""
    student = [word.encode() for word in words_of(1, 600)]
    teacher = [part for n, word in enumerate(student) for part in split(word, n % 4)]
    clean_vocab, (a, b) = by_vocab(tokens, student, teacher)
    clean = Aligner(clean_vocab, clean_vocab)(a, b)
    assert len(clean) == 600
    broken = list(student)
    if how == "inserted":
        broken.insert(place, b"\xe2")
    elif how == "replaced":
        broken[place] = broken[place][:-1] + b"\xff"
    elif how == "dropped":
        broken[place] = broken[place][:1]
    else:  # the student has raw bytes, the teacher what a decoder made of them
        broken.insert(place, b"\xf0\x9f\x98")
        at = sum(len(split(word, n % 4)) for n, word in enumerate(student[:place]))
        teacher = teacher[:at] + ["\ufffd".encode()] + teacher[at:]
    vocab, (a, b) = by_vocab(tokens, broken, teacher)
    found = Aligner(vocab, vocab)(a, b)
    assert found.mismatches.item() == 1 and ((found.flags & INVALID) != 0).sum() == 1
    for (s0, s1, t0, t1), flags in zip(found.chunks(0), found.flags.tolist(), strict=True):
        if not flags:
            assert b"".join(broken[s0:s1]) == b"".join(teacher[t0:t1])
            shift = len(broken) - len(student)
            # the same word of the text, not another that reads the same
            n = s0 - shift * (s0 > place)
            extra = (how == "decoded") * (s0 > place)
            assert t0 - extra == sum(len(split(word, k % 4)) for k, word in enumerate(student[:n]))
    kept = int(found.valid.sum())
    assert kept >= 599
    invalid = found.spans[(found.flags & INVALID) != 0][0]
    assert invalid[0, 0] <= place < invalid[0, 1]
    assert bool(found.flags.max() & REPLACED) == (how == "decoded")


def test_pitfall_30_damage_is_bounded(tokens):
    """Forty stray bytes over 2,000 tokens cost no more than the tokens around them."""
    student = [word.encode() for word in words_of(2, 2000)]
    random.seed(3)
    broken = list(student)
    for place in sorted(random.sample(range(2000), 40), reverse=True):
        broken.insert(place, random.choice([b"\xff", b"\x80", b"\xc3", b"\xe2\x82"]))
    vocab, (a, b) = by_vocab(tokens, broken, student)
    found = Aligner(vocab, vocab)(a, b)
    for (s0, s1, t0, t1), flags in zip(found.chunks(0), found.flags.tolist(), strict=True):
        assert flags or broken[s0:s1] == student[t0:t1]
    assert found.valid.sum() >= 2000 - 2 * 40
    assert 30 <= found.mismatches.item() <= 40  # neighbours are one place


def test_pitfall_31_partial_bytes_are_not_replacement_characters(tokens):
    student, teacher = [b"I am", b" \xf0\x9f\x98", b"\x8a", b" ok"], [b"I am", b" ", "😊".encode(), b" ok"]
    vocab, (a, b) = by_vocab(tokens, student, teacher)
    found = Aligner(vocab, vocab)(a, b)
    assert found.chunks(0) == [(0, 1, 0, 1), (1, 3, 1, 3), (3, 4, 3, 4)] and not found.flags.any()


@pytest.mark.parametrize("policy", ["first", "every"])
def test_pitfall_31_a_dummy_prefix_space_loses_nothing(tokens, policy):
    spaced = [b" Hello", b" world"]
    a, b = tokens(spaced), tokens([b"Hello", b" wor", b"ld"])
    student, teacher = tokens.vocab(prefix_space=policy), tokens.vocab()
    assert Aligner(student, teacher)(a, b).chunks(0) == [(0, 1, 0, 1), (1, 2, 1, 3)]
    assert Aligner(teacher, student)(b, a).chunks(0) == [(0, 1, 0, 1), (1, 3, 1, 2)]
    # the space is the text's own where the other side has it too
    assert Aligner(student, teacher)(a, a).chunks(0) == [(0, 1, 0, 1), (1, 2, 1, 2)]
    assert not Aligner(student, teacher)(a, a).mismatches.any()


def test_pitfall_31_prefix_spaces_after_special_tokens(tokens):
    a = tokens(["<s>", b" Hi", "</s>", b" ", b"yo", b"  x"])
    b = tokens(["<s>", b"Hi", "</s>", b"yo", b"  x"])
    every, never = tokens.vocab("every", bos="<s>", eos="</s>"), tokens.vocab(bos="<s>", eos="</s>")
    found = Aligner(every, never)(a, b)
    assert found.chunks(0) == [(0, 1, 0, 1), (1, 2, 1, 2), (2, 3, 2, 3), (3, 5, 3, 4), (5, 6, 4, 5)]
    assert found.flags.tolist() == [SPECIAL, 0, SPECIAL, 0, 0] and found.mismatches.item() == 0
    first = tokens.vocab("first", bos="<s>", eos="</s>")
    assert Aligner(first, never)(a, b).mismatches.item() == 1


def test_pitfall_31_spellings_of_one_byte_agree(load_json):
    byte_level = load_json({
        "model": {"type": "BPE", "vocab": {"Ġ": 0, "Ċ": 1, "ĉ": 2, "Ġa": 3, "Ã©": 4}},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
    })  # fmt: skip
    spaced = load_json({
        "model": {"type": "BPE", "byte_fallback": True, "vocab": {"▁": 0, "<0x0A>": 1, "<0x09>": 2, "▁a": 3, "é": 4}},
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]},
    })  # fmt: skip
    assert (
        [byte_level[n] for n in range(5)] == [spaced[n] for n in range(5)] == [b" ", b"\n", b"\t", b" a", "é".encode()]
    )
    own, other = byte_level.matched(spaced)
    assert own.tolist() == other.tolist() == [0, 1, 2, 3, 4]
    found = Aligner(byte_level, spaced)([2, 1, 0], [2, 1, 0])
    assert found.chunks(0) == [(0, 1, 0, 1), (1, 2, 1, 2), (2, 3, 2, 3)]


def test_pitfall_31_literal_look_alikes_are_text(load_json):
    """Without the component that gives it meaning, `<0x0A>` and `Ġ` are the characters they look like."""
    spaced = load_json({
        "model": {"type": "BPE", "vocab": {"<0x0A>": 0, "Ġ": 1, "##a": 2}},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"},
    })  # fmt: skip
    assert [spaced[n] for n in range(3)] == [b"<0x0A>", "Ġ".encode(), b"##a"]


def test_pitfall_31_nfkc_and_wordpiece_on_segments_of_the_original(load_json):
    letters = VocabBytes.from_callback(256, lambda n: bytes([n]))
    nfkc = load_json({
        "model": {"type": "BPE", "vocab": {"f": 0, "i": 1, "x": 2, "Ã": 3, "©": 4}},
        "normalizer": {"type": "NFKC"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
    })  # fmt: skip
    text = "ﬁxe\u0301"
    found = Aligner(nfkc, letters)([0, 1, 2, 3, 4], list(text.encode()))
    # neither ligature nor accent is cut: fi is one chunk of 3 bytes, é one of 3
    assert found.chunks(0) == [(0, 2, 0, 3), (2, 3, 3, 4), (3, 5, 4, 7)]
    assert found.flags.tolist() == [NORMALISED, 0, NORMALISED] and found.mismatches.item() == 0
    assert torch.equal(found.student_chunk, torch.tensor([0, 0, 1, 2, 2], dtype=torch.int32))
    bert = load_json({
        "model": {"type": "WordPiece", "vocab": {"he": 0, "##llo": 1, "[UNK]": 2, "é": 3, "e": 4, "[CLS]": 5,
                  "[SEP]": 6}, "unk_token": "[UNK]", "continuing_subword_prefix": "##"},
        "normalizer": {"type": "BertNormalizer", "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "added_tokens": [{"id": n, "content": c, "special": True}
                         for n, c in [(2, "[UNK]"), (5, "[CLS]"), (6, "[SEP]")]],
    })  # fmt: skip
    text = "HeLLo \t 😊! É "
    found = Aligner(bert, letters)([5, 0, 1, 2, 2, 4, 6], list(text.encode()))
    assert found.chunks(0) == [(1, 2, 0, 2), (2, 3, 2, 5), (3, 4, 5, 12), (4, 5, 12, 13), (5, 6, 13, 17)]
    assert [bool(flags & UNKNOWN) for flags in found.flags.tolist()] == [False, False, True, True, False]
    assert found.valid.tolist() == [True, True, False, False, True]
    assert found.student_chunk.tolist() == [-1, 0, 1, 2, 3, 4, -1] and found.row_flags.item() == 0


def test_pitfall_31_two_normalising_tokenizers_need_the_text(load_json):
    def bert(lowercase):
        return load_json({
            "model": {"type": "WordPiece", "vocab": {"ab": 0, "AB": 1, "##c": 2, "##C": 3},
                      "continuing_subword_prefix": "##"},
            "normalizer": {"type": "BertNormalizer", "lowercase": lowercase},
        })  # fmt: skip

    lower, cased = bert(True), bert(False)
    aligner = Aligner(lower, cased)
    with pytest.raises(ValueError, match="pass text="):
        aligner([0, 2], [1, 3])
    assert aligner([0, 2], [1, 3], text="ABC").chunks(0) == [(0, 1, 0, 1), (1, 2, 1, 2)]
    assert Aligner(lower, lower)([0, 2], [0, 2]).chunks(0) == [(0, 1, 0, 1), (1, 2, 1, 2)]
    # one text for each message of each row
    spans = [[(0, 2), (3, 5)]]
    found = aligner(
        [[0, 2, 0, 0, 2]], [[1, 3, 1, 1, 3]], student_spans=spans, teacher_spans=spans, text=[["ABC", "ABC"]]
    )
    assert found.chunks(0) == [(0, 1, 0, 1), (1, 2, 1, 2), (3, 4, 3, 4), (4, 5, 4, 5)]
    with pytest.raises(ValueError, match="row 0: text must be a list of 2 strings, one a span"):
        aligner([[0, 2, 0, 0, 2]], [[1, 3, 1, 1, 3]], student_spans=spans, teacher_spans=spans, text=["ABCABC"])
    with pytest.raises(ValueError, match="2 texts were given for 1 rows"):
        aligner([0, 2], [1, 3], text=["ABC", "ABC"])


def test_pitfall_31_no_false_boundary_inside_a_character(tokens):
    halves, other = [b"a\xc3", b"\xa9b"], [b"a", b"\xc3", b"\xa9", b"b"]
    vocab, (a, b) = by_vocab(tokens, halves, other)
    assert Aligner(vocab, vocab)(a, b).chunks(0) == [(0, 1, 0, 2), (1, 2, 2, 4)]
    assert Aligner(vocab, vocab, granularity="char")(a, b).chunks(0) == [(0, 2, 0, 4)]


def test_pitfall_31_truncated_sides_form_no_last_group(tokens):
    student, teacher = [b"ab", b"cd", b"efgh"], [b"ab", b"c", b"de"]
    vocab, (a, b) = by_vocab(tokens, student, teacher)
    found = Aligner(vocab, vocab)(a, b)
    assert found.chunks(0) == [(0, 1, 0, 1)]
    assert found.row_flags.item() == 4 and found.teacher_chunk.tolist() == [0, -1, -1]


def test_pitfall_31_bos_on_one_side_shifts_nothing(tokens):
    a, b = tokens(["<s>", b"Hi", b" you", "</s>"]), tokens([b"H", b"i", b" you", "<eos>"])
    student, teacher = tokens.vocab(bos="<s>", eos="</s>"), tokens.vocab(eos="<eos>")
    found = Aligner(student, teacher)(a, b)
    assert found.chunks(0) == [(1, 2, 0, 2), (2, 3, 2, 3), (3, 4, 3, 4)]
    assert found.flags.tolist() == [0, 0, SPECIAL] and found.valid.tolist() == [True, True, False]
    assert found.student_chunk[0] == -1
    # other names pair only when told to
    apart = Aligner(tokens.vocab(), tokens.vocab())(a, b)
    assert apart.chunks(0) == [(1, 2, 0, 2), (2, 3, 2, 3)]
    told = Aligner(tokens.vocab(), tokens.vocab(), pairs=[(a[3], b[3])])(a, b)
    assert told.chunks(0) == found.chunks(0)


def test_pitfall_31_special_tokens_are_not_merged_into_content(tokens):
    a, b = tokens([b"ab", "<|turn|>", b"cd"]), tokens([b"abcd", "<end>"])
    found = Aligner(tokens.vocab(), tokens.vocab())(a, b)
    assert found.chunks(0) == [(0, 3, 0, 1)] and found.flags.tolist() == [INTERRUPTED]
    assert found.student_chunk.tolist() == [0, -1, 0] and found.teacher_chunk.tolist() == [0, -1]
    # a special token's name as text is no special token
    c, d = tokens([b"ab", b"<|turn|>", b"cd"]), tokens([b"ab<|turn|>", b"cd"])
    found = Aligner(tokens.vocab(), tokens.vocab())(c, d)
    assert found.chunks(0) == [(0, 2, 0, 1), (2, 3, 1, 2)]


def test_pitfall_31_ids_of_another_vocabulary_are_refused(tokens):
    tokens([b"a", b"b"])
    aligner = Aligner(tokens.vocab(), tokens.vocab())
    for bad in (2, -100):
        with pytest.raises(ValueError, match=rf"row 1: teacher token 2 has id {bad}, outside the vocabulary's 0\.\.2"):
            aligner([[0], [0, 1]], [[0], [0, 1, bad]])


def test_pitfall_32_chunks_are_minimal(tokens):
    """Every place where both sides end a token ends a chunk: nothing is merged that need not be."""
    student = [b"aa", b"a", b"aaa", b"a"]
    teacher = [b"a", b"aa", b"a", b"aa", b"a"]
    vocab, (a, b) = by_vocab(tokens, student, teacher)
    assert Aligner(vocab, vocab)(a, b).chunks(0) == [(0, 2, 0, 2), (2, 3, 2, 4), (3, 4, 4, 5)]
