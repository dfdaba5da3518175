"""Pitfall 29: an open cache in forked, spawned and threaded readers."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading

import numpy as np
import pytest
from potstill import cache

torch = pytest.importorskip("torch")


class Rows(torch.utils.data.Dataset):
    def __init__(self, path) -> None:
        self.store = cache.open(path)
        self.keys = self.store.keys()

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: int):
        tokens, ids, _, _ = self.store.numpy(self.keys[i])
        return int(tokens.sum()), int(ids.sum())


def sums(given: dict) -> list[tuple[int, int]]:
    return [(int(r.tokens.sum()), int(r.ids.sum())) for r in given.values()]


@pytest.fixture
def made(tmp_path, lab):
    given = lab.write(tmp_path / "c", {f"s{i}": 3 + i for i in range(24)}, flush=True, vocab=300)
    return tmp_path / "c", given


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_pitfall_29_dataloader_workers(made, method):
    path, given = made
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    data = Rows(path)
    data[0]  # a file handle is open before the fork
    if method == "fork":
        loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context=method)
        assert [tuple(x) for x in loader] == sums(given)
        return
    # the test module is no importable package, so the spawned child gets the cache itself
    with multiprocessing.get_context(method).Pool(1) as pool:
        tokens = pool.map(data.store.tokens, data.keys)
    assert [int(t.sum()) for t in tokens] == [a for a, _ in sums(given)]


def test_pitfall_29_fork_while_threads_read(made):
    path, given = made
    store = cache.open(path)
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            store.numpy("s7")

    threads = [threading.Thread(target=busy) for _ in range(2)]
    for t in threads:
        t.start()
    try:
        for _ in range(10):
            with multiprocessing.get_context("fork").Pool(1) as pool:
                got = pool.apply_async(store.tokens, ("s23",)).get(timeout=20)
            np.testing.assert_array_equal(got, given["s23"].tokens)
    finally:
        stop.set()
        for t in threads:
            t.join()


def test_pickle_reopens(made, tmp_path, monkeypatch):
    path, given = made
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps(cache.open("c"))
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(pickle.loads(data).tokens("s3"), given["s3"].tokens)


def test_threads_agree(made, lab):
    path, given = made
    store = cache.open(path)
    errors: list[BaseException] = []

    def read() -> None:
        try:
            for _ in range(5):
                lab.check(store, given)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors


def test_a_reader_keeps_its_view_while_a_writer_commits(made, lab):
    path, given = made
    store = cache.open(path)
    with cache.Writer(path, lab.spec(vocab=300)) as w:
        r = lab.rows(4, vocab=300, seed=99)
        w.add("late", r.tokens, r)
        w.flush()
        assert "late" not in store and "late" in cache.open(path)
        lab.check(store, given)


def test_a_forked_writer_is_refused(tmp_path, lab):
    """A child that inherits a writer must not write through it."""
    w = cache.Writer(tmp_path / "c", lab.spec())
    r = lab.rows(4)
    w.add("a", r.tokens, r)
    pid = os.fork()
    if pid == 0:
        try:
            w.add("b", r.tokens, r)
        except RuntimeError as error:
            os._exit(7 if "opened in process" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    w.close()
    assert cache.open(tmp_path / "c").keys() == ["a"]
