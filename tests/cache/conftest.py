"""Rows that look like a teacher's, small caches, and the independent reader."""

from __future__ import annotations

import importlib.util
import sys
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


class Lab:
    """Caches of one kind of values, and the check that belongs to it."""

    rows = staticmethod(rows)

    def __init__(self, values: str) -> None:
        self.values = values

    def spec(self, k: int = 8, vocab: int = 1000, **more: object) -> cache.Spec:
        given = {"teacher": "a teacher", "tokenizer": "a tokenizer", "values": self.values, **more}
        return cache.Spec(vocab_size=vocab, k=k, **given)  # type: ignore[arg-type]

    def write(
        self, path: Path, lengths: dict[str, int], *, ragged: bool = False, flush: bool = False, **sizes: int
    ) -> dict:
        """A cache of sequences {key: length}; returns {key: rows}."""
        given = {key: rows(n, seed=i, ragged=ragged, **sizes) for i, (key, n) in enumerate(lengths.items())}
        with cache.Writer(path, self.spec(**sizes)) as w:
            for key, r in given.items():
                w.add(key, r.tokens, r)
                if flush:
                    w.flush()
        return given

    def check(self, stored: cache.Cache, given: dict) -> None:
        """Every sequence is there: tokens and ids exact, log-probabilities within the bound of the values."""
        for key, r in given.items():
            self.same(stored.numpy(key), r, key)

    def same(self, got: tuple, r: SimpleNamespace, key: str = "") -> None:
        tokens, ids, log_probs, log_rest = got
        np.testing.assert_array_equal(tokens, r.tokens, err_msg=key)
        self.same_ids(ids, log_probs, r.ids, key)
        if self.values == "plain":
            np.testing.assert_array_equal(log_rest, r.log_rest, err_msg=key)
            np.testing.assert_allclose(log_probs, r.log_probs, rtol=2**-11, atol=3e-8, err_msg=key)
            return
        half_a_step = 0.5 * eval(self.values) + 1e-5
        np.testing.assert_allclose(log_rest, r.log_rest, rtol=0, atol=half_a_step, err_msg=key)
        np.testing.assert_allclose(log_probs, r.log_probs, rtol=0, atol=half_a_step, err_msg=key)

    def same_ids(self, ids, log_probs, given, key: str = "") -> None:
        """Equal ids, entry by entry; entries of equal stored log-probability may have changed places."""
        if self.values != "plain":
            given, ids = canonical(given, log_probs), canonical(ids, log_probs)
        np.testing.assert_array_equal(ids, given, err_msg=key)


def canonical(ids, log_probs) -> np.ndarray:
    """Ids [L, k] with those of equal log_probs in ascending order; missing ones stay at the end."""
    ids, log_probs = np.asarray(ids), np.asarray(log_probs)
    order = np.lexsort((np.where(ids < 0, 2**31, ids), -log_probs), axis=-1)
    return np.take_along_axis(ids, order, -1)


def shard_files(path: Path) -> list[Path]:
    return sorted((Path(path) / "shards").glob("*.shard"))


Lab.shard_files = staticmethod(shard_files)  # type: ignore[attr-defined]


@pytest.fixture(scope="session", params=["plain", "1/16"])
def lab(request) -> Lab:
    return Lab(request.param)


@pytest.fixture(scope="session")
def plain_lab() -> Lab:
    return Lab("plain")


@pytest.fixture(scope="session")
def dense_lab() -> Lab:
    return Lab("1/16")


@pytest.fixture(scope="session")
def independent() -> ModuleType:
    """tests/cache/numpy_reader.py, written from docs/format.md alone."""
    for name in ("numpy_dense", "numpy_reader"):
        where = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        assert where is not None and where.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(where)
        where.loader.exec_module(module)
    return module
