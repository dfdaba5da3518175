"""Rows that look like a teacher's, small caches, and the independent reader."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("potstill._rust", reason="the Rust extension is not built")
from potstill import cache


def rows(length: int, *, k: int = 8, vocab: int = 1000, seed: int = 0, ragged: bool = False) -> SimpleNamespace:
    """tokens [L], ids [L, k], log_probs [L, k], log_rest [L] of random softmax rows."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 4, (length, vocab))
    lp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = np.argsort(-lp, axis=-1, kind="stable")[:, :k].astype(np.int32)
    top = np.take_along_axis(lp, ids, -1)
    if ragged:
        counts = rng.integers(0, k + 1, length)
        missing = np.arange(k) >= counts[:, None]
        ids[missing], top[missing] = -1, -np.inf
    with np.errstate(divide="ignore"):
        rest = np.log(np.maximum(1 - np.exp(top).sum(-1), 0))
    return SimpleNamespace(
        tokens=rng.integers(0, vocab, length).astype(np.int32),
        ids=ids,
        log_probs=top.astype(np.float32),
        log_rest=rest.astype(np.float32),
    )


def spec(k: int = 8, vocab: int = 1000, **more: object) -> cache.Spec:
    return cache.Spec(vocab_size=vocab, k=k, teacher="a teacher", tokenizer="a tokenizer", **more)  # type: ignore[arg-type]


def write(path: Path, lengths: dict[str, int], *, ragged: bool = False, flush: bool = False, **sizes: int) -> dict:
    """A cache of sequences {key: length}; returns {key: rows}."""
    given = {key: rows(n, seed=i, ragged=ragged, **sizes) for i, (key, n) in enumerate(lengths.items())}
    with cache.Writer(path, spec(**sizes)) as w:
        for key, r in given.items():
            w.add(key, r.tokens, r)
            if flush:
                w.flush()
    return given


def check(stored: cache.Cache, given: dict) -> None:
    """Every sequence is there, exact in tokens, ids and log_rest, within fp16's error in log_probs."""
    for key, r in given.items():
        tokens, ids, log_probs, log_rest = stored.numpy(key)
        np.testing.assert_array_equal(tokens, r.tokens, err_msg=key)
        np.testing.assert_array_equal(ids, r.ids, err_msg=key)
        np.testing.assert_array_equal(log_rest, r.log_rest, err_msg=key)
        np.testing.assert_allclose(log_probs, r.log_probs, rtol=2**-11, atol=3e-8, err_msg=key)


def shard_files(path: Path) -> list[Path]:
    return sorted((Path(path) / "shards").glob("*.shard"))


@pytest.fixture(scope="session")
def lab() -> SimpleNamespace:
    return SimpleNamespace(rows=rows, spec=spec, write=write, check=check, shard_files=shard_files)


@pytest.fixture(scope="session")
def independent() -> ModuleType:
    """tests/cache/numpy_reader.py, written from docs/format.md alone."""
    where = importlib.util.spec_from_file_location("numpy_reader", Path(__file__).with_name("numpy_reader.py"))
    assert where is not None and where.loader is not None
    module = importlib.util.module_from_spec(where)
    where.loader.exec_module(module)
    return module
