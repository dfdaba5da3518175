"""Pitfall 24: whatever kills a writer, what was committed stays, and the next writer goes on."""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from potstill import cache

from ..forks import exit_code, fork

ENV = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
needs_signals = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
SEQUENCES = 700


@functools.cache  # forked writers inherit what the first one made
def sequence(i: int) -> tuple[str, np.ndarray, SimpleNamespace]:
    rng = np.random.default_rng(i)
    length = int(rng.integers(1, 60))
    ids = np.argsort(rng.random((length, 500)), -1)[:, :4]
    log_probs = -np.sort(rng.random((length, 4)) + 2, -1)
    top = SimpleNamespace(ids=ids, log_probs=log_probs, log_rest=np.zeros(length) - 1)
    return f"s{i}", rng.integers(0, 500, length), top


def write_all(path, step=lambda: None, first: int = 0) -> None:
    """Adds what is missing of all sequences from number `first` on, with many commits; calls `step` before each."""
    with cache.Writer(path, cache.Spec(vocab_size=500, k=4), shard_bytes=3000) as w:
        for i in range(SEQUENCES):
            number = (first + i) % SEQUENCES
            if f"s{number}" in w:
                continue
            step()
            w.add(*sequence(number))
            if number % 17 == 0:
                w.flush()


def content(path) -> dict[str, bytes]:
    store = cache.open(path)
    return {key: b"".join(np.ascontiguousarray(a).tobytes() for a in store.numpy(key)) for key in store.keys()}


def killed_round(path, chance: random.Random) -> int:
    """A forked writer that may add so many sequences and dies at a random moment; how many it had begun for certain."""
    asks, asked = os.pipe()
    grants, granted = os.pipe()

    def body() -> None:
        os.close(granted)  # at the test's own end the pipe breaks instead of waiting for ever

        def step() -> None:
            os.write(asked, b".")
            if not os.read(grants, 1):
                os._exit(3)

        write_all(path, step)

    pid = fork(body)
    # some die while they open the cache, the others after a few sequences; then anywhere in the next ones
    steps = chance.choice([0, 1, 5, 15, 30])
    for _ in range(steps):
        assert os.read(asks, 1) == b"."
        os.write(granted, b".")
    if steps:
        assert os.read(asks, 1) == b"."
        os.write(granted, b"." * 8)
    time.sleep(chance.uniform(0, 0.004))
    os.kill(pid, signal.SIGKILL)
    assert exit_code(pid) == -signal.SIGKILL
    for end in (asks, asked, grants, granted):
        os.close(end)
    return steps


@needs_signals
@pytest.mark.parametrize("rounds", [40, pytest.param(1000, marks=pytest.mark.nightly)])
def test_pitfall_24_kill_9_at_any_moment(tmp_path, rounds):
    """Each kill leaves a cache that verifies and never lost a committed sequence; nothing begun before is added again;
    the last run makes the same cache as a writer that nobody killed."""
    write_all(tmp_path / "calm")
    calm, chance = content(tmp_path / "calm"), random.Random(7)
    path, held, took_over, begun, caches = tmp_path / "c0", set(), 0, 0, 0
    for n in range(rounds):
        begun += killed_round(path, chance)
        if not (path / "log" / "0000000000.json").exists():
            continue
        report = cache.verify_cache(path)
        assert report.ok, (n, report.problems)
        keys = cache.open(path).keys()
        assert held <= set(keys) and len(set(keys)) == len(keys), n
        took_over += report.open_shards
        held = set(keys)
        if len(held) > SEQUENCES - 100 or n == rounds - 1:  # nearly full, or the end: finish this one and begin another
            write_all(path)
            assert content(path) == calm
            assert cache.verify_cache(path).ok and list((path / "open").iterdir()) == []
            caches += 1
            path, held = tmp_path / f"c{caches}", set()
    assert begun > 5 * rounds, "the rounds hardly began anything"
    assert took_over > rounds / 8, "few kills left an open shard behind"


@needs_signals
@pytest.mark.parametrize("seconds", [1, pytest.param(60, marks=pytest.mark.nightly)])
def test_two_processes_write_and_one_reads_one_folder(tmp_path, seconds):
    """The writers do the same work in other orders, again and again; a reader never meets an error or a torn row."""
    write_all(tmp_path / "calm")
    calm = content(tmp_path / "calm")
    deadline, path, looks, grown = time.monotonic() + seconds, tmp_path / "c", 0, 0
    while looks == 0 or time.monotonic() < deadline:
        pids = [fork(lambda f=first: write_all(path, first=f)) for first in (0, SEQUENCES // 2)]
        store = None
        while True:
            alive = [pid for pid in pids if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None]
            if store is None and (path / "log" / "0000000000.json").exists():
                store = cache.open(path)
            if store is not None:
                before = set(store.keys())
                grown += store.refresh()
                assert before <= set(store.keys())
                for key in store.keys()[-20:]:
                    tokens, *rest = store.numpy(key)
                    assert b"".join(np.ascontiguousarray(a).tobytes() for a in (tokens, *rest)) == calm[key], key
                looks += 1
            if not alive:
                break
        assert [exit_code(pid) for pid in pids] == [0, 0]
        assert store is not None
        store.refresh()
        assert sorted(store.keys()) == sorted(calm) and cache.verify_cache(path).ok
        assert content(path) == calm
        shutil.rmtree(path)
    assert grown > 0 and looks > 3


def test_a_refresh_opens_new_shards_alone(tmp_path, lab):
    path = tmp_path / "c"
    with cache.Writer(path, lab.spec()) as w:
        first = add(w, lab, "a", 1)
        w.flush()
        store = cache.open(path)
        old = lab.shard_files(path)[0]
        assert store.refresh() == 0
        second = add(w, lab, "b", 2)
        w.flush()
        old.rename(tmp_path / "aside")  # so that opening it again would be an error
        assert store.refresh() == 1 and store.keys() == ["a", "b"]
        with pytest.raises(OSError):
            cache.open(path)
        (tmp_path / "aside").rename(old)
    lab.check(store, {"a": first, "b": second})
    damaged = next(f for f in lab.shard_files(path) if f != old)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(cache.CacheError):
        cache.open(path)
    assert store.refresh() == 0  # what is open stays as it was found
    lab.check(store, {"b": second})


def add(w, lab, key, seed, n=20):
    r = lab.rows(n, seed=seed)
    w.add(key, r.tokens, r)
    return r


def abandon(tmp_path, lab, keys) -> dict:
    """A writer that dies with `keys` in its open shard (its lock goes with its process)."""
    path = tmp_path / "c"
    with cache.Writer(path, lab.spec()):
        pass
    pid = os.fork()
    if pid == 0:
        w = cache.Writer(path, lab.spec())
        for i, key in enumerate(keys):
            add(w, lab, key, i)
        os._exit(0)
    os.waitpid(pid, 0)
    return {key: lab.rows(20, seed=i) for i, key in enumerate(keys)}


@needs_signals
def test_pitfall_24_resume_takes_over_whole_sequences(tmp_path, lab):
    given = abandon(tmp_path, lab, ["a", "b", "c"])
    path = tmp_path / "c"
    assert len(cache.open(path)) == 0 and cache.verify_cache(path).open_shards == 1
    with cache.Writer(path, lab.spec()) as w:
        assert w.salvaged == 3 and "c" in w
    lab.check(cache.open(path), given)
    assert list((path / "open").iterdir()) == []


@needs_signals
@pytest.mark.parametrize("cut", [1, 100, 400, 500, 900, 1300])
def test_pitfall_24_recover_salvages_a_torn_shard(tmp_path, lab, cut):
    """Bytes missing at the end, and garbage in their place: whole sequences before them come back."""
    given = abandon(tmp_path, lab, ["a", "b", "c"])
    path = tmp_path / "c"
    (torn,) = (path / "open").iterdir()
    data = torn.read_bytes()
    torn.write_bytes(data[:-cut] + os.urandom(min(cut, 300)))
    found = cache.recover_cache(path)
    store = cache.open(path)
    assert found["sequences"] == len(store) and (found["lost"] or not len(store))
    whole = [k for k in given if (data.rindex(k.encode().ljust(8, b"\0")) + 700) < len(data) - cut]
    assert set(whole) <= set(store.keys()) and store.verify().ok
    lab.check(store, {k: given[k] for k in store.keys()})


def test_a_living_writer_is_left_alone(tmp_path, lab):
    path = tmp_path / "c"
    with cache.Writer(path, lab.spec()) as w:
        mine = add(w, lab, "mine", 1)
        with cache.Writer(path, lab.spec()) as other:
            assert other.salvaged == 0 and "mine" not in other
            theirs = add(other, lab, "theirs", 2)
        assert len(cache.open(path)) == 1
    lab.check(cache.open(path), {"mine": mine, "theirs": theirs})


def test_two_writers_with_the_same_work(tmp_path, lab):
    """Equal content is harmless, other content under one key is refused at the commit."""
    path = tmp_path / "c"
    a, b = cache.Writer(path, lab.spec()), cache.Writer(path, lab.spec())
    r = add(a, lab, "x", 1)
    add(b, lab, "x", 1)
    name = a.flush()
    assert b.flush() is None
    add(a, lab, "y", 2)
    add(b, lab, "y", 3)
    b.flush()
    with pytest.raises(ValueError, match='"y" is already in shard .* with other content than in shard'):
        a.flush()
    with pytest.raises(RuntimeError, match="cannot go on"):
        add(a, lab, "z", 4)
    b.close()
    del a
    store = cache.open(path)
    assert store.keys() == ["x", "y"] and name in [f.stem for f in lab.shard_files(path)]
    lab.check(store, {"x": r, "y": lab.rows(20, seed=3)})
    assert store.verify().ok


@needs_signals
def test_many_processes_write_one_folder(tmp_path, lab):
    path = tmp_path / "c"
    pids = []
    for rank in range(4):
        pid = os.fork()
        if pid == 0:
            with cache.Writer(path, lab.spec(), shard_bytes=4000) as w:
                for i in range(30):
                    add(w, lab, f"s{i}" if i < 5 else f"{rank}/{i}", i, n=5)  # the first five by all
            os._exit(0)
        pids.append(pid)
    assert all(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 for pid in pids)
    store = cache.open(path)
    assert len(store) == 5 + 4 * 25 and store.verify().ok
    lab.check(store, {key: lab.rows(5, seed=int(key.split("/")[1])) for key in store.keys() if "/" in key})


@needs_signals
def test_a_writer_forked_while_a_shard_is_committed_refuses_and_does_not_wait(tmp_path, lab):
    def child(writer: cache.Writer) -> None:
        signal.alarm(30)  # the thread that commits is not in this process: nothing may wait for it
        for call in (lambda: add(writer, lab, "other", 1), writer.flush, writer.close):
            with pytest.raises(RuntimeError, match="opened in process"):
                call()

    path, given = tmp_path / "c", {}
    with cache.Writer(path, lab.spec(), shard_bytes=1 << 14) as w:
        for i in range(4):
            given[f"{i}"] = add(w, lab, f"{i}", i, n=3_000)  # a shard each, on its way when the process is copied
            assert exit_code(fork(lambda: child(w))) == 0
    assert len(cache.open(path)) == 4
    lab.check(cache.open(path), given)


@needs_signals
def test_a_full_disk_is_a_clean_error(tmp_path):
    """A file size limit stands for a full disk: OSError, the committed part intact, the writer usable."""
    code = f"""
import resource, sys
from types import SimpleNamespace
import numpy as np
from potstill import cache
ids, lp = np.tile(np.arange(4), (50, 1)), np.tile(-np.arange(2.0, 6.0), (50, 1))
top = SimpleNamespace(ids=ids, log_probs=lp, log_rest=np.zeros(50) - 1)
with cache.Writer({str(tmp_path / "c")!r}, cache.Spec(vocab_size=500, k=4)) as w:
    w.add("safe", np.arange(50), top)
    w.flush()
    resource.setrlimit(resource.RLIMIT_FSIZE, (2500, resource.RLIM_INFINITY))
    added = []
    try:
        for i in range(100):
            w.add(f"s{{i}}", np.arange(50), top)
            added.append(f"s{{i}}")
    except OSError as error:
        print("refused", error.errno, len(added))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    w.add("after", np.arange(50), top)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=ENV)
    assert done.returncode == 0 and done.stdout.startswith("refused 27"), done.stderr
    count = int(done.stdout.split()[2])
    store = cache.open(tmp_path / "c")
    assert store.keys() == ["safe", *(f"s{i}" for i in range(count)), "after"] and count >= 1
    assert store.verify().ok
