"""Time in turns, memory in a process of its own.

`python -m potstill.bench.measure MODULE:FUNCTION JSON` calls FUNCTION(**JSON less "choose"), which returns a dict of
name -> callable, and prints the peak bytes of the call that "choose" names, above what was resident before.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

Variant = Callable[[], Any]


def in_turns(
    variants: dict[str, Variant],
    repeats: int = 5,
    warm_up: int = 1,
    limit: float = float("inf"),
    least: float = 0.05,
    whole: float = 5.0,
    before: Variant = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each variant, once a round; every round gives each its turn, the order reversed from round to round.

    `repeats` rounds, and more, up to five times as many, until they have lasted `whole` seconds: what is short is
    disturbed most and gets the most turns.

    A turn repeats the call until `least` seconds have passed and counts the mean: what a call finds in the processor's
    caches is then its own and not what the variant before it left. With fewer than three rounds, which are no figures,
    it is one call, and there are no more rounds. A variant whose last warm-up call took more than `limit` seconds is
    left out. A turn begins with a call of `before`, outside its time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    least, whole = (least, whole) if repeats >= 3 else (0.0, 0.0)
    begun = 0.0
    for round_ in range(warm_up + 5 * repeats):
        if round_ == warm_up:
            begun = time.perf_counter()
        if round_ >= warm_up + repeats and time.perf_counter() - begun >= whole:
            break
        names = list(seconds)
        for name in names if round_ % 2 else names[::-1]:
            before()
            start, taken, calls = time.perf_counter(), 0.0, 0
            while not calls or (taken < least and round_ >= warm_up):
                variants[name]()
                taken, calls = time.perf_counter() - start, calls + 1
            if round_ >= warm_up:
                seconds[name].append(taken / calls)
            elif round_ == warm_up - 1 and taken > limit:
                del seconds[name]
    return seconds


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Keeps the calling thread, and those that it starts, on one core where the system can; other threads roam."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def timing(seconds: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile (between the sorted values, linearly), spread, and how many."""
    low, high = np.quantile(seconds, (0.2, 0.8))
    return {
        "seconds": median(seconds), "p20": float(low), "p80": float(high), "spread": spread(seconds),
        "repeats": len(seconds),
    }  # fmt: skip


def spread(seconds: list[float]) -> float:
    """(largest - smallest) / median."""
    return (max(seconds) - min(seconds)) / median(seconds)


def peak_in_process(builder: str, arguments: dict[str, Any], threads: int) -> int:
    """Peak bytes of the call that `builder` ("module:function") makes from `arguments`, in a fresh process."""
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-m", "potstill.bench.measure", builder, json.dumps(arguments)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {builder} failed:\n{done.stderr[-2000:]}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def resident() -> tuple[int, int]:
    """(resident bytes, peak resident bytes) of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    status = Path("/proc/self/status")
    if not status.exists():
        return peak, peak
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if line.startswith("Vm"))
    return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024


def peak_bytes(call: Variant) -> int:
    """Peak resident bytes of one call above what was resident before it; for a process of its own."""
    if sys.platform == "linux":  # what was freed goes back, or the call could use it unseen
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # resets the peak to what is resident
    before = resident()[0]
    call()
    return resident()[1] - before


def _triton() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _gpu() -> dict[str, str]:
    """Name and driver of the first CUDA device; empty without one."""
    import torch

    if not torch.cuda.is_available():
        return {}
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(asked, capture_output=True, text=True).stdout.strip().splitlines()[:1]
    except OSError:
        driver = []
    return {"gpu": torch.cuda.get_device_name(), "driver": "".join(driver)}


def machine() -> dict[str, Any]:
    """What the figures were made on."""
    import torch

    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next(
            (x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), model
        )
    from potstill import __version__

    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "triton": _triton(),
        "python": platform.python_version(),
        "potstill": __version__,
        **_gpu(),
    }


if __name__ == "__main__":
    module, function = sys.argv[1].split(":")
    arguments = json.loads(sys.argv[2])
    chosen = arguments.pop("choose")
    build = getattr(importlib.import_module(module), function)
    for few in (8, 16):  # libraries, thread pools and compiled code for any number of rows are no part of the call
        small = build(**{**arguments, **{k: few for k in ("rows",) if k in arguments}})
        small[chosen]()
        del small
    print(json.dumps(peak_bytes(build(**arguments)[chosen])))
