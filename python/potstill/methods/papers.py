"""The catalog of published methods: which call computes what a paper trains, and how well its formula is known.

Rows are entered by `@row(...)` above the recipes in methods/recipes/; what trains nothing is entered in
recipes/outside.py. docs/methods.md is written from here by `potstill methods --write-docs`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

CODE = "read in the authors' code"
PAPER = "read in the paper"
SECOND_HAND = "second hand"
MEMORY = "from memory"
ABSTRACT = "the abstract alone"
KNOWLEDGE = (CODE, PAPER, SECOND_HAND, MEMORY, ABSTRACT)
STATUS = ("whole", "part", "out of scope")

FAMILIES = {
    "A": "Token distributions of language models",
    "B": "Embeddings, relations, hidden states and averaged teachers",
    "C": "Preferences, rankings and selection",
    "D": "Text and labels: weighted cross-entropy",
    "E": "Out of scope",
}
MODULES = ("logits", "layers", "embeddings", "encoders", "preferences", "text", "outside")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Row:
    """One paper. number: its place, from 1.  source: arXiv number or title.  family: a key of FAMILIES.

    formula: what the calls compute, as plain text.  knowledge: how well that is known, one of KNOWLEDGE, or of its
    parts, "; "-separated.  status: one of STATUS, of the paper's objective (or rule of selection), not of its system.
    note: what is left out and why, or what to mind.  calls: functions of `potstill.methods.recipes`, the first the
    main one.
    """

    number: int
    paper: str
    source: str
    family: str
    formula: str
    knowledge: str
    status: str
    note: str = ""
    calls: tuple[Callable[..., Any], ...] = field(default=())

    @property
    def runnable(self) -> bool:
        return self.status != "out of scope"

    @property
    def names(self) -> tuple[str, ...]:
        """The calls as they are written under potstill.methods: "recipes.logits.interpolated_target"."""
        return tuple(f"{f.__module__.removeprefix('potstill.methods.')}.{f.__name__}" for f in self.calls)


_TABLE: dict[int, Row] = {}


def enter(new: Row) -> None:
    """Raises ValueError on a number twice, an unknown family, status or knowledge."""
    if new.number in _TABLE:
        raise ValueError(f"row {new.number} is {_TABLE[new.number].paper!r} already, not {new.paper!r}")
    if new.family not in FAMILIES or new.status not in STATUS:
        raise ValueError(f"row {new.number}: family {new.family!r} or status {new.status!r} is not known")
    if not any(known in new.knowledge for known in KNOWLEDGE):
        raise ValueError(f"row {new.number}: knowledge {new.knowledge!r} names none of {KNOWLEDGE}")
    if new.runnable != bool(new.calls):
        raise ValueError(f"row {new.number}: a row has calls unless it is out of scope")
    _TABLE[new.number] = new


def row(
    number: int, paper: str, source: str, *, family: str, formula: str, knowledge: str, status: str = "whole",
    note: str = "", also: tuple[Callable[..., Any], ...] = (),
) -> Callable[[F], F]:  # fmt: skip
    """Enter the decorated recipe, and `also` others, as the calls of a paper; their docstrings then name the paper."""

    def enter_row(recipe: F) -> F:
        calls: tuple[Callable[..., Any], ...] = (recipe, *also)
        enter(Row(number, paper, source, family, formula, knowledge, status, note, calls))
        for call in calls:
            said = f"{paper} ({source}). Formula: {knowledge}." + (f" {note}" if note and call is recipe else "")
            call.__doc__ = f"{inspect.cleandoc(call.__doc__ or '')}\n\n{said}"
        return recipe

    return enter_row


def catalog() -> list[Row]:
    """Every row, by number."""
    for name in MODULES:
        importlib.import_module(f"potstill.methods.recipes.{name}")
    return [_TABLE[number] for number in sorted(_TABLE)]


def counts() -> dict[str, int]:
    """How many rows are runnable and out of scope, and how many of the runnable ones are whole and part."""
    rows = catalog()
    by = {status: sum(r.status == status for r in rows) for status in STATUS}
    return {"rows": len(rows), "runnable": sum(r.runnable for r in rows), **by}
