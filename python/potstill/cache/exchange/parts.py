"""Several caches as one, and one as several."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence as Listed
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import potstill.cache as caches
from potstill import _rust
from potstill.cache.exchange.convert import staged
from potstill.cache.exchange.sequence import of_cache
from potstill.cache.writer import Writer


def merge(sources: Listed[Path], target: Path) -> dict[str, Any]:
    """A new cache of the shards of all sources, byte for byte. Returns {"shards", "sequences", "tokens", "repeated"}.

    Sequences that several sources hold with equal content count once (their bytes stay). Raises ValueError for a key
    with different content in two of them, naming both, and CacheError where specs differ or a source is damaged.
    """
    with staged(target) as path:
        return json.loads(_rust.merge([str(source) for source in sources], str(path)))


def part_of(key: str, weights: Listed[float]) -> int:
    """The part a key belongs to: by its SHA-256 alone, so that a growing cache keeps its split."""
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64 * sum(weights)
    for i, weight in enumerate(weights):
        if place < weight:
            return i
        place -= weight
    return max(i for i, weight in enumerate(weights) if weight > 0)


def split(
    source: Path,
    targets: Listed[Path],
    *,
    weights: Listed[float] | None = None,
    keys: Listed[str] | None = None,
    shard_bytes: int = 64 << 20,
) -> list[dict[str, Any]]:
    """New caches of some sequences each, rows exactly as stored. Returns {"path", "sequences", "tokens"} of each.

    weights: shares of the targets, equal where not given; which sequence goes where depends on its key alone.
    keys: the sequences of the first target, in this order; a second one gets all others.

    Raises KeyError for a key that is not there; nothing is left then.
    """
    if weights is not None and keys is not None:
        raise ValueError("keys and weights are given; one of them decides")
    if keys is not None and not 1 <= len(targets) <= 2:
        raise ValueError(f"{len(targets)} targets with a list of keys; one, or two of which the second gets the rest")
    weights = list(weights or [1.0] * len(targets))
    if len(weights) != len(targets) or min(weights) < 0 or not sum(weights) > 0:
        raise ValueError(f"{len(weights)} weights {weights} for {len(targets)} targets; one at least is above 0")
    if len({target.absolute() for target in targets}) != len(targets):
        raise ValueError("a target is given twice")
    cache = caches.open(source)
    if keys is None:
        parts: list[list[str]] = [[] for _ in targets]
        for key in cache.keys():
            parts[part_of(key, weights)].append(key)
    else:
        for key in keys:
            cache.length(key)  # raises KeyError
        chosen = set(keys)
        parts = [list(dict.fromkeys(keys)), [key for key in cache.keys() if key not in chosen]][: len(targets)]
    done = []
    with ExitStack() as stack:
        paths = [stack.enter_context(staged(target)) for target in targets]
        for path, target, part in zip(paths, targets, parts, strict=True):
            tokens = 0
            with Writer(path, cache.spec, resume=False, shard_bytes=shard_bytes) as writer:
                writer.take_stored()
                for s in of_cache(cache, part):
                    writer.add(s.key, s.tokens, s, columns=cache.numpy_columns(s.key))
                    tokens += len(s.tokens)
            done.append({"path": str(target), "sequences": len(part), "tokens": tokens})
    return done
