"""What the GPU benchmarks share: cases checked and timed in turns; JSON after each, and CSV and a plot at the end."""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from potstill.bench import plots, records
from potstill.bench.measure import Variant, machine, timing
from torch import Tensor

DEVICE_LOST = 3  # exit code


class DeviceLost(RuntimeError):
    """After this error of a kernel nothing runs on the device in this process."""


class Bench:
    """Runs cases until the time is up and keeps their rows, in `out` after each case.

    resume: goes on with the rows that `out` holds, without the variants that took the device down there.
    """

    def __init__(self, device: torch.device, seconds: float, repeats: int, out: Path, tiny: bool, resume: bool = False):
        self.device, self.end, self.repeats = device, time.perf_counter() + seconds, repeats
        self.out, self.machine = out, {**machine(), "cuda": torch.version.cuda, "tiny": tiny}
        before: list[dict[str, Any]] = json.loads(out.read_text())["gpu"] if resume and out.exists() else []
        self.done = {row["case"] for row in before if "ms" in row}
        self.rows = [row for row in before if row["case"] in self.done or "failed" in row]
        self.banned = {row["variant"] for row in before if "lost" in row}

    def time_once(self, call: Variant) -> float:
        """Milliseconds."""
        if self.device.type == "cpu":
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        after.synchronize()
        return before.elapsed_time(after)

    def peak(self, call: Variant) -> int | None:
        """Bytes allocated at most during the call beyond what was there before."""
        if self.device.type == "cpu":
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - start

    def failed(self, row: dict[str, Any], failure: Exception) -> None:
        """Notes the failure; raises DeviceLost where it was the device's last."""
        row["failed"] = f"{type(failure).__name__}: {failure}"[:600]
        if not self.alive():
            row["lost"] = True
            raise DeviceLost(f"{row['case']}: {row['variant']}: {row['failed']}") from failure

    def alive(self) -> bool:
        """Whether the device still runs anything."""
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()  # after an out-of-memory error
            except RuntimeError:
                return False
        return True

    def case(
        self, name: str, variants: dict[str, Variant], floor: Variant, value: Callable[[Any], Tensor],
        tolerance: float, **about: Any,
    ) -> None:  # fmt: skip
        """Check and time the variants; the first one is the eager baseline. about: kernel, mode, rows, vocab, ..."""
        if name in self.done:
            return
        if time.perf_counter() > self.end:
            self.rows.append({"case": name, "skipped": "the time was used up"})
            return
        try:
            allowed = {label: call for label, call in variants.items() if label not in self.banned}
            self.time(self.check(name, allowed, value, tolerance, about), variants, floor)
        finally:
            self.save()
            for row in (r for r in self.rows if r["case"] == name):
                print(json.dumps(row), flush=True)

    def check(
        self, name: str, variants: dict[str, Variant], value: Callable[[Any], Tensor], tolerance: float,
        about: dict[str, Any],
    ) -> dict[str, dict[str, Any]]:  # fmt: skip
        """The rows of the variants whose value is that of the first one."""
        right, truth = {}, None
        for label, call in variants.items():
            row: dict[str, Any] = {"case": name, "variant": label, **about}
            self.rows.append(row)
            try:
                got = value(call()).double()
                truth = got if truth is None else truth
                row["error"] = ((got - truth).abs().max() / truth.abs().max().clamp_min(1e-30)).item()
                if row["error"] <= tolerance:
                    row["peak_bytes"] = self.peak(call)
                    right[label] = row
                else:
                    row["wrong"] = f"differs from {next(iter(variants))} by {row['error']:.2e}, more than {tolerance}"
            except Exception as failure:  # Triton's and inductor's errors have no base but this
                self.failed(row, failure)
        return right

    def time(self, rows: dict[str, dict[str, Any]], variants: dict[str, Variant], floor: Variant) -> None:
        """Adds the times of the variants in `rows`, in turns with the floor."""
        ready = {label: variants[label] for label in rows} | {"floor": floor}
        times: dict[str, list[float]] = {label: [] for label in ready}
        for i in range(self.repeats + 2):
            for label, call in list(ready.items()):
                try:
                    taken = self.time_once(call)
                except Exception as failure:
                    del ready[label]
                    self.failed(rows.get(label, {"case": "", "variant": "floor"}), failure)
                    continue
                if i >= 2:
                    times[label].append(taken)
        for label, row in rows.items():
            if label in ready:
                row.update(timing([ms / 1e3 for ms in times[label]]))
                row["ms"] = 1e3 * row["seconds"]
                if "floor" in ready:
                    row["floor_ms"] = median(times["floor"])
                    row["over_floor"] = row["ms"] / row["floor_ms"]

    def save(self) -> dict[str, Any]:
        """Writes `out` whole or not at all."""
        found = {"machine": self.machine, "gpu": self.rows}
        self.out.parent.mkdir(parents=True, exist_ok=True)
        part = self.out.with_suffix(".part")
        part.write_text(json.dumps(found, indent=1) + "\n")
        part.replace(self.out)
        return found


def options(doc: str, out: str, seconds: float) -> argparse.Namespace:
    """--out, --seconds, --device, --tiny, --resume."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--out", default=out, type=Path)
    parser.add_argument("--seconds", type=float, default=seconds)
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--tiny", action="store_true", help="small shapes: checks this script, measures nothing")
    parser.add_argument("--resume", action="store_true", help="goes on with --out, without what took the device down")
    return parser.parse_args()


def run(chosen: argparse.Namespace, repeats: int, sections: dict[str, Callable[[Bench], None]]) -> int:
    """Runs the sections; whatever stops one, writes what there is. 1: something was wrong; 3: the device is lost."""
    bench = Bench(chosen.device, chosen.seconds, 2 if chosen.tiny else repeats, chosen.out, chosen.tiny, chosen.resume)
    torch.manual_seed(0)
    try:
        for name, section in sections.items():
            try:
                section(bench)
            except DeviceLost:
                raise
            except Exception as failure:
                bench.rows.append({"case": name, "variant": "set-up"})
                bench.failed(bench.rows[-1], failure)
    except DeviceLost as lost:
        print(f"the device is lost: {lost}")
        return DEVICE_LOST
    finally:
        write(bench)
    bad = [row for row in bench.rows if "wrong" in row or "failed" in row]
    for row in bad:
        print(f"{row['case']}: {row['variant']}: {row.get('wrong') or row['failed']}")
    print(f"{len(bench.rows) - len(bad)} rows written to {bench.out}, {len(bad)} wrong or failed")
    return 1 if bad else 0


def write(bench: Bench) -> None:
    """out (JSON), the same in long form (CSV) and a plot beside it."""
    found = bench.save()
    with open(bench.out.with_suffix(".csv"), "w", newline="") as stream:
        table = csv.DictWriter(stream, records.COLUMNS)
        table.writeheader()
        table.writerows(records.records(found))
    try:
        drawn = plots.draw(found, bench.out.parent)
    except ImportError as missing:
        print(f"no plot: {missing}")
        return
    for plot in drawn:
        plot.replace(bench.out.with_suffix(".png"))
