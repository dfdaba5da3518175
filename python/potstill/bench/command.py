"""The click command `potstill bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

WHAT = ["losses", "models", "threads", "divergences", "precision", "memory", "topk", "cache", "xtok", "fidelity", "all"]
NOTHING = "none"


@click.command()
@click.argument("what", type=click.Choice([*WHAT, NOTHING]), default="all")
@click.option("--smoke", is_flag=True, help="Small shapes, two rounds: a check that everything runs, not figures.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/bench"), show_default=True,
              help="Folder for CSV and JSON.")  # fmt: skip
@click.option("--teacher-rows", multiple=True, type=click.Path(exists=True, path_type=Path),
              help="Rows for the cache's section, an npz or an exact cache, instead of the kept and the built ones; "
              "may be given twice.")  # fmt: skip
@click.option("--threads", type=int, default=None, help="Threads of the losses; default: all cores. Top-k runs on one.")
@click.option("--rows", type=int, default=None, help="Rows of the loss shapes, instead of 512.")
@click.option("--vocab", type=int, default=None, help="Vocabulary of the loss shapes, instead of 151,936.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(["float32", "bfloat16", "float16"]),
              help="Only the loss shapes of this dtype; may be given twice.")  # fmt: skip
@click.option("--limit", type=float, default=30.0, show_default=True,
              help="Seconds: a variant one call of which takes longer is left out.")  # fmt: skip
@click.option("--repeats", type=int, default=None, help="Rounds, instead of 5 (top-k and the cache: 7).")
@click.option("--write-docs", is_flag=True, help="Put the tables into docs/performance.md and README.md.")
def bench(what: str, out: Path, write_docs: bool, **options: Any) -> None:
    """Measure losses, top-k, the cache and alignment beside their rivals, interleaved, after a check of the results.

    Liger-Kernel and TRL are measured where they are installed (pip install "potstill[rivals]"). Sections that are not
    run keep their figures of the last run into --out; bench.json there is written after every section;
    "none" measures nothing and makes tables and plots of that file.
    """
    from potstill.bench import run

    def keep(found: dict[str, Any]) -> None:
        run.keep(run.with_earlier(found, out), out)

    if what == NOTHING:
        if not (out / "bench.json").is_file():
            raise click.ClickException(
                f"{out} holds no bench.json; `potstill bench --out {out}` measures and writes one"
            )
        results = json.loads((out / "bench.json").read_text())
    else:
        results = run.with_earlier(run.run(what, run.Plan(**options), click.echo, keep), out)
    run.save(results, out)
    click.echo(run.tables(results))
    if write_docs:
        run.write_docs(results, Path("."))
