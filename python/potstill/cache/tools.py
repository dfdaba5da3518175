"""Inspect, verify and recover a cache folder. No torch."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from potstill import _rust


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. part is "header", "block N", "index", "footer", "trailer" or "file"."""

    file: str
    part: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}, {self.part}: {self.what}"


@dataclass(frozen=True)
class Report:
    """What verify found: ok, problems, and the sequences, tokens and bytes (of shards) that were read.

    open_shards counts shards not yet committed: of a living writer, or of one that died (resume or recover
    takes them over).
    """

    ok: bool
    problems: list[Problem]
    sequences: int
    tokens: int
    bytes: int
    shards: int = 0
    open_shards: int = 0

    def __bool__(self) -> bool:
        return self.ok


def verify_cache(path: str | os.PathLike[str], *, deep: bool = True) -> Report:
    """Reads every byte of the cache at `path` and checks every checksum; when `deep`, decodes and checks every row and
    content hash too. Damage is reported, never raised."""
    found = json.loads(_rust.verify(os.fspath(path), deep))
    return Report(**{**found, "problems": [Problem(**p) for p in found["problems"]]})


def inspect_cache(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A summary from the indexes: path, spec, sequences, tokens, bytes, bytes_per_token, entries_per_token,
    sequence_tokens (min, median, p90, max), columns (those of the spec, with the bytes of their blocks),
    open_shards, shards (a list of dicts; their `parts` are bytes of header, tables, blocks and index).
    Raises CacheError for damage."""
    return json.loads(_rust.inspect(os.fspath(path)))


def recover_cache(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Repairs a cache that no writer has open: takes over whole sequences of torn and damaged shards, puts
    the damaged files aside in PATH/damaged, and writes the manifest anew.

    Returns files, sequences and tokens that were salvaged, known (sequences the cache held already) and
    lost, a list with one line for each thing that was damaged or put aside.
    """
    return json.loads(_rust.recover(os.fspath(path)))
