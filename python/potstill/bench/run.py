"""Runs the benchmarks and writes what they returned: CSV, JSON, and the tables of the docs."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from potstill.bench import cache, losses, objectives, rivals, topk, xtok
from potstill.bench.cases import Shape
from potstill.bench.measure import machine
from potstill.bench.tables import tables

Row = dict[str, Any]
SECTIONS = ("losses", "divergences", "precision", "memory", "topk", "cache", "xtok")
MARK = ("<!-- figures: potstill bench --write-docs -->", "<!-- end of figures -->")


@dataclass(frozen=True)
class Plan:
    """What to run. rows and vocab replace those of the loss shapes, dtypes keeps some of them; limit is in seconds."""

    smoke: bool = False
    threads: int | None = None
    rows: int | None = None
    vocab: int | None = None
    dtypes: tuple[str, ...] = ()
    limit: float = 30.0
    repeats: int | None = None
    cache_path: Path = Path("out/demo/cache")

    def times(self, usual: int) -> int:
        return self.repeats or (2 if self.smoke else usual)

    def shapes(self) -> list[Shape]:
        kept = [s for s in (losses.SMOKE if self.smoke else losses.SHAPES) if not self.dtypes or s.dtype in self.dtypes]
        return [replace(s, rows=self.rows or s.rows, vocab=self.vocab or s.vocab) for s in kept]


def run(what: str, plan: Plan, note: Callable[[str], Any]) -> Row:
    """{"machine": ..., section: [row]}; a section that was not asked for is empty."""
    found: Row = {"machine": {**machine(), "rivals": rivals.versions()}, **{name: [] for name in SECTIONS}}
    before = torch.get_num_threads()
    torch.set_num_threads(plan.threads or before)
    if what in ("losses", "all"):
        for shape in plan.shapes():
            note(f"losses: {losses.title(shape)}")
            found["losses"] += losses.rows(
                shape, repeats=plan.times(5), compiled=not plan.smoke, limit=plan.limit, peaks=True, note=note
            )
    if what in ("divergences", "all"):
        for shape in plan.shapes():
            if shape.dtype == "float32":
                note(f"divergences: {losses.title(shape)}")
                found["divergences"] += objectives.divergence_rows(shape, repeats=plan.times(5))
    if what in ("precision", "all"):
        note("precision: bf16 near convergence")
        found["precision"] = objectives.precision_rows(**(dict(vocab=2_000, rows=16) if plan.smoke else {}))
    if what in ("memory", "all"):
        for shape in plan.shapes():
            if shape.dtype == "float32":
                note(f"memory: {losses.title(shape)}")
                narrow = replace(shape, hidden=64, teacher_hidden=64 if shape.teacher_hidden else 0)
                lengths = (shape.rows,) if plan.smoke else (512, 2048)
                found["memory"] += objectives.memory_rows(narrow, lengths, compiled=not plan.smoke, note=note)
    if what in ("topk", "all"):
        torch.set_num_threads(1)
        note("topk")
        found["topk"] = topk.figures(smoke=plan.smoke, repeats=plan.times(7))
    if what in ("xtok", "all"):
        torch.set_num_threads(1)
        note("xtok")
        found["xtok"] = xtok.figures(smoke=plan.smoke, repeats=plan.times(5), note=note)
    torch.set_num_threads(before)
    if what in ("cache", "all"):
        if plan.cache_path.is_dir():
            note(f"cache: {plan.cache_path}")
            found["cache"] = cache.figures(plan.cache_path, repeats=plan.times(5))
        else:
            note(f"cache: skipped, {plan.cache_path} is not there; `potstill demo` writes it, --cache names another")
    return found


def with_earlier(found: Row, out: Path) -> Row:
    """`found`, its empty sections filled from out/bench.json of the same machine and versions."""
    path = out / "bench.json"
    earlier = json.loads(path.read_text()) if path.is_file() else {}
    if earlier.get("machine") != json.loads(json.dumps(found["machine"])):
        return found
    return {name: value or earlier.get(name, value) for name, value in found.items()}


def save(found: Row, out: Path) -> None:
    """bench.json, and a CSV for each section."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.json").write_text(json.dumps(found, indent=1))
    for name in SECTIONS:
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
