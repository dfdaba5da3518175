"""Readers that map shards into memory read what others read, find the same damage, and travel to workers as such."""

from __future__ import annotations

import multiprocessing
import pickle

import numpy as np
import pytest
from potstill import cache


def equal(a: cache.Cache, b: cache.Cache) -> None:
    assert a.keys() == b.keys() and a.spec == b.spec
    for key in a.keys():
        for x, y in zip(a.numpy(key), b.numpy(key), strict=True):
            np.testing.assert_array_equal(x, y)


def lengths_of(store: cache.Cache) -> list[int]:
    return [len(store.numpy(key)[0]) for key in store.keys()]


def test_mapped_rows_are_the_same(tmp_path, lab):
    path = tmp_path / "c"
    given = lab.write(path, {"a": 30, "long": 9000, "b": 7}, flush=True)
    mapped = cache.open(path, mmap=True)
    lab.check(mapped, given)
    equal(mapped, cache.open(path))
    keys = mapped.keys()
    got, want = (
        store.batch(keys, tokens=[given[k].tokens for k in keys], threads=2) for store in (mapped, cache.open(path))
    )
    assert got.ids.equal(want.ids) and got.log_probs.equal(want.log_probs)
    with cache.Writer(path, lab.spec()) as w:
        r = lab.rows(4, seed=9)
        w.add("new", r.tokens, r)
    assert mapped.refresh() == 1
    again = pickle.loads(pickle.dumps(mapped))
    assert again._mmap
    equal(again, cache.open(path))
    with multiprocessing.get_context("fork").Pool(1) as pool:  # a map is inherited
        assert pool.apply(lengths_of, (mapped,)) == [30, 9000, 7, 4]


def test_mapped_damage_is_found_and_named(tmp_path, dense_lab):
    path = tmp_path / "c"
    dense_lab.write(path, {"a": 30, "b": 40})
    (shard,) = dense_lab.shard_files(path)
    whole = shard.read_bytes()
    for at in range(0, len(whole), 29):
        with open(shard, "r+b") as file:
            file.seek(at)
            file.write(bytes([whole[at] ^ 4]))
        try:
            store = cache.open(path, mmap=True)
            rows = [store.numpy(key) for key in store.keys()]
        except cache.CacheError as error:
            assert shard.name in str(error)
        else:  # the second copy of the tables, which reading does not need
            assert all(
                dense_lab.rows(n, seed=i).tokens.tolist() == r[0].tolist()
                for i, (n, r) in enumerate(zip((30, 40), rows, strict=True))
            )
            assert not store.verify().ok
        shard.write_bytes(whole)
    shard.write_bytes(whole[:-1])
    with pytest.raises(cache.CacheError, match="trailer"):
        cache.open(path, mmap=True)
    with pytest.raises(TypeError, match="mmap is given for https://"):
        cache.open("https://nowhere.example/c", mmap=True)
