"""What the GPU benchmarks share: cases checked and timed in turns, then JSON, CSV, long-form records and plots."""

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

COLUMNS = (
    "case", "variant", "ms", "over_floor", "floor_ms", "spread", "repeats", "peak_bytes", "error", "wrong", "failed",
    "skipped",
)  # fmt: skip


class Bench:
    """Runs cases until the time is up and keeps their rows."""

    def __init__(self, device: torch.device, seconds: float, repeats: int):
        self.device, self.end, self.repeats = device, time.perf_counter() + seconds, repeats
        self.rows: list[dict[str, Any]] = []

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

    def case(
        self, name: str, variants: dict[str, Variant], floor: Variant, value: Callable[[Any], Tensor],
        tolerance: float, **about: Any,
    ) -> None:  # fmt: skip
        """Check and time the variants; the first one is the eager baseline. about: kernel, mode, rows, vocab, ..."""
        if time.perf_counter() > self.end:
            self.rows.append({"case": name, "skipped": "the time was used up"})
            return
        ready: dict[str, Variant] = {}
        truth = None
        for label, call in variants.items():
            row: dict[str, Any] = {"case": name, "variant": label, **about}
            try:
                got = value(call()).double()
                truth = got if truth is None else truth
                error = ((got - truth).abs().max() / truth.abs().max().clamp_min(1e-30)).item()
                row["error"] = error
                if error <= tolerance:
                    row["peak_bytes"] = self.peak(call)
                    ready[label] = call
                else:
                    row["wrong"] = f"differs from {next(iter(variants))} by {error:.2e}, more than {tolerance}"
            except (RuntimeError, ValueError, TypeError) as failure:
                row["failed"] = f"{type(failure).__name__}: {failure}"[:600]
            self.rows.append(row)
        ready["floor"] = floor
        times: dict[str, list[float]] = {label: [] for label in ready}
        for i in range(self.repeats + 2):
            for label, call in ready.items():
                taken = self.time_once(call)
                if i >= 2:
                    times[label].append(taken)
        floor_ms = median(times.pop("floor"))
        for row in self.rows:
            if row["case"] == name and row["variant"] in times:
                row |= timing([ms / 1e3 for ms in times[row["variant"]]])
                row["ms"] = 1e3 * row["seconds"]
                row["over_floor"], row["floor_ms"] = row["ms"] / floor_ms, floor_ms
        for row in (r for r in self.rows if r["case"] == name):
            print(json.dumps(row), flush=True)


def options(doc: str, out: str, seconds: float) -> argparse.Namespace:
    """--out, --seconds, --device, --tiny."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--out", default=out)
    parser.add_argument("--seconds", type=float, default=seconds)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes: checks this script, measures nothing")
    return parser.parse_args()


def write(bench: Bench, out: Path, tiny: bool) -> int:
    """out (JSON), its CSV, long-form records and a plot beside it; 1 where a variant was wrong or failed."""
    facts = {**machine(), "cuda": torch.version.cuda, "tiny": tiny}
    found = {"machine": facts, "gpu": bench.rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    for file, rows in (
        (out.with_suffix(".csv"), bench.rows),
        (out.with_suffix(".records.csv"), records.records(found)),
    ):
        with open(file, "w", newline="") as stream:
            columns = COLUMNS if rows is bench.rows else records.COLUMNS
            table = csv.DictWriter(stream, columns, extrasaction="ignore")
            table.writeheader()
            table.writerows(rows)
    plots.draw(found, out.parent / f"{out.stem}_plots")
    bad = [row for row in bench.rows if "wrong" in row or "failed" in row]
    for row in bad:
        print(f"{row['case']}: {row['variant']}: {row.get('wrong') or row['failed']}")
    print(f"{len(bench.rows) - len(bad)} rows written to {out}, {len(bad)} wrong or failed")
    return 1 if bad else 0
