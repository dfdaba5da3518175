"""Between caches and other files: which format, which spec, and never half an output."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import potstill.cache as caches
from potstill.cache.exchange.sequence import Sequence, of_cache
from potstill.cache.spec import Spec
from potstill.cache.writer import Writer

# format -> (module, reader, writer, suffix); a folder where there is no suffix
FORMATS: dict[str, tuple[str, str, str, str]] = {
    "parquet": ("tables", "read_parquet", "write_parquet", ".parquet"),
    "arrow": ("tables", "read_arrow", "write_arrow", ".arrow"),
    "jsonl": ("tables", "read_jsonl", "write_jsonl", ".jsonl"),
    "safetensors": ("tensors", "read", "write", ".safetensors"),
    "tar": ("archive", "read", "write", ".tar"),
    "distillkit": ("distillkit", "read", "write", ""),
}
CACHE = "cache"
TABLES = ("parquet", "arrow", "jsonl")


def guess(path: Path) -> str | None:
    """The format of a path by what is there, or by its suffix."""
    if (path / "manifest.json").is_file() or (path / "log").is_dir():
        return CACHE
    if (path / "compression_config.yaml").is_file():
        return "distillkit"
    if path.is_dir():
        return "parquet" if any(path.glob("*.parquet")) else None
    return {suffix: name for name, (*_, suffix) in FORMATS.items() if suffix}.get(path.suffix)


def convert(
    source: Path,
    target: Path,
    *,
    read_as: str | None = None,
    write_as: str | None = None,
    layout: str = "potstill",
    rounded: bool = False,
    shard_bytes: int = 64 << 20,
    **fields: Any,
) -> dict[str, Any]:
    """Converts; one of the two is a cache. Returns {"sequences", "tokens", "format"}.

    read_as, write_as: "cache" or a name of FORMATS; None goes by content and suffix.
    layout: column names of a table, a name of layouts.LAYOUTS.
    rounded: rows of the source come from a cache, whose rounding may have lifted their mass above 1; known of files
        that carry a cache's spec.
    fields: members of the new cache's Spec that replace those of the source; vocab_size is needed where it has none.

    Raises ValueError naming sequence, row and value for what a cache may not hold, and FileExistsError for a target
    that is there.
    """
    read_as = read_as or guess(source)
    write_as = write_as or guess(target) or (CACHE if read_as != CACHE else None)
    for name, path, flag in ((read_as, source, "--from"), (write_as, target, "--to")):
        if name is None:
            raise ValueError(f"{path}: no format can be told from it; {flag} takes one of cache, {', '.join(FORMATS)}")
    if (read_as == CACHE) == (write_as == CACHE):
        raise ValueError(f"{read_as} to {write_as}: one of the two must be a cache")
    free(target)
    if layout != "potstill" and not {read_as, write_as} & set(TABLES):
        raise ValueError(f"--layout {layout} names columns of {', '.join(TABLES)}")
    given = {name: value for name, value in fields.items() if value is not None}
    if write_as == CACHE:
        assert read_as is not None
        found, sequences = reader(read_as)(source, layout)
        done = fill(source, target, found, sequences, given, rounded=rounded or found is not None, size=shard_bytes)
        return {"format": read_as, **done}
    if given:
        raise ValueError(f"{', '.join(given)} is given, but the spec of {source} is what it is")
    assert write_as is not None
    return {"format": write_as, **export(source, target, write_as, layout)}


def reader(name: str) -> Callable[..., tuple[Spec | None, Iterator[Sequence]]]:
    module, read, *_ = FORMATS[name]
    return getattr(importlib.import_module(f"potstill.cache.exchange.{module}"), read)


def fill(
    source: Path,
    target: Path,
    found: Spec | None,
    sequences: Iterator[Sequence],
    given: dict[str, Any],
    *,
    rounded: bool,
    size: int,
) -> dict[str, int]:
    """Writes a new cache of what a file holds."""
    first = next(sequences, None)
    if first is None:
        raise ValueError(f"{source} holds no sequence")
    if found is None:
        vocab_size = given.get("vocab_size")
        if vocab_size is None:
            raise ValueError(f"{source} does not say how large the vocabulary is; give --vocab-size")
        found = spec_of_rows(first, vocab_size, given.get("k"))
    spec = replace(found, **given)
    tokens = count = 0
    with staged(target) as path:
        with Writer(path, spec, resume=False, shard_bytes=size) as writer:
            if rounded:
                writer.take_stored()
            for s in chain(first, sequences):
                if not writer.add(s.key, s.tokens, without_entries(s) if spec.k == 0 else s):
                    raise ValueError(f"{source} holds sequence {s.key!r} twice")
                tokens, count = tokens + len(s.tokens), count + 1
    return {"sequences": count, "tokens": tokens}


def spec_of_rows(first: Sequence, vocab_size: int, k: int | None) -> Spec:
    """The spec of a file that carries none: k as wide as its first rows, and the columns that they have."""
    realised = first.token_log_probs is not None
    width = int(first.ids.shape[1]) if (first.ids >= 0).any() or not realised else 0
    return Spec(
        vocab_size,
        width if k is None else k,
        temperatures=(1.0, *first.log_rest_at),
        sampled=first.counts is not None,
        token_log_probs=realised,
    )


def without_entries(s: Sequence) -> Sequence:
    """Rows of k = 0, which tables hold as empty lists. Raises ValueError where there are entries all the same."""
    if (s.ids >= 0).any():
        raise ValueError(
            f"sequence {s.key!r} has {int(s.entries.max())} entries in a row, but k = 0 keeps the realised tokens' "
            "log-probabilities alone; give --k"
        )
    return replace(s, ids=s.ids[:, :0], log_probs=s.log_probs[:, :0])


def chain(first: Sequence, others: Iterator[Sequence]) -> Iterator[Sequence]:
    yield first
    yield from others


def export(source: Path, target: Path, name: str, layout: str) -> dict[str, int]:
    cache = caches.open(source)
    if further := [column.name for column in cache.spec.columns]:
        raise ValueError(
            f"{source} has the further columns {further}, which {name} files cannot hold; merge and split do"
        )
    keys = cache.keys()
    module, _, write, _ = FORMATS[name]
    writer = getattr(importlib.import_module(f"potstill.cache.exchange.{module}"), write)
    more = {"lengths": {key: cache.length(key) for key in keys}} if name == "safetensors" else {}
    with staged(target) as path:
        writer(path, cache.spec, of_cache(cache, keys), layout, **more)
    return {"sequences": len(keys), "tokens": cache.num_tokens}


def free(target: Path) -> None:
    """Raises where `target` cannot become a new file."""
    if os.path.lexists(target):
        raise FileExistsError(f"{target} exists; give another name")
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"{target.absolute().parent} is not a folder")


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A path beside `target` to write to; it becomes `target` when the block ends well and vanishes otherwise."""
    free(target)
    path = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield path
        for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
            sync(file)
        free(target)
        os.rename(path, target)
        sync(target.absolute().parent)
    except BaseException:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
