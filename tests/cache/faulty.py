"""Run with faults.c preloaded: every call that a writer and a reader make on the cache's files fails once, in turn.

Prints how many calls of each kind failed; any broken promise ends it with a traceback.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from potstill import cache

shim = ctypes.CDLL(None)
SPEC = cache.Spec(vocab_size=500, k=4, columns=("mass",))
KEYS = ["a", "b", "c", "d"]


def rows(key: str):
    rng = np.random.default_rng(KEYS.index(key))
    ids = np.argsort(rng.random((30, 500)), -1)[:, :4]
    log_probs = -np.sort(rng.random((30, 4)) + 2, -1)
    top = SimpleNamespace(ids=ids, log_probs=log_probs, log_rest=np.zeros(30) - 1)
    return rng.integers(0, 500, 30), top, {"mass": rng.random(30)}


def write(path: Path, committed: set[str], aside: bool = False) -> None:
    """Three commits, or (aside) four while more is added; `committed` learns what one that succeeded has promised."""
    with cache.Writer(path, SPEC, shard_bytes=1 if aside else 64 << 20) as w:
        added = set()
        for key in KEYS:
            tokens, top, columns = rows(key)
            w.add(key, tokens, top, columns=columns)
            added.add(key)
            if key in "bc" and not aside:
                w.flush()
                committed |= added
    committed |= added


def content(path: Path) -> dict[str, bytes]:
    store = cache.open(path)
    return {key: b"".join(a.tobytes() for a in store.numpy(key)) for key in store.keys()}


def fail(kind: str, code: int, nth: int, under: Path) -> None:
    shim.fault_set(kind.encode(), nth, code, str(under).encode())


def writers(root: Path, calm: dict[str, bytes], kind: str, code: int, aside: bool = False) -> int:
    for nth in range(1, 1000):
        path = root / f"{kind}-{code}-{aside}-{nth}"
        path.mkdir()
        committed: set[str] = set()
        fail(kind, code, nth, path)
        error = None
        try:
            write(path, committed, aside)
        except OSError as refused:
            error = str(refused)
            assert refused.errno == code and str(path) in error, error
            assert not committed or "what was committed is safe" in error, error
        fired = shim.fault_fired()
        fail("", 0, 0, path)
        gc.collect()
        assert fired or (error is None and committed == set(KEYS))
        assert kind != "short" or error is None, "a short write is no failure"
        if (path / "log" / "0000000000.json").exists():
            report = cache.verify_cache(path)
            assert report.ok, (kind, nth, error, report.problems)
            held = content(path)
            assert committed <= held.keys() and all(calm[key] == value for key, value in held.items()), (kind, nth)
        write(path, set())  # once the disk works again the next writer goes on
        assert content(path) == calm and cache.verify_cache(path).ok, (kind, nth)
        assert not list((path / "open").iterdir()), (kind, nth, error)
        shutil.rmtree(path)
        if not fired:
            return nth - 1
    raise AssertionError(f"{kind} never ends")


def readers(path: Path, calm: dict[str, bytes]) -> int:
    for nth in range(1, 1000):
        fail("read", errno.EIO, nth, path)
        try:
            found = content(path)
        except (cache.CacheError, OSError) as refused:
            assert "error" in str(refused)
        else:
            assert found == calm and not shim.fault_fired()
            return nth - 1
    raise AssertionError("reading never ends")


root = Path(sys.argv[1])
write(root / "calm", set())
calm = content(root / "calm")
for kind, code in [
    ("write", errno.ENOSPC), ("short", 0), ("fsync", errno.EIO), ("rename", errno.EIO),
    ("link", errno.EPERM), ("open", errno.EMFILE), ("truncate", errno.EIO),
]:  # fmt: skip
    print(kind, code, writers(root, calm, kind, code), flush=True)
    writers(root, calm, kind, code, aside=True)
shim.fault_links(0)  # records are then created and written in place
print("write", errno.EIO, writers(root, calm, "write", errno.EIO), flush=True)
print("read", errno.EIO, readers(root / "calm", calm))
