"""The part of `potstill build` that asks a server: its options, and the run."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import click

from .plan import Shard

KINDS = ("vllm", "sglang", "openai")


def server_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of --server to a click command."""
    options = [
        click.option("--server", metavar="URL", help="Ask a server for MODEL's rows instead of loading it."),
        click.option("--server-kind", type=click.Choice(KINDS), help="What answers at --server."),
        click.option("--concurrency", default=16, show_default=True, help="Requests open at a time (--server)."),
        click.option("--timeout", default=600.0, show_default=True, help="Longest silence in seconds (--server)."),
        click.option("--attempts", default=8, show_default=True, help="Tries of a request (--server)."),
        click.option(
            "--max-invalid",
            default=0.0,
            show_default=True,
            help="Share of a sequence's rows that may be unusable; sequences with more are left out (--server).",
        ),
        click.option("--vocab-size", type=int, help="Columns of the teacher's head (--server; default: its config's)."),
        click.option(
            "--api-key-env",
            metavar="NAME",
            help="Environment variable that holds the server's key (default: OPENAI_API_KEY when set).",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def check(o: dict[str, Any]) -> None:
    """Refuses what does not go together, before anything is loaded."""
    if (o["server"] is None) != (o["server_kind"] is None):
        raise ValueError(f"--server and --server-kind go together: the kinds are {', '.join(KINDS)}")
    if o["server"] is None:
        return
    if any(t != 1 for t in o["temperatures"]):
        raise ValueError("--temperature needs the teacher's logits: a server gives rows at temperature 1 alone")
    if o["api_key_env"] and not os.environ.get(o["api_key_env"]):
        raise ValueError(f"--api-key-env names {o['api_key_env']}, which is not set")
    if o["concurrency"] < 1 or o["attempts"] < 1 or o["timeout"] <= 0:
        raise ValueError("--concurrency and --attempts must be at least 1, --timeout above 0")


def run(model: str, texts: Any, out: str, o: dict[str, Any], mine: Shard) -> Any:
    """The part `mine` of the build from --server; its `ServerReport`."""
    from ..integrations.servers.http import Client, Retry
    from ..integrations.servers.openai import TokenStrings
    from .models import load_tokenizer
    from .server import RowServer, build_from_server

    key = os.environ.get(o["api_key_env"] or "OPENAI_API_KEY")
    client = Client(
        o["server"],
        timeout=o["timeout"],
        retry=Retry(attempts=o["attempts"]),
        headers={"Authorization": f"Bearer {key}"} if key else {},
    )
    tokenizer = load_tokenizer(o["tokenizer"] or model, revision=None if o["tokenizer"] else o["revision"])
    vocab_size = o["vocab_size"] or _vocab_size(o["tokenizer"] or model, tokenizer)
    strings = TokenStrings.from_tokenizer(tokenizer, vocab_size) if o["server_kind"] == "openai" else None
    return build_from_server(
        RowServer(client, o["server_kind"], model, strings),
        tokenizer,
        texts,
        out,
        vocab_size=vocab_size,
        k=o["k"],
        length=o["length"],
        pack=o["pack"],
        values=o["values"],
        min_mass=o["min_mass"],
        max_invalid=o["max_invalid"],
        concurrency=o["concurrency"],
        max_tokens=o["max_tokens"],
        add_special_tokens=not o["no_special_tokens"],
        shard_bytes=o["shard_mb"] << 20,
        commit_seconds=o["commit_seconds"],
        shard=mine,
        teacher_revision=o["revision"] or "",
        progress=not o["quiet"] and mine.rank == 0,
    )


def show(report: Any) -> None:
    """What the server's rows were like, after the lines that every build prints."""
    from .server import describe

    click.echo(f"server: {report.requests:,} requests, {report.retries:,} of them again; {report.short:,} short rows")
    if report.problems:
        click.echo(f"unusable {describe(report.problems)}; {report.left_out:,} sequences left out", err=True)


def _vocab_size(model: str, tokenizer: Any) -> int:
    """Columns of the head, padding included, as the configuration beside the tokenizer says; else the tokenizer's
    length.
    """
    from transformers import AutoConfig

    from .models import locate

    where, gguf = locate(model)
    try:
        config = AutoConfig.from_pretrained(where, **({"gguf_file": gguf} if gguf else {}))
        return int(config.get_text_config().vocab_size)
    except (OSError, ValueError, KeyError, AttributeError):
        return len(tokenizer)
