from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from potstill.capture import Shard, sequences
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


@given(documents, st.integers(1, 9), st.integers(1, 60), st.booleans())
def test_rows_begin_again_with_each_group_of_documents(docs, length, group_bytes, pack):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequences, "GROUP_BYTES", group_bytes)
        got = list(token_sequences(docs, Bytes(), length=length, pack=pack))
    groups, size = [[]], 0
    for d in docs:
        if size >= group_bytes:
            groups, size = [*groups, []], 0
        groups[-1].append(d)
        size += len(d.text)
    want = [s for g in groups for s in token_sequences(g, Bytes(), length=length, pack=pack)]
    assert [(s.key, s.tokens.tolist()) for s in got] == [(s.key, s.tokens.tolist()) for s in want]
    assert [s.consumed for s in got] == sorted(s.consumed for s in got)


@pytest.mark.parametrize("kind", ["files", "jsonl", "datasets"])
@pytest.mark.parametrize("pack", [True, False])
def test_each_process_reads_and_tokenises_its_share_alone(kind, pack, tmp_path, monkeypatch):
    texts = [f"text {n}: " + "words " * (n % 9) for n in range(200)]
    if kind == "files":
        for n, text in enumerate(texts):
            (tmp_path / f"{n:03d}.txt").write_text(text)
    elif kind == "jsonl":
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path))
    source = open_text(tmp_path)
    monkeypatch.setattr(sequences, "GROUP_BYTES", source.num_bytes // 100)
    tokenised: list[str] = []

    class Counting(Bytes):
        def __call__(self, texts, **_):
            tokenised.extend(texts)
            return super().__call__(texts)

    def sequences_of(rank, world):
        groups = sequences.groups_of(source, Shard(rank, world), None)
        assert groups.teams == world
        owns = groups.owns_next if world > 1 else None
        return list(token_sequences(source, Counting(), length=16, pack=pack, owns=owns))

    def plain(found):
        return sorted((s.key, s.tokens.tolist(), s.consumed, s.group) for s in found)

    whole = plain(sequences_of(0, 1))
    assert sorted(tokenised) == sorted(texts)
    for world in (2, 3, 4):
        tokenised.clear()
        shares = [sequences_of(rank, world) for rank in range(world)]
        assert plain(s for share in shares for s in share) == whole
        assert sorted(tokenised) == sorted(texts), "a document was tokenised by two processes"
        assert min(map(len, shares)) > 0.8 * max(map(len, shares))
    assert sequences.groups_of(source, Shard(0, 4), max_tokens=100).teams == 1
    assert sequences.groups_of(texts, Shard(0, 4), None).teams == 1


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
    with pytest.raises(ValueError, match="owns and max_tokens"):
        list(token_sequences([], Bytes(), length=1, max_tokens=1, owns=bool))


def test_progress_is_monotone_and_ends_at_the_total(corpus, tokenizer):
    source = open_text(corpus)
    consumed = [s.consumed for s in token_sequences(source, tokenizer, length=16)]
    assert consumed == sorted(consumed) and consumed[-1] == source.size
