"""What was written is read forever. These bytes may not change: a new codec gets a new folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from potstill import cache

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def lab(plain_lab):
    return plain_lab


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[np.ndarray, ...]]:
    stored = json.loads((GOLDEN / "cache_v1.json").read_text(encoding="utf-8"))
    dtypes = {"tokens": np.int32, "ids": np.int32, "log_probs": np.float32, "log_rest": np.float32}

    def number(value):
        return -np.inf if value is None else value

    return {
        key: tuple(
            np.array([[number(x) for x in row] if isinstance(row, list) else number(row) for row in s[name]], dtype)
            for name, dtype in dtypes.items()
        )
        for key, s in stored.items()
    }


def test_golden_cache_reads(expected):
    store = cache.open(GOLDEN / "cache_v1")
    assert store.keys() == list(expected)
    assert store.spec == cache.Spec(4096, 3, "golden", "r1", "t", "plain", extra={"note": "format 1.0, codec 0"})
    for key, arrays in expected.items():
        for got, want in zip(store.numpy(key), arrays, strict=True):
            np.testing.assert_array_equal(got, want, err_msg=key)
    assert store.verify().ok


def test_golden_cache_in_the_independent_reader(expected, independent):
    found = independent.cache(GOLDEN / "cache_v1")
    for key, arrays in expected.items():
        for got, want in zip(found[key], arrays, strict=True):
            np.testing.assert_array_equal(got, want, err_msg=key)


def test_the_writer_still_makes_the_golden_bytes(tmp_path, expected):
    """Equal input gives equal shards, so two machines that do the same work agree on the names."""
    with cache.Writer(tmp_path / "c", cache.open(GOLDEN / "cache_v1").spec) as w:
        for key, (tokens, ids, log_probs, log_rest) in expected.items():
            w.add(key, tokens, SimpleNamespace(ids=ids, log_probs=log_probs, log_rest=log_rest))
            w.flush()
    ours = {f.name: f.read_bytes() for f in (tmp_path / "c" / "shards").iterdir()}
    golden = {f.name: f.read_bytes() for f in (GOLDEN / "cache_v1" / "shards").iterdir()}
    assert ours == golden
    for name in ["manifest.json", "log/0000000000.json", "log/0000000002.json"]:
        assert (tmp_path / "c" / name).read_bytes() == (GOLDEN / "cache_v1" / name).read_bytes()


def test_a_golden_cache_can_be_continued(tmp_path, expected, lab):
    shutil.copytree(GOLDEN / "cache_v1", tmp_path / "c")
    r = lab.rows(4, k=3, vocab=4096)
    with cache.Writer(tmp_path / "c", cache.open(tmp_path / "c").spec) as w:
        w.add("more", r.tokens, r)
    assert cache.open(tmp_path / "c").keys() == [*expected, "more"]


@pytest.fixture(scope="module", params=["cache_v1_dense", "cache_v1_exact", "cache_v1_shifted"])
def dense(request):
    """A folder of codec 1 or 2, what is read from it by key and column (some empty), and the rows it was made from."""
    with np.load(GOLDEN / f"{request.param}.npz") as stored:
        keys = [str(k) for k in stored["keys"]]
        names = ("tokens", "ids", "log_probs", "log_rest", "extra", "lse", "counts")
        read = {key: {name: stored[f"{i}_{name}"] for name in names} for i, key in enumerate(keys)}
        names = ("ids", "log_probs", "log_rest", "lse", "counts", "token_log_probs", "warm")
        given = {key: {name: stored[f"{i}_given_{name}"] for name in names} for i, key in enumerate(keys)}
    return GOLDEN / request.param, read, given


def test_golden_dense_caches_read_in_both_readers(dense, independent):
    path, expected, _ = dense
    store, theirs = cache.open(path), independent.cache(path, columns=True)
    assert store.keys() == list(expected) == list(theirs) and store.verify().ok
    for key, columns in expected.items():
        tokens, buffers = store._decode(key)
        ours = {"tokens": tokens, **{name: value for name, value in vars(buffers).items() if value is not None}}
        for (name, want), independently in zip(columns.items(), theirs[key], strict=True):
            if want.size:
                np.testing.assert_array_equal(ours[name], want.ravel(), err_msg=f"{key} {name}")
                np.testing.assert_array_equal(independently.ravel(), want.ravel(), err_msg=f"{key} {name}")


def test_the_writer_still_makes_the_dense_bytes(tmp_path, dense):
    path, read, given = dense
    with cache.Writer(tmp_path / "c", cache.open(path).spec) as w:
        for key, columns in given.items():
            rows = SimpleNamespace(**columns, log_rest_at={2.0: columns["warm"]})
            w.add(key, read[key]["tokens"], rows)
            w.flush()
    ours = {f.name: f.read_bytes() for f in (tmp_path / "c" / "shards").iterdir()}
    assert ours == {f.name: f.read_bytes() for f in (path / "shards").iterdir()}


@pytest.fixture(scope="module")
def further():
    """The folder with further columns, and what was given to its writer, by key and name."""
    with np.load(GOLDEN / "cache_v1_columns.npz") as stored:
        keys = [str(key) for key in stored["keys"]]
        names = ("tokens", "ids", "log_probs", "log_rest", "hidden", "half", "scores", "classes", "mass")
        return GOLDEN / "cache_v1_columns", {
            key: {name: stored[f"{i}_{name}"] for name in names} for i, key in enumerate(keys)
        }


def test_golden_columns_read_in_both_readers(further, independent):
    path, given = further
    store, theirs = cache.open(path), independent.cache(path, columns=True)
    assert store.keys() == list(given) == list(theirs) and store.verify().ok
    assert [c.name for c in store.spec.columns] == ["hidden", "half", "scores", "classes", "mass"]
    for key, columns in given.items():
        for column in store.spec.columns:
            got, want = store.column(key, column.name).float().numpy(), columns[column.name]
            np.testing.assert_array_equal(got.ravel(), theirs[key][-1][column.name].ravel())
            np.testing.assert_allclose(got, want, rtol={"bf16": 2**-8, "fp16": 2**-11, "fp32": 0}[column.dtype])


def test_the_writer_still_makes_the_bytes_of_columns(tmp_path, further):
    path, given = further
    with cache.Writer(tmp_path / "c", cache.open(path).spec) as w:
        for key, columns in given.items():
            named = {name: columns[name] for name in ("hidden", "scores", "classes")}
            more = {name: columns[name] for name in ("half", "mass")}
            w.add(key, columns["tokens"], SimpleNamespace(**columns), **named, columns=more)
            w.flush()
    files = ["manifest.json", "log/0000000000.json", *(f"shards/{f.name}" for f in (path / "shards").iterdir())]
    for name in files:
        assert (tmp_path / "c" / name).read_bytes() == (path / name).read_bytes(), name
