"""The click command `potstill bench`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("what", type=click.Choice(["losses", "topk", "cache", "all"]), default="all")
@click.option("--smoke", is_flag=True, help="Small shapes, two rounds: a check that everything runs, not figures.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("out/bench"),
    show_default=True,
    help="Folder for CSV and JSON.",
)
@click.option("--cache", "cache_path", type=click.Path(path_type=Path), default=Path("out/demo/cache"),
              show_default=True, help="The cache to measure; `potstill demo` writes this one.")  # fmt: skip
@click.option(
    "--threads", type=int, default=None, help="Threads of the loss benchmark; default: all cores. Top-k runs on one."
)
@click.option("--write-docs", is_flag=True, help="Put the tables into docs/performance.md and README.md.")
def bench(what: str, smoke: bool, out: Path, cache_path: Path, threads: int | None, write_docs: bool) -> None:
    """Measure losses, top-k and the cache beside their rivals, interleaved, after a check of the results."""
    from potstill.bench import run

    results = run.run(what, smoke=smoke, cache_path=cache_path, threads=threads, note=click.echo)
    run.save(results, out)
    click.echo(run.tables(results))
    if write_docs:
        run.write_docs(results, Path("."))
