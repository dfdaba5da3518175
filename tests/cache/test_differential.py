"""Damage under right checksums: the package and the independent reader refuse the same bytes and read the same rows."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from potstill import cache

pytest.importorskip("xxhash", reason="forging checksums needs the xxhash package")
from .test_dense import forge_bytes, set_bytes, teacher
from .test_hostile import reforge

REFUSALS = (AssertionError, IndexError, ValueError, OverflowError, struct.error, UnicodeDecodeError)


def ours(path):
    store = cache.open(path)
    try:
        tokens, b = store._decode("a")
    except cache.CacheError as error:
        return None, error
    return (tokens, b.ids, b.log_probs, b.log_rest, b.extra, b.lse, b.counts), None


def theirs(path, independent):
    try:
        return independent.cache(path, columns=True)["a"], None
    except REFUSALS as error:
        return None, error


def compare(path, independent) -> bool:
    """Whether the rows are read."""
    (mine, refusal), (other, because) = ours(path), theirs(path, independent)
    assert (mine is None) == (other is None), (refusal, because)
    if mine is None:
        return False
    for name, a, b in zip(
        ("tokens", "ids", "log_probs", "log_rest", "extra", "lse", "counts"), mine, other, strict=False
    ):
        if a is not None:
            np.testing.assert_array_equal(a, np.asarray(b).reshape(-1).astype(a.dtype), err_msg=name)
    return True


changes = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255) | st.sampled_from([0, 1, 127, 128, 255])),
    min_size=1,
    max_size=3,
)


def test_dense_payloads_and_tables(tmp_path_factory, dense_lab, independent, monkeypatch):
    monkeypatch.setattr(independent, "check_hashes", lambda *_: None)  # of the rows before the damage
    outcomes = set()

    @settings(max_examples=250, deadline=None)
    @given(
        changes,
        st.sampled_from(["1/16", "bf16_logits", "fp16", "fp32"]),
        st.sampled_from([1, 2]),
        st.booleans(),
        st.booleans(),
    )
    def damaged(changes, values, codec, tables, more):
        path = tmp_path_factory.mktemp("forged") / "c"
        r = teacher(dense_lab, 5, values, k=3, vocab=40, ragged=more)
        spec = dense_lab.spec(3, 40, values=values, sampled=more, token_log_probs=more, codec=codec)
        with cache.Writer(path, spec) as w:
            w.add("a", r.tokens, r)

        forge_bytes(path, dense_lab, changes, tables)
        outcomes.add(compare(path, independent))

    damaged()
    assert outcomes == {True, False}


def test_plain_payloads(tmp_path_factory, plain_lab, independent, monkeypatch):
    monkeypatch.setattr(independent, "check_hashes", lambda *_: None)
    outcomes = set()

    @settings(max_examples=150, deadline=None)
    @given(changes, st.booleans())
    def damaged(changes, ragged):
        path = tmp_path_factory.mktemp("forged") / "c"
        plain_lab.write(path, {"a": 5}, ragged=ragged, k=3, vocab=40)

        def change(data, header_len, foot):
            set_bytes(data, header_len + 40, foot - 8, changes)

        reforge(path, plain_lab, change)
        outcomes.add(compare(path, independent))

    damaged()
    assert outcomes == {True, False}
