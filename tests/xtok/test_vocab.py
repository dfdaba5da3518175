"""VocabBytes: built from every form, by components; refusals by name; matching and projection."""

import base64
import json
import pickle
import struct

import numpy as np
import pytest
from potstill.xtok import VocabBytes
from potstill.xtok.vocab import BYTE_FALLBACK, CONTINUATION, LOSSY, SPECIAL, UNKNOWN


def varint(n):
    out = b""
    while n > 127:
        out += bytes([n & 127 | 128])
        n >>= 7
    return out + bytes([n])


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def sentencepiece(pieces, normalizer=b""):
    """A .model file of (text, type) pieces."""
    out = b"".join(field(1, field(1, text.encode()) + field(2, -1.0) + field(3, kind)) for text, kind in pieces)
    return out + field(2, field(3, 2)) + field(3, normalizer)


PIECES = [("<unk>", 2), ("<s>", 3), ("</s>", 3), ("<0x0A>", 6), ("▁the", 1), ("é▁", 1), ("<0x0A>", 4), ("x", 5)]


def test_sentencepiece_model(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece(PIECES, field(3, 1) + field(4, 0)))
    vocab = VocabBytes.from_file(path)
    assert [vocab[n] for n in range(3, 8)] == [b"\n", b" the", "é ".encode(), b"<0x0A>", b"x"]
    assert vocab.flags.tolist() == [SPECIAL | UNKNOWN, SPECIAL, SPECIAL, BYTE_FALLBACK, 0, 0, 0, LOSSY]
    assert vocab.rules["prefix"] == "every" and vocab.roles == {"unk": 0, "bos": 1, "eos": 2} and not vocab.is_lossy
    # the defaults of the format: a dummy prefix, and extra whitespace removed
    path.write_bytes(sentencepiece(PIECES))
    assert VocabBytes.from_file(path).rules["normal"] == ["collapse_spaces"]
    path.write_bytes(sentencepiece(PIECES, field(3, 0) + field(4, 0)))
    assert VocabBytes.from_file(path).rules["prefix"] == "never"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\n\xff\xff\xff", "malformed protobuf field"),
        (field(1, field(1, b"a")), "no trainer_spec"),
        (sentencepiece([("x", 6)]), "not <0xNN>"),
        (sentencepiece(PIECES, field(5, 0)), "escape_whitespaces"),
        (sentencepiece(PIECES, field(2, b"xx")), "charsmap is damaged"),
    ],
)
def test_damaged_models_are_refused(tmp_path, content, message):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        VocabBytes.from_file(path)


def test_rank_files(tmp_path):
    ranks = {b"a": 0, b" b": 1, b"\xff\x00": 2, b"longer than twelve bytes": 3}
    path = tmp_path / "x.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    vocab = VocabBytes.from_file(path, specials={"<|end|>": 5})
    assert [vocab[n] for n in range(6)] == [*ranks, b"", b"<|end|>"]
    assert vocab.flags.tolist() == [0, 0, 0, 0, UNKNOWN | LOSSY, SPECIAL]
    assert VocabBytes.from_tokenizer(ranks)[2] == b"\xff\x00"
    path.write_bytes(b"YQ== 0\nno rank here\n")
    with pytest.raises(ValueError, match="line 2 is 'no rank here'|line 2 is \"no rank here\""):
        VocabBytes.from_file(path)

    class Encoding:
        _mergeable_ranks = ranks
        _special_tokens = {"<|end|>": 7}

    assert VocabBytes.from_tokenizer(Encoding()).flags[7] == SPECIAL


def test_tekken(tmp_path):
    words = [{"rank": n, "token_bytes": base64.b64encode(bytes([n])).decode(), "token_str": None} for n in range(256)]
    config = {"pattern": "", "num_vocab_tokens": 256, "default_vocab_size": 300, "default_num_special_tokens": 100}
    path = tmp_path / "tekken.json"
    path.write_text(json.dumps({"config": config, "vocab": words}))
    vocab = VocabBytes.from_file(path)
    assert len(vocab) == 300 and vocab[100 + 65] == b"A" and vocab[1] == b"<s>"
    assert (vocab.flags[:100] == SPECIAL).all() and not vocab.flags[100:].any()
    assert vocab.roles == {"unk": 0, "bos": 1, "eos": 2, "pad": 11}


@pytest.mark.parametrize(
    "spec, prefix",
    [
        ({"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "always"}}, "every"),
        ({"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "first"}}, "first"),
        ({"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "never"}}, "never"),
        ({"pre_tokenizer": {"type": "Metaspace", "add_prefix_space": False}}, "never"),
        ({"pre_tokenizer": {"type": "Metaspace", "add_prefix_space": True}}, "every"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "every"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}, "never"),
        (
            {
                "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]},
                "decoder": {"type": "Metaspace"},
            },
            "every",
        ),
    ],
)
def test_prefix_policies(load_json, spec, prefix):
    assert load_json({"model": {"type": "BPE", "vocab": {"a": 0}}, **spec}).rules["prefix"] == prefix


def test_kinds_by_components_and_added_tokens(load_json):
    added = [
        {"id": 3, "content": "<|end|>", "special": True},
        {"id": 4, "content": "<think>", "special": False},
        {"id": 9, "content": " x", "special": False, "lstrip": True},
    ]
    vocab = load_json({
        "model": {"type": "BPE", "vocab": {"Ġa": 0, "Ã": 1, "日": 2}},
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteLevel"}]},
        "added_tokens": added,
        "post_processor": {"type": "TemplateProcessing",
                           "single": [{"Sequence": {}}, {"SpecialToken": {"id": "<|end|>"}}],
                           "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [3], "tokens": ["<|end|>"]}}},
    })  # fmt: skip
    assert [vocab[n] for n in range(5)] == [b" a", b"\xc3", "日".encode(), b"<|end|>", b"<think>"]
    assert vocab.flags.tolist() == [0, 0, LOSSY, SPECIAL, 0] + [UNKNOWN | LOSSY] * 4 + [LOSSY]
    assert vocab.roles == {"eos": 3} and vocab.rules["kind"] == "byte_level"
    unigram = load_json({
        "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["▁a", -1.5], ["<0x0A>", -2]]},
        "pre_tokenizer": {"type": "Metaspace"},
    })  # fmt: skip
    assert unigram[1] == b" a" and unigram[2] == b"<0x0A>" and unigram.flags.tolist() == [UNKNOWN, 0, 0]
    wordpiece = load_json(
        {"model": {"type": "WordPiece", "vocab": {"a": 0, "##b": 1}, "continuing_subword_prefix": "##"}}
    )
    assert wordpiece[1] == b"b" and wordpiece.flags.tolist() == [0, CONTINUATION] and wordpiece.is_lossy


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}}}, 'a "WordLevel" model'),
        ({"model": {"type": "BPE", "vocab": {"a": 0}}, "pre_tokenizer": {"type": "Whitespace"}}, r"\[Whitespace\]"),
        (
            {
                "model": {"type": "BPE", "vocab": {"a": 0}, "end_of_word_suffix": "</w>"},
                "pre_tokenizer": {"type": "ByteLevel"},
            },
            "end_of_word_suffix",
        ),
        (
            {
                "model": {"type": "BPE", "vocab": {"a": 0}},
                "pre_tokenizer": {"type": "ByteLevel"},
                "normalizer": {"type": "Rot13"},
            },
            "Rot13",
        ),
        (
            {"model": {"type": "BPE", "vocab": {"a": 1 << 40}}, "decoder": {"type": "ByteLevel"}},
            "token id 1099511627776",
        ),
        ({"version": "1.0"}, "not a tokenizer.json: missing field `model`"),
    ],
)
def test_unknown_kinds_are_refused_by_name(load_json, spec, message):
    with pytest.raises(ValueError, match=message):
        load_json(spec)


def test_other_objects_are_refused_by_class():
    with pytest.raises(TypeError, match="builtins.int"):
        VocabBytes.from_tokenizer(3)


def test_pickle_and_cache(load_json, tmp_path):
    spec = {"model": {"type": "BPE", "vocab": {f"Ġ{n}": n for n in range(5000)}}, "decoder": {"type": "ByteLevel"}}
    first, second = load_json(spec), load_json(spec)
    assert first == second and hash(first) == hash(second)
    packed = pickle.dumps(first)
    again = pickle.loads(packed)
    assert again == first and len(packed) < 15_000
    assert again[4999] == b" 4999" and again.rules == first.rules
    assert first.with_roles(eos=3) != first and first.with_roles(eos=3).roles == {"eos": 3}


def test_matched_and_projection():
    own = VocabBytes.from_callback(7, [b"a", b"abc", b"c", b" x", b"zz", b"</s>", b"ab"].__getitem__, specials=[5])
    other = VocabBytes.from_callback(6, [b"ab", b"c", b"a", b"b", b"</s>", b" x"].__getitem__, specials=[4])
    mine, theirs = own.matched(other)
    assert dict(zip(mine.tolist(), theirs.tolist(), strict=True)) == {0: 2, 2: 1, 3: 5, 6: 0}
    back = other.matched(own)
    assert sorted(zip(*(side.tolist() for side in back), strict=True)) == sorted(
        zip(theirs.tolist(), mine.tolist(), strict=True)
    )
    row_ptr, columns, weights = own.projection(other, 2, decay=0.25)
    rows = [
        dict(zip(columns[a:b].tolist(), weights[a:b].tolist(), strict=True))
        for a, b in zip(row_ptr, row_ptr[1:], strict=False)
    ]
    assert rows == [{2: 1.0}, {0: pytest.approx(0.8), 1: pytest.approx(0.2)}, {1: 1.0}, {5: 1.0}, {}, {}, {0: 1.0}]
    assert own.projection(other, 2, decay=0.0)[2].tolist() == [1, 1, 0, 1, 1, 1]
    assert columns.dtype == np.int32 and weights.dtype == np.float32
