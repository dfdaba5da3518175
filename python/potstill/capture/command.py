"""`potstill build`: the command line of `potstill.capture.build`, and of its like for servers."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import click

from . import server_command
from .plan import Shard

SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")


@click.command()
@click.argument("model")
@click.argument("data", nargs=-1, required=True, type=click.Path())
@click.argument("out", type=click.Path(file_okay=False))
@click.option("--k", default=64, show_default=True, help="Entries kept per token.")
@click.option("--length", default=1024, show_default=True, help="Tokens per sequence.")
@click.option(
    "--pack/--split",
    default=True,
    show_default=True,
    help="Fill rows across documents, or cut each document into pieces.",
)
@click.option(
    "--values", default="1/16", show_default=True, help="Grid of the log-probabilities in nats, or fp16, fp32."
)
@click.option(
    "--min-mass", default=1.0, show_default=True, help="Keep the fewest entries that hold this probability (top-p)."
)
@click.option(
    "--temperature",
    "temperatures",
    multiple=True,
    type=float,
    help="Keep the mass of the rest at this temperature too, so that a loss can use it (repeatable).",
)
@click.option(
    "--xtok",
    is_flag=True,
    help="For students of any tokenizer: each token's log-probability, the mass of word ends, and no entries.",
)
@click.option("--batch-size", default=8, show_default=True, help="Sequences per forward pass.")
@click.option("--max-tokens", type=int, help="Stop before the sequence that would pass this many tokens.")
@click.option("--text-field", default="text", show_default=True, help="Field of the text in JSONL and datasets.")
@click.option(
    "--suffix",
    "suffixes",
    multiple=True,
    help=f"Read files that end so inside folders (repeatable; default {' '.join(SUFFIXES)}).",
)
@click.option("--tokenizer", help="Folder or hub name of the tokenizer, when it does not lie with the model.")
@click.option("--no-special-tokens", is_flag=True, help="Do not let the tokenizer add its own special tokens.")
@click.option("--revision", help="Branch, tag or commit of a model on the hub.")
@click.option("--trust-remote-code", is_flag=True, help="Let the model run the code it carries.")
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
)
@click.option("--device", help="cpu, cuda, cuda:1, ... (default: cuda when there is one).")
@click.option(
    "--shard",
    metavar="I/N",
    help="Build part I of N, I from 0 (default: what torchrun, accelerate, MPI or srun say, else everything).",
)
@click.option("--shard-mb", default=64, show_default=True, help="Size at which a shard is committed.")
@click.option("--commit-seconds", default=300.0, show_default=True, help="Longest time between commits.")
@click.option(
    "--engine",
    default="local",
    show_default=True,
    type=click.Choice(["local", "ray"]),
    help="Build here, or by --workers actors of a Ray cluster that see DATA and OUT (RAY_ADDRESS, else this machine).",
)
@click.option("--workers", default=1, show_default=True, help="Ray actors (--engine ray), with a GPU each.")
@server_command.server_options
@click.option("--quiet", is_flag=True, help="No progress bar.")
def build(model: str, data: tuple[str, ...], out: str, **options: Any) -> None:
    """Write the K most probable next tokens of MODEL over DATA into the cache OUT.

    MODEL is a folder, a hub name, a .gguf file or package:NAME (a Python package that carries a GGUF file).
    DATA is any number of text files, folders, .jsonl files or folders saved by datasets. Run the same command
    again to continue after Ctrl-C or a crash: nothing is repeated and nothing is lost.

    Many processes may fill one OUT at once, under torchrun, accelerate or srun, on a Ray cluster (--engine ray), or
    started by hand with --shard. Another number of processes may continue.

    With --server URL the rows are asked of a running vLLM, SGLang or OpenAI-like server: MODEL is then the name under
    which it serves the teacher, and the tokenizer is loaded from there or from --tokenizer.

    A cache for students of another tokenizer (--xtok) is aligned with theirs as it is loaded.
    """
    if options["xtok"]:
        if options["server"]:
            raise click.ClickException("--xtok needs the model itself: a server does not say where words end")
        from .builder import XTOK

        options |= XTOK
    try:
        finished = _run(model, data, out, options)
    except (ValueError, TypeError, OSError) as e:
        raise click.ClickException(str(e)) from e
    if not finished:
        sys.exit(130)


def _run(model: str, data: tuple[str, ...], out: str, o: dict[str, Any]) -> bool:
    from .plan import rank_and_world
    from .text import open_text

    # Everything that can be refused cheaply is, before torch is imported and the model loaded.
    if o["k"] < (0 if o.get("token_log_probs") else 1) or o["length"] < 1 or o["batch_size"] < 1 or o["shard_mb"] < 1:
        raise ValueError("--k, --length, --batch-size and --shard-mb must be at least 1")
    mine = rank_and_world(o["shard"])
    server_command.check(o)
    _check_engine(o, mine)
    texts = open_text(data, text_field=o["text_field"], suffixes=o["suffixes"] or SUFFIXES)
    with _terminate_as_interrupt():
        if o["engine"] == "ray":
            report = _run_ray(model, data, out, o)
            texts.skipped.extend(report.skipped)
        else:
            run = server_command.run if o["server"] else _run_local
            report = run(model, texts, out, o, mine)
    rate = report.new_tokens / report.seconds if report.seconds else 0.0
    click.echo(
        f"{report.path}: {report.sequences:,} sequences, {report.tokens:,} tokens, {_size(report.bytes)}, "
        f"{report.bytes_per_token:.1f} bytes a token"
    )
    part = f"part {mine.rank}/{mine.world} ({mine.source})" if mine.world > 1 else "this run"
    click.echo(
        f"{part}: {report.new_sequences:,} sequences, {report.new_tokens:,} tokens in "
        f"{report.seconds:.1f} s ({rate:,.0f} tokens/s)"
    )
    if o["server"]:
        server_command.show(report)
    if texts.skipped:
        click.echo(f"left out: {len(texts.skipped)} files that are not UTF-8 (first: {texts.skipped[0]})")
    if not report.finished:
        click.echo("stopped: all of the above is saved; run the same command again to go on", err=True)
    return bool(report.finished)


def _check_engine(o: dict[str, Any], mine: Shard) -> None:
    if o["workers"] < 1 or (o["workers"] > 1 and o["engine"] != "ray"):
        raise ValueError(f"--workers is {o['workers']}: at least 1 is needed, and --engine ray for more than one")
    if o["engine"] == "ray" and (o["server"] or mine.world > 1):
        raise ValueError("--engine ray shares the work itself: it goes with neither --server, --shard nor a launcher")


def _run_local(model: str, texts: Any, out: str, o: dict[str, Any], mine: Shard) -> Any:
    from .builder import build as run_build
    from .models import load_model

    loaded = load_model(model, tokenizer=o["tokenizer"], **_model_options(o))
    return run_build(
        loaded.model,
        loaded.tokenizer,
        texts,
        out,
        shard=mine,
        teacher=loaded.name,
        teacher_revision=loaded.revision,
        progress=not o["quiet"] and mine.rank == 0,
        **_build_options(o),
    )


def _run_ray(model: str, data: tuple[str, ...], out: str, o: dict[str, Any]) -> Any:
    from .models import load_model
    from .text import open_text

    try:
        from ..integrations.ray import build_parts
    except ImportError as e:
        raise ValueError(f"--engine ray needs Ray Data ({e}): pip install 'potstill[ray]'") from e
    # a worker has a working directory of its own, and sees the GPU that is its own alone
    places = tuple(os.path.abspath(d) for d in data)
    model, tokenizer = (os.path.abspath(m) if m and os.path.exists(m) else m for m in (model, o["tokenizer"]))
    device = "cuda" if o["device"] and o["device"].startswith("cuda") else o["device"]
    return build_parts(
        partial(load_model, model, tokenizer=tokenizer, **_model_options(o) | {"device": device}),
        partial(open_text, places, text_field=o["text_field"], suffixes=o["suffixes"] or SUFFIXES),
        out,
        workers=o["workers"],
        num_gpus=None if device is None else float(device == "cuda"),
        **_build_options(o),
    )


def _model_options(o: dict[str, Any]) -> dict[str, Any]:
    return {name: o[name] for name in ("revision", "dtype", "device", "trust_remote_code")}


def _build_options(o: dict[str, Any]) -> dict[str, Any]:
    same = ("k", "length", "pack", "values", "min_mass", "batch_size", "max_tokens", "commit_seconds")
    return {name: o[name] for name in same} | {
        "temperatures": (1.0, *(t for t in o["temperatures"] if t != 1)),
        "token_log_probs": o.get("token_log_probs", False),
        "word_ends": o.get("word_ends", False),
        "add_special_tokens": not o["no_special_tokens"],
        "shard_bytes": o["shard_mb"] << 20,
    }


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """A polite kill (SIGTERM) saves what Ctrl-C would save."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
