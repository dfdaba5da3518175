"""Vocabularies and cut texts for the alignment tests."""

import json
import lzma
from pathlib import Path

import pytest
from potstill.xtok import Aligner, VocabBytes
from potstill.xtok.alignment import INTERRUPTED, INVALID

DATA = Path(__file__).parent / "data"
CASES = json.loads(lzma.decompress((DATA / "alignment_cases.json.xz").read_bytes()))["cases"]


def tokenizer_json(side):
    """A tokenizer.json of a case's kind of tokenizer, over the tokens that occur in it."""
    vocab = dict(zip(side["tokens"], side["ids"], strict=True))
    if side["kind"] == "bytelevel":
        return {
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
            "normalizer": {"type": "NFKC"} if side["tok"] == "anthropic" else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": False}]},
        }
    if side["kind"] == "spm":
        replace = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]
        return {
            "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": True},
            "normalizer": {"type": "Prepend", "prepend": "▁"},
            "decoder": {"type": "Sequence", "decoders": [*replace, {"type": "ByteFallback"}]},
        }
    return {
        "model": {"type": "WordPiece", "vocab": vocab, "unk_token": "[UNK]", "continuing_subword_prefix": "##"},
        "normalizer": {"type": "BertNormalizer", "lowercase": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
    }


def from_json(spec, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    return VocabBytes.from_file(path)


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES, ids=[case["id"] for case in CASES])


@pytest.fixture
def case_vocab(tmp_path_factory):
    """VocabBytes of one side of a case."""
    return lambda side: from_json(tokenizer_json(side), tmp_path_factory)


@pytest.fixture
def load_json(tmp_path_factory):
    """VocabBytes of a tokenizer.json given as a dict."""
    return lambda spec: from_json(spec, tmp_path_factory)


class Tokens:
    """A vocabulary of byte strings, numbered as they are asked for; names of special tokens are str."""

    def __init__(self):
        self.ids = {}

    def __call__(self, pieces):
        return [self.ids.setdefault(piece, len(self.ids)) for piece in pieces]

    def vocab(self, prefix_space="never", **roles):
        tokens = list(self.ids)
        named = [self.ids[name] for name in tokens if isinstance(name, str)]
        raw = [token.encode() if isinstance(token, str) else token for token in tokens]
        made = VocabBytes.from_callback(len(raw), raw.__getitem__, specials=named, prefix_space=prefix_space)
        return made.with_roles(**{role: self.ids[name] for role, name in roles.items() if name in self.ids})


@pytest.fixture
def tokens():
    """An empty vocabulary to be filled."""
    return Tokens()


@pytest.fixture(scope="module")
def alignment():
    """Two rows: special tokens inside and between chunks, bytes that differ, an open end."""
    student = [b"ab", b"c", "</s>", b"de", b"fg", b"h", b"XX", b"i", b"jk", b"l"]
    teacher = [b"a", b"b", b"cd", b"e", b"f", b"g", b"h", b"YYY", b"i", b"j", b"k", "</s>", b"mn"]
    ids = {token: n for n, token in enumerate(dict.fromkeys(student + teacher))}
    raw = [token.encode() if isinstance(token, str) else token for token in ids]
    vocab = VocabBytes.from_callback(len(raw), raw.__getitem__, specials=[ids["</s>"]])
    rows = [
        ([b"ab", b"c", "</s>", b"de", b"fg", b"h", b"XX", b"i", b"jk"],
         [b"a", b"b", b"cd", b"e", b"f", b"g", b"h", b"YYY", b"i", b"j", b"k"]),
        ([b"jk", b"l", b"h"], [b"jk", "</s>", b"l", b"h", b"mn"]),
    ]  # fmt: skip
    found = Aligner(vocab, vocab)(*([[ids[t] for t in row[side]] for row in rows] for side in (0, 1)))
    assert found.chunks(0)[:2] == [(0, 1, 0, 2), (1, 4, 2, 4)] and found.flags[1] == INTERRUPTED
    assert ((found.flags & INVALID) != 0).sum() == 1 and found.row_flags.tolist()[1] == 2
    return found
