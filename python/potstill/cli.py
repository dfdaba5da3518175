"""The `potstill` command: a table of subcommands, each imported when called; `--help` never imports torch."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from potstill import __version__

# name -> (module:attribute, one line for --help); the order is the order of a project
COMMANDS = {
    "build": ("potstill.capture.command:build", "Write a teacher's top-k log-probabilities over a corpus."),
    "score": ("potstill.capture.score:score", "Write the log-probabilities of a text's own tokens under a model."),
    "plan": ("potstill.capture.estimate:plan", "Say what a cache of so many tokens costs in time, bytes and files."),
    "inspect": ("potstill.cli:inspect", "Say what a cache holds."),
    "verify": ("potstill.cli:verify", "Check every byte of a cache; exit 1 when something is wrong."),
    "recover": ("potstill.cli:recover", "Keep what is whole of a damaged or interrupted cache."),
    "convert": ("potstill.commands:convert", "Write a cache as another file, or a file as a cache."),
    "merge": ("potstill.commands:merge", "Put several caches into one."),
    "split": ("potstill.commands:split", "Divide a cache among several."),
    "card": ("potstill.commands:card", "Write a dataset card for a cache."),
    "methods": ("potstill.methods.command:methods", "List published methods and the calls that compute them."),
    "push": ("potstill.commands:push", "Upload a cache to an object store."),
    "demo": ("potstill.demo.command:demo", "Distil a small model from a cache and report what was gained."),
    "bench": ("potstill.bench.command:bench", "Measure the kernels and the cache beside their rivals."),
    "doctor": ("potstill.cli:doctor", "Say what was built, what the machine has, which kernels serve it."),
}


class LazyGroup(click.Group):
    """Lists COMMANDS without importing them and turns the library's errors into one line on stderr."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        if os.environ.get("POTSTILL_TRACEBACK") == "1":
            return super().invoke(ctx)
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            raise missing(error) from error
        except BrokenPipeError:
            raise
        except MemoryError as error:
            raise click.ClickException(
                f"not enough memory: {printable(str(error) or 'an allocation failed')}"
            ) from error
        except (ValueError, OSError) as error:
            raise click.ClickException(printable(str(error))) from error


def printable(text: str) -> str:
    """Text of a stranger's file for a terminal: what could steer it (escape sequences, direction marks) as escapes."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def missing(error: ModuleNotFoundError) -> click.ClickException:
    """What to say of a missing optional package: the extra that brings it. Any other is raised as it is."""
    from potstill.doctor import EXTRAS

    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        raise error
    return click.ClickException(f"this needs {package}: pip install 'potstill[{EXTRAS[package]}]'")


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="potstill")
def main() -> None:
    """LLM distillation that is cheap to run: teacher caches, fused losses.

    An error is one line; with POTSTILL_TRACEBACK=1 in the environment it comes with where it was raised.
    """


CACHE = click.argument("path", type=click.Path(exists=True, file_okay=False, path_type=Path))
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


HEAD = ("path", "spec", "sequences", "tokens", "bytes")  # what `inspect` says first


def show(facts: dict[str, Any], as_json: bool) -> None:
    """A dict as JSON or as aligned lines."""
    if as_json:
        click.echo(json.dumps(facts, indent=2, default=str))
        return
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        if isinstance(value, float):
            value = f"{value:,.2f}"
        elif isinstance(value, int) and not isinstance(value, bool):
            value = f"{value:,}"
        elif isinstance(value, dict):
            value = ", ".join(f"{k}={v}" for k, v in value.items())
        click.echo(printable(f"{name.replace('_', ' '):<{width}}  {value}"))


@click.command()
@CACHE
@click.option("--rows", type=click.IntRange(0), default=8192, show_default=True,
              help="Rows to look at, spread evenly; 0 for none.")  # fmt: skip
@click.option("--against", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="A cache of the same sequences, fp32 say: how far this one is from it.")  # fmt: skip
@AS_JSON
def inspect(path: Path, rows: int, against: Path | None, as_json: bool) -> None:
    """Say what the cache in the folder PATH holds: its spec, sizes, what its rows look like, how true they are."""
    from potstill import cache
    from potstill.cache import statistics, tools

    facts = tools.inspect_cache(path)
    if rows:
        opened = cache.open(path)
        facts["distributions"] = statistics.distributions(opened, rows)
        if against is not None:
            facts["fidelity"] = statistics.fidelity(opened, against, rows)
    if not as_json:  # one line for all shards, one for each distribution
        shards = facts.pop("shards")
        facts["shards"] = len(shards)
        facts["parts"] = {
            name: sum(s["parts"][name] for s in shards) for name in ("header", "tables", "blocks", "index")
        }
        facts["spec"].pop("columns", None)
        facts["columns"] = {
            c["name"]: f"{c['width']} {c['dtype']} a {c['per']}, {c['bytes']:,} bytes" for c in facts["columns"]
        } or "none"
        found = facts.pop("distributions", {})
        facts |= {
            name: {q: f"{x:.4g}" for q, x in d.items()} if isinstance(d, dict) else d for name, d in found.items()
        }
        facts |= {f"against_{name}": f"{x:.3g}" for name, x in facts.pop("fidelity", {}).items()}
        facts = {name: facts[name] for name in (*HEAD, *facts)}
    show(facts, as_json)


@click.command()
@CACHE
@click.option("--deep", is_flag=True, help="Decode every row too, and check its ids, order, mass and hashes.")
@click.option("--tokenizer", metavar="MODEL",
              help="Is it mine: must be over this tokenizer: a folder, hub name, GGUF file, package:NAME.")  # fmt: skip
@click.option("--teacher", metavar="NAME", help="Is it mine: must name this teacher.")
@AS_JSON
def verify(path: Path, deep: bool, tokenizer: str | None, teacher: str | None, as_json: bool) -> None:
    """Check every byte of the cache in the folder PATH against its checksums, and say whose rows it holds.

    Exit 1 when something is wrong. For a cache from a stranger: --deep --tokenizer MODEL.
    """
    from potstill.cache import tools

    report = tools.verify_cache(path, deep=deep)
    if not (as_json or report.ok or (path / "manifest.json").exists() or (path / "log").exists()):
        tools.inspect_cache(path)  # raises: there is no cache here
    problems = [str(problem) for problem in report.problems]
    facts = {"sequences": report.sequences, "tokens": report.tokens, "bytes": report.bytes}
    spec = tools.inspect_cache(path)["spec"] if report.ok else {}
    says = {name: spec.get(name, "") for name in ("teacher", "teacher_revision", "tokenizer")}
    if not as_json:
        for problem in problems:
            click.echo(printable(problem), err=True)
        sums = ", ".join(f"{value:,} {name}" for name, value in facts.items())
        click.echo(
            f"whole: {sums}" if report.ok else f"damaged: {len(problems)} problem(s) in {sums}", err=not report.ok
        )
        if not report.ok:
            click.echo(printable(f"what is whole of it can be kept: potstill recover {path}"), err=True)
        for name, value in says.items() if report.ok else ():
            click.echo(printable(f"{name.replace('_', ' ')}: {value or 'not said'}"))
    strange = _strange(path, tokenizer, teacher) if report.ok else []
    ok = report.ok and not strange
    if as_json:
        show({"ok": ok, **facts, "says": says, "problems": problems + strange}, True)
    elif report.ok and (tokenizer or teacher):
        for sentence in strange:
            click.echo(printable(sentence), err=True)
        click.echo("not yours" if strange else "yours: it says what you asked for", err=bool(strange))
    sys.exit(0 if ok else 1)


def _strange(path: Path, tokenizer: str | None, teacher: str | None) -> list[str]:
    """Sentences on what the cache says otherwise than is asked."""
    if not (tokenizer or teacher):
        return []
    from potstill import cache
    from potstill.capture.models import load_tokenizer
    from potstill.integrations.checks import differences

    wanted = {"teacher": teacher, "tokenizer": load_tokenizer(tokenizer) if tokenizer else None}
    return list(differences(cache.open(path), wanted).values())


@click.command()
@CACHE
@AS_JSON
def recover(path: Path, as_json: bool) -> None:
    """Keep what is whole of the cache in the folder PATH and say what was lost; a build can go on then."""
    from potstill.cache import tools

    facts = tools.recover_cache(path)
    names = {
        "files": "files taken from", "sequences": "sequences taken over", "tokens": "tokens in them",
        "known": "were in the cache already",
    }  # fmt: skip
    show(facts if as_json else {line: facts[name] for name, line in names.items()}, as_json)
    for line in [] if as_json else facts["lost"]:
        click.echo(printable(f"lost: {line}"))


@click.command()
@click.option("--reasons", is_flag=True, help="What each backend answers to each kind of tensor, and why not.")
@AS_JSON
def doctor(reasons: bool, as_json: bool) -> None:
    """Say what was built, what this machine has, and which backend serves each operation on the CPU and on CUDA.

    Exit 1 when an extension is missing that the package needs, or when an op has no backend.
    """
    from potstill import doctor as check

    sys.exit(check.report(as_json, reasons))


if __name__ == "__main__":
    main()
