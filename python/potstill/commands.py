"""The commands around a cache: convert, merge, split, card."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from potstill.cli import AS_JSON, CACHE, show

FORMATS = ["cache", "parquet", "arrow", "jsonl", "safetensors", "tar", "distillkit"]
LAYOUTS = ["potstill", "axolotl", "trl"]
SOURCE = click.argument("source", type=click.Path(exists=True, path_type=Path))
TARGET = click.argument("target", type=click.Path(path_type=Path))
SHARD_BYTES = click.option(
    "--shard-bytes", type=click.IntRange(1), default=64 << 20, show_default=True, help="Size of the new cache's shards."
)


@click.command()
@SOURCE
@TARGET
@click.option("--from", "read_as", type=click.Choice(FORMATS), help="Format of SOURCE, where its name does not tell.")
@click.option("--to", "write_as", type=click.Choice(FORMATS), help="Format of TARGET, where its name does not tell.")
@click.option("--layout", type=click.Choice(LAYOUTS), default="potstill", show_default=True,
              help="Column names of a Parquet, Arrow or JSON lines table.")  # fmt: skip
@click.option("--vocab-size", type=int, help="Vocabulary of a file that does not say it.")
@click.option("--k", type=int, help="Most entries of a row, instead of those of the source.")
@click.option("--values", help='How the new cache stores log-probabilities: "1/16", "fp32", ... (see Spec).')
@click.option("--teacher", help="Name of the teacher, kept in the new cache.")
@click.option("--tokenizer", help="Name or hash of the tokenizer, kept in the new cache.")
@click.option("--rounded", is_flag=True,
              help="The source was made from a cache: rounding may have lifted a row's mass above 1.")  # fmt: skip
@SHARD_BYTES
@AS_JSON
def convert(source: Path, target: Path, as_json: bool, **options: Any) -> None:
    """Write the cache SOURCE as another file, or a file as the new cache TARGET.

    Formats go by content and suffix: a cache folder, .parquet, .arrow, .jsonl, .safetensors, .tar (an npz for each
    sequence), a DistillKit dataset (a folder with compression_config.yaml). TARGET appears whole or not at all.
    """
    from potstill.cache.exchange.convert import convert

    show(convert(source, target, **options), as_json)


@click.command()
@click.argument("sources", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@TARGET
@AS_JSON
def merge(sources: tuple[Path, ...], target: Path, as_json: bool) -> None:
    """Put the caches SOURCES, all of one spec, into the new cache TARGET: their shards byte for byte, checked."""
    from potstill.cache.exchange.parts import merge

    show(merge(sources, target), as_json)


@click.command()
@CACHE
@click.argument("targets", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--weights", help='Shares of the targets, "9,1"; equal without it. A sequence goes by its key alone.')
@click.option("--keys", "key_file", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="File with a key a line: the sequences of the first target; a second gets the rest.")  # fmt: skip
@SHARD_BYTES
@AS_JSON
def split(
    path: Path, targets: tuple[Path, ...], weights: str | None, key_file: Path | None, shard_bytes: int, as_json: bool
) -> None:
    """Divide the sequences of the cache PATH among the new caches TARGETS, rows exactly as stored."""
    from potstill.cache.exchange.parts import split

    try:
        shares = None if weights is None else [float(w) for w in weights.split(",")]
    except ValueError:
        raise click.BadParameter(f"{weights!r} is not a list of numbers like 9,1", param_hint="--weights") from None
    keys = None if key_file is None else key_file.read_text(encoding="utf-8").splitlines()
    try:
        done = split(path, targets, weights=shares, keys=keys, shard_bytes=shard_bytes)
    except KeyError as error:
        raise click.ClickException(str(error.args[0])) from None
    if as_json:
        click.echo(json.dumps(done))
    else:
        for part in done:
            click.echo(f"{part['path']}: {part['sequences']:,} sequences, {part['tokens']:,} tokens")


@click.command()
@CACHE
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="The file, instead of PATH/README.md.")
@click.option("--title", default="", help="Name of the data set, instead of the folder's.")
@click.option("--license", default="", help="Licence, as dataset hubs name it: apache-2.0, ...")
@click.option("--language", default="", help="Languages, as codes: en,de")
@click.option("--text", type=click.File(encoding="utf-8"), help="File with Markdown to put first.")
@click.option("--overwrite", is_flag=True, help="Replace a card that is there.")
def card(path: Path, out: Path | None, text: Any, overwrite: bool, **words: Any) -> None:
    """Write a dataset card for the cache in the folder PATH: README.md with a YAML header, from what the cache says."""
    from potstill.cache.exchange.card import card

    out = out or path / "README.md"
    if os.path.lexists(out) and not overwrite:
        raise click.ClickException(f"{out} exists; give --overwrite or --out")
    made = card(path, text=text.read() if text else "", **words)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        part.write_text(made, encoding="utf-8")
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    click.echo(str(out))


@click.command()
@CACHE
@click.argument("url")
@AS_JSON
def push(path: Path, url: str, as_json: bool) -> None:
    """Upload the cache in the folder PATH to s3://, gs:// or az:// URL: what is missing there, manifest last.

    Credentials and endpoint come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...). A cache that grew is
    pushed again; another cache at URL is refused.
    """
    from potstill.cache.remote import push

    show(push(path, url), as_json)
