"""`potstill methods`, and the tables of docs/methods.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from potstill.methods.papers import FAMILIES, Row, catalog, counts

BEGIN, END = "<!-- catalog: potstill methods --write-docs -->", "<!-- end of catalog -->"


def summary() -> str:
    """The count, as a sentence."""
    n = counts()
    return (
        f"{n['rows']} papers: {n['runnable']} runnable ({n['whole']} whole, {n['part']} in part), "
        f"{n['out of scope']} out of scope."
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _line(r: Row) -> str:
    calls = "<br>".join(f"`{name}`" for name in r.names) or "-"
    cells = [str(r.number), f"{r.paper} ({r.source})", calls, r.status, r.formula, r.knowledge, r.note]
    return "| " + " | ".join(map(_cell, cells)) + " |"


def markdown() -> str:
    """The catalog as one table a family."""
    parts = [summary()]
    for family, title in FAMILIES.items():
        rows = [r for r in catalog() if r.family == family]
        head = "| # | paper | call | status | formula | how well it is known | left out, or to mind |"
        parts.append(f"## {family}. {title}\n\n{head}\n|{' --- |' * 7}\n" + "\n".join(map(_line, rows)))
    return "\n\n".join(parts)


def write_docs(path: Path) -> None:
    """Put the tables between the markers of a Markdown file. Raises ValueError where it has none."""
    text = path.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{path} lacks the lines {BEGIN!r} and {END!r}, between which the tables go")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n{markdown()}\n{END}{after}", encoding="utf-8")


def fields(r: Row) -> dict[str, Any]:
    """A row for programs."""
    found = {name: getattr(r, name) for name in ("number", "paper", "source", "family", "formula", "knowledge")}
    return {**found, "status": r.status, "note": r.note, "calls": list(r.names)}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
@click.option(
    "--write-docs", "docs", is_flag=False, flag_value="docs/methods.md", default=None, metavar="[FILE]",
    type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Put the tables into FILE (docs/methods.md).",
)  # fmt: skip
def methods(as_json: bool, docs: Path | None) -> None:
    """List published distillation methods, the call under potstill.methods that computes each, and what is left out."""
    if docs is not None:
        write_docs(docs)
        click.echo(f"{docs}: {summary()}")
        return
    if as_json:
        click.echo(json.dumps([fields(r) for r in catalog()], indent=2))
        return
    for family, title in FAMILIES.items():
        click.echo(f"\n{family}. {title}")
        for r in (r for r in catalog() if r.family == family):
            name = r.paper if len(r.paper) <= 44 else r.paper[:43] + "…"
            click.echo(f"{r.number:>4}  {name:<44}  {r.status:<12}  {', '.join(r.names) or r.note}")
    click.echo("\n" + summary())
