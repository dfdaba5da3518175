"""Pitfall 24: whatever kills a writer, what was committed stays, and the next writer goes on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from potstill import cache

WRITER = """
import sys
from types import SimpleNamespace
import numpy as np
from potstill import cache
path, n = sys.argv[1], int(sys.argv[2])
spec = cache.Spec(vocab_size=500, k=4)
print("ready", flush=True)
with cache.Writer(path, spec, shard_bytes=3000) as w:
    print("salvaged", w.salvaged, flush=True)
    for i in range(n):
        if f"s{i}" in w:
            continue
        rng = np.random.default_rng(i)
        length = int(rng.integers(1, 60))
        ids = np.argsort(rng.random((length, 500)), -1)[:, :4]
        lp = -np.sort(rng.random((length, 4)) + 2, -1)
        top = SimpleNamespace(ids=ids, log_probs=lp, log_rest=np.zeros(length) - 1)
        w.add(f"s{i}", rng.integers(0, 500, length), top)
        print("added", flush=True)
        if i % 17 == 0:
            w.flush()
print("done", flush=True)
"""
ENV = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
needs_signals = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")


def start(path, n: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(n)], stdout=subprocess.PIPE, text=True, env=ENV
    )


def content(path) -> dict[str, bytes]:
    store = cache.open(path)
    return {key: b"".join(np.ascontiguousarray(a).tobytes() for a in store.numpy(key)) for key in store.keys()}


@needs_signals
def test_pitfall_24_kill_9_at_any_moment(tmp_path):
    """Fifteen kills: each leaves a cache that verifies and never lost a committed sequence; the last run
    makes the same cache as a writer that nobody killed."""
    n = 500
    calm = start(tmp_path / "calm", n)
    assert calm.stdout is not None and calm.stdout.read().endswith("done\n") and calm.wait() == 0
    chance = random.Random(7)
    held: set[str] = set()
    took_over = 0
    for round in range(15):
        process = start(tmp_path / "c", n)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        # some die while they open the cache, the others after a few sequences; then anywhere in the next ones
        for _ in range(chance.choice([0, 1, 5, 15, 30])):
            process.stdout.readline()
        time.sleep(chance.uniform(0, 0.01))
        process.send_signal(signal.SIGKILL)
        assert not process.stdout.read().endswith("done\n"), "the writer was too fast to be killed"
        process.wait()
        if not (tmp_path / "c" / "log" / "0000000000.json").exists():
            continue
        report = cache.verify_cache(tmp_path / "c")
        assert report.ok, (round, report.problems)
        keys = cache.open(tmp_path / "c").keys()
        assert held <= set(keys) and len(set(keys)) == len(keys)
        took_over += report.open_shards
        held = set(keys)
    assert len(held) > 50, "the rounds hardly committed anything"
    assert took_over, "no kill left an open shard behind"
    last = start(tmp_path / "c", n)
    assert last.stdout is not None and last.stdout.read().endswith("done\n") and last.wait() == 0
    assert content(tmp_path / "c") == content(tmp_path / "calm")
    assert cache.verify_cache(tmp_path / "c").ok and list((tmp_path / "c" / "open").iterdir()) == []


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
