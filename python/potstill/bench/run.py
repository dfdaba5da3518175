"""Runs the benchmarks and writes what they returned: CSV, JSON, and the tables of the docs."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from potstill.bench import cache, cache_rows, fidelity, losses, objectives, plots, records, rivals, sweeps, topk, xtok
from potstill.bench.cases import Shape
from potstill.bench.measure import machine
from potstill.bench.summary import summary
from potstill.bench.tables import fidelity_tables, made_on, tables

Row = dict[str, Any]
Note = Callable[[str], Any]
SECTIONS = (
    "losses",
    "models",
    "threads",
    "ceilings",
    "divergences",
    "precision",
    "memory",
    "topk",
    "cost",
    "cache",
    "xtok",
    "fidelity",
)
MARK = ("<!-- figures: potstill bench --write-docs -->", "<!-- end of figures -->")
CACHE_MARK = ("<!-- figures: potstill bench cache --write-docs -->", "<!-- end of cache -->")
XTOK_MARK = ("<!-- figures: potstill bench xtok --write-docs -->", "<!-- end of two tokenizers -->")
FIDELITY_MARK = ("<!-- fidelity: potstill bench fidelity --write-docs -->", "<!-- end of fidelity -->")


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
    teacher_rows: tuple[Path, ...] = ()

    def times(self, usual: int) -> int:
        return self.repeats or (2 if self.smoke else usual)

    def shapes(self) -> list[Shape]:
        kept = [s for s in (losses.SMOKE if self.smoke else losses.SHAPES) if not self.dtypes or s.dtype in self.dtypes]
        return [replace(s, rows=self.rows or s.rows, vocab=self.vocab or s.vocab) for s in kept]


def run(what: str, plan: Plan, note: Note, after: Callable[[Row], Any] = lambda found: None) -> Row:
    """{"machine": ..., section: [row]}; a section that was not asked for is empty.

    after(what was found so far) is called after every section and every case of the losses: a benchmark cut short
    leaves its figures.
    """
    found: Row = {"machine": {**machine(), "rivals": rivals.versions()}, **{name: [] for name in SECTIONS}}
    before = torch.get_num_threads()
    torch.set_num_threads(plan.threads or before)
    if what in ("losses", "all"):
        for shape in plan.shapes():
            note(f"losses: {losses.title(shape)}")
            found["losses"] += losses.rows(
                shape, repeats=plan.times(5), compiled=not plan.smoke, limit=plan.limit, peaks=not plan.smoke, note=note
            )
            after(found)
    if what in ("models", "all"):
        found["models"] = sweeps.models(smoke=plan.smoke, repeats=plan.times(5), limit=plan.limit, note=note)
        after(found)
    if what in ("threads", "all"):
        found["threads"] = sweeps.threads(smoke=plan.smoke, repeats=plan.times(5), limit=plan.limit, note=note)
        found["ceilings"] = sweeps.ceilings(smoke=plan.smoke, repeats=plan.times(5))
        after(found)
    if what in ("divergences", "all"):
        for shape in plan.shapes():
            if shape.dtype == "float32":
                note(f"divergences: {losses.title(shape)}")
                found["divergences"] += objectives.divergence_rows(shape, repeats=plan.times(5))
        after(found)
    if what in ("precision", "all"):
        note("precision: bf16 near convergence")
        found["precision"] = objectives.precision_rows(**(dict(vocab=2_000, rows=16) if plan.smoke else {}))
        after(found)
    if what in ("memory", "all"):
        for shape in plan.shapes():
            if shape.dtype == "float32":
                note(f"memory: {losses.title(shape)}")
                narrow = replace(shape, hidden=64, teacher_hidden=64 if shape.teacher_hidden else 0)
                lengths = (shape.rows,) if plan.smoke else (512, 2048)
                found["memory"] += objectives.memory_rows(narrow, lengths, compiled=not plan.smoke, note=note)
        after(found)
    if what in ("fidelity", "all"):
        reason = fidelity.missing()
        note(f"fidelity: skipped, {reason}" if reason else "fidelity: SmolLM2 on held-out text")
        found["fidelity"] = [] if reason else fidelity.figures(smoke=plan.smoke)
        after(found)
    if what in ("topk", "all"):
        torch.set_num_threads(1)
        note("topk")
        found["topk"] = topk.figures(smoke=plan.smoke, repeats=plan.times(7))
        found["cost"] = topk.cost(smoke=plan.smoke, repeats=plan.times(7))
        after(found)
    if what in ("xtok", "all"):
        torch.set_num_threads(1)
        note("xtok")
        found["xtok"] = xtok.figures(smoke=plan.smoke, repeats=plan.times(5), note=note)
        after(found)
    torch.set_num_threads(before)
    if what in ("cache", "all"):
        for path in cache_rows.sources(plan.teacher_rows, plan.smoke, note):
            note(f"cache: {path}")
            found["cache"] += cache.figures(cache_rows.load(path), repeats=plan.times(7), note=note)
        after(found)
    return found


def with_earlier(found: Row, out: Path) -> Row:
    """`found`, its empty sections filled from out/bench.json of the same machine and versions.

    Of the losses each case stands for itself: a run of one dtype leaves the cases of the others.
    """
    path = out / "bench.json"
    earlier = json.loads(path.read_text()) if path.is_file() else {}
    if earlier.get("machine") != json.loads(json.dumps(found["machine"])):
        return found
    merged = {name: value or earlier.get(name, value) for name, value in found.items()}
    measured = {row["case"] for row in found["losses"]}
    before = [row for row in earlier.get("losses", []) if row["case"] not in measured]
    return {**merged, "losses": sorted(before + found["losses"], key=lambda row: row["dtype"], reverse=True)}


def keep(found: Row, out: Path) -> None:
    """bench.json alone, which a later run takes the other sections from."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.json").write_text(json.dumps(found, indent=1))


def save(found: Row, out: Path) -> None:
    """bench.json, a CSV for each section, records.csv of all of them in long form, and plots."""
    keep(found, out)
    for name in SECTIONS:
        write_csv(out / f"{name}.csv", found[name])
    write_csv(out / "records.csv", records.records(found))
    if importlib.util.find_spec("matplotlib") is not None:
        plots.draw(found, out / "plots")


def write_csv(path: Path, rows: list[Row]) -> None:
    if rows:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)


def write_docs(found: Row, root: Path) -> None:
    """Write the tables between the marks of the docs, the short ones into README.md, and draw docs/plots."""
    docs = root / "docs"
    readme, performance, machine = root / "README.md", docs / "performance.md", found["machine"]
    apart = ("cache", "xtok", "fidelity")  # have marks of their own: a run of these alone leaves the other figures
    alone = any(found.get(name) for name in apart)
    if not alone or any(value for name, value in found.items() if name not in (*apart, "machine")):
        between(readme, MARK, f"{summary({**found, 'cache': []})}\n\n{made_on(found)}")
        between(performance, MARK, tables({**found, **{name: [] for name in apart}}))
    for name, marks in {"cache": CACHE_MARK, "xtok": XTOK_MARK}.items():
        if found.get(name):
            between(performance, marks, tables({"machine": machine, name: found[name]}))
    if found.get("cache"):
        between(readme, CACHE_MARK, f"{summary({'cache': found['cache']})}\n\n{made_on(found)}")
    if found.get("fidelity"):
        between(docs / "which-k.md", FIDELITY_MARK, fidelity_tables(found))
    if importlib.util.find_spec("matplotlib") is not None:
        plots.draw(found, docs / "plots")


def between(file: Path, marks: tuple[str, str], text: str) -> None:
    """Replace what stands between two marks of a file."""
    old = file.read_text()
    if any(mark not in old for mark in marks):
        raise ValueError(f"{file} has no {marks[0]} ... {marks[1]} to write between")
    before, rest = old.split(marks[0], 1)
    file.write_text(before + marks[0] + "\n" + text + "\n" + marks[1] + rest.split(marks[1], 1)[1])
