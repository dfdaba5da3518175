"""Runs the benchmarks, and makes the tables from what they returned."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from potstill.bench import cache, losses, topk
from potstill.bench.measure import in_turns, machine, peak_in_process, spread

Row = dict[str, Any]
MARK = ("<!-- figures: potstill bench --write-docs -->", "<!-- end of figures -->")


def run(what: str, *, smoke: bool, cache_path: Path, threads: int | None, note: Callable[[str], Any]) -> Row:
    """{"machine": ..., "losses": [row], "topk": [row], "cache": [row]}; a section that was not asked for is empty."""
    found: Row = {"machine": machine(), "losses": [], "topk": [], "cache": []}
    before = torch.get_num_threads()
    if what in ("losses", "all"):
        torch.set_num_threads(threads or before)
        for shape in losses.SMOKE if smoke else losses.SHAPES:
            note(f"losses: {shape[0]}")
            found["losses"] += loss_rows(*shape, repeats=2 if smoke else 5, compiled=not smoke)
    if what in ("topk", "all"):
        torch.set_num_threads(1)
        for dtype, n, vocab, k, kind in topk.CASES:
            note(f"topk: {dtype}, k={k}, {kind}")
            found["topk"] += _topk(dtype, 4 if smoke else n, vocab, k, kind, repeats=2 if smoke else 7)
    torch.set_num_threads(before)
    if what in ("cache", "all"):
        if cache_path.is_dir():
            note(f"cache: {cache_path}")
            found["cache"] = cache.figures(cache_path, repeats=2 if smoke else 5)
        else:
            note(f"cache: skipped, {cache_path} is not there; `potstill demo` writes it, --cache names another")
    return found


def loss_rows(
    name: str, form: str, rows: int, hidden: int, teacher_hidden: int, vocab: int, *, repeats: int, compiled: bool
) -> list[Row]:
    """One row a variant ("potstill", "eager", ...): seconds, spread, ratios to the floor and to eager, peak bytes."""
    shape = dict(form=form, rows=rows, hidden=hidden, teacher_hidden=teacher_hidden, vocab=vocab)
    calls = losses.variants(**shape, compiled=compiled)  # type: ignore[arg-type]
    values = {label: call() for label, call in calls.items() if label != "floor"}
    for label, value in values.items():
        if abs(value - values["eager"]) > 1e-4 * abs(values["eager"]):
            raise AssertionError(f"{name}: {label} gives {value}, eager {values['eager']}; nothing was timed")
    seconds = in_turns(calls, repeats)
    del calls
    floor, eager = median(seconds["floor"]), median(seconds["eager"])
    found = []
    for label in values:
        peak = None
        if label != "torch.compile":  # the compiler's own memory would be counted
            builder = "potstill.bench.losses:variants"
            peak = peak_in_process(builder, {**shape, "choose": label}, torch.get_num_threads())
        taken = median(seconds[label])
        found.append({
            "case": f"{name}, {rows} rows", "variant": label, "seconds": taken, "spread": spread(seconds[label]),
            "over_floor": taken / floor, "over_eager": taken / eager, "peak_bytes": peak,
            "value": values[label], **shape,
        })  # fmt: skip
    return found


def _topk(dtype: torch.dtype, n: int, vocab: int, k: int, kind: str, *, repeats: int) -> list[Row]:
    x = topk.rows(kind, n, vocab, dtype)
    topk.check(x[:4], k)
    seconds = in_turns(topk.variants(x, k), repeats)
    read, torch_seconds = median(seconds["read"]), median(seconds["torch"])
    return [
        {
            "case": f"{str(dtype)[6:]}, k={k}, V={vocab:,}, {kind}", "variant": label, "seconds": median(taken),
            "spread": spread(taken), "over_read": median(taken) / read, "speed_up": torch_seconds / median(taken),
        }
        for label, taken in seconds.items()
    ]  # fmt: skip


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(["| " + " | ".join(x) + " |" for x in [head, ["---"] * len(head), *rows]])


def tables(found: Row) -> str:
    """The sections as Markdown tables."""
    parts = []
    if found["losses"]:
        rows = []
        for r in found["losses"]:
            peak = "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e6:,.0f} MB"
            rows.append(
                [
                    r["case"],
                    r["variant"],
                    f"{r['over_floor']:.2f}",
                    f"{r['over_eager']:.2f}",
                    f"{r['spread']:.0%}",
                    peak,
                ]
            )
        head = [
            "loss, forward + backward, fp32",
            "variant",
            "time / GEMMs alone",
            "time / eager",
            "spread",
            "peak memory",
        ]
        parts.append(_table(head, rows))
    if found["topk"]:
        rows = [
            [r["case"], r["variant"], f"{r['speed_up']:.1f}x", f"{r['over_read']:.1f}", f"{r['spread']:.0%}"]
            for r in found["topk"]
            if r["variant"] != "read"
        ]
        head = ["top-k with log-sum-exp, one thread", "variant", "faster than torch", "time / one read", "spread"]
        parts.append(_table(head, rows))
    if found["cache"]:
        rows = [
            [r["case"], r["variant"], f"{r['bytes_per_token']:.0f}",
             "" if r["tokens_per_second"] is None else f"{r['tokens_per_second'] / 1e6:.2f} M"]
            for r in found["cache"]
        ]  # fmt: skip
        parts.append(_table(["cache", "variant", "bytes a token", "tokens/s decoded, one thread"], rows))
    m = found["machine"]
    made = f"Made on {m['cpu']}, {m['cores']} cores ({m['capability']}), torch {m['torch']}, potstill {m['potstill']}."
    return "\n\n".join([*parts, made])


def save(found: Row, out: Path) -> None:
    """bench.json, and a CSV for each section."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.json").write_text(json.dumps(found, indent=1))
    for name in ("losses", "topk", "cache"):
        if found[name]:
            with open(out / f"{name}.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, list(found[name][0]))
                writer.writeheader()
                writer.writerows(found[name])


def write_docs(found: Row, root: Path) -> None:
    """Replace what stands between the marks in README.md and docs/performance.md."""
    for file in (root / "README.md", root / "docs" / "performance.md"):
        text = file.read_text()
        if any(mark not in text for mark in MARK):
            raise ValueError(f"{file} has no {MARK[0]} ... {MARK[1]} to write between")
        before, rest = text.split(MARK[0], 1)
        file.write_text(before + MARK[0] + "\n" + tables(found) + "\n" + MARK[1] + rest.split(MARK[1], 1)[1])
