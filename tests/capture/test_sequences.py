from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from potstill.capture.sequences import MAX_KEY_BYTES, make_key, token_sequences
from potstill.capture.text import Document, open_text


class Bytes:
    """A tokenizer of one token a byte, so that what must come out is known without one."""

    def __init__(self, eos_token_id: int | None = 256) -> None:
        self.eos_token_id = eos_token_id

    def __call__(self, texts, **_):
        return {"input_ids": [list(t.encode()) for t in texts]}


documents = st.lists(st.text(max_size=40), max_size=12).map(
    lambda texts: [Document(f"d{i}", t, len(t.encode())) for i, t in enumerate(texts)]
)


@given(documents, st.integers(1, 17), st.integers(1, 5))
def test_packing_loses_and_repeats_nothing(docs, length, document_batch):
    got = list(token_sequences(docs, Bytes(), length=length, document_batch=document_batch))
    stream = [t for d in docs if d.text for t in (*d.text.encode(), 256)]
    assert [int(t) for s in got for t in s.tokens] == stream
    assert all(len(s.tokens) == length for s in got[:-1]) and all(len(s.tokens) <= length for s in got[-1:])
    assert len({s.key for s in got}) == len(got)
    assert all(s.tokens.dtype == np.int32 for s in got)


@given(documents, st.integers(1, 17))
def test_packed_keys_say_where_a_row_starts(docs, length):
    at = {f"d{i}#{offset}": t for i, d in enumerate(docs) for offset, t in enumerate([*d.text.encode(), 256])}
    for s in token_sequences(docs, Bytes(), length=length):
        assert at[s.key] == s.tokens[0]


@given(documents, st.integers(1, 17))
def test_splitting_cuts_each_document_alone(docs, length):
    got = list(token_sequences(docs, Bytes(), length=length, pack=False))
    want = []
    for d in docs:
        data = d.text.encode()
        want += [(f"{d.name}#{i}", list(data[i : i + length])) for i in range(0, len(data), length)]
    assert [(s.key, s.tokens.tolist()) for s in got] == want


@given(documents, st.integers(1, 9), st.integers(0, 60), st.booleans())
def test_a_larger_limit_only_appends(docs, length, limit, pack):
    def run(limit):
        return [
            (s.key, s.tokens.tolist())
            for s in token_sequences(docs, Bytes(), length=length, pack=pack, max_tokens=limit)
        ]

    short, whole = run(limit), run(None)
    assert whole[: len(short)] == short
    assert sum(len(t) for _, t in short) <= limit or not short


def test_no_end_token_where_the_tokenizer_has_none():
    docs = [Document("a", "xy"), Document("b", "z")]
    (row,) = token_sequences(docs, Bytes(None), length=8)
    assert row.tokens.tolist() == list(b"xyz")


def test_keys_are_the_same_wherever_the_data_lies(corpus, tokenizer, tmp_path):
    def keys(root):
        return [s.key for s in token_sequences(open_text(root), tokenizer, length=32)]

    corpus_keys = keys(corpus)
    moved = corpus.rename(tmp_path / "moved")
    assert keys(moved) == corpus_keys and corpus_keys[0] == "part0/03.txt#0"


def test_long_names_stay_keys():
    a, b = "é" * 400 + "/x.txt", "è" + "é" * 399 + "/x.txt"
    for name in (a, b):
        assert len(make_key(name, 10**9).encode()) <= MAX_KEY_BYTES
    assert make_key(a, 0) != make_key(b, 0) and make_key(a, 0).endswith("/x.txt#0")
    assert make_key("short", 3) == "short#3"


def test_refusals():
    with pytest.raises(ValueError, match="two documents are named 'a'"):
        list(token_sequences([Document("a", "x"), Document("a", "y")], Bytes(), length=4))
    with pytest.raises(ValueError, match="length is 0"):
        list(token_sequences([], Bytes(), length=0))


def test_progress_is_monotone_and_ends_at_the_total(corpus, tokenizer):
    source = open_text(corpus)
    consumed = [s.consumed for s in token_sequences(source, tokenizer, length=16)]
    assert consumed == sorted(consumed) and consumed[-1] == source.size
