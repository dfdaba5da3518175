"""Caches on a Ray cluster: `build` in parts by actors that may die, and a datasink for rows made elsewhere.

    potstill build MODEL TEXT OUT --engine ray --workers 64          # on the cluster of RAY_ADDRESS, or on this machine
    dataset.write_datasink(CacheDatasink("teacher-cache", spec))     # rows of your own pipeline

Nothing is coordinated: every task writes into the one folder, which all workers must see (a shared file system), and
what a dead worker has written whole is kept. A task that Ray runs again finds that and does the rest.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.data import Datasink

from potstill import cache as ps_cache
from potstill.cache.exchange.layouts import LAYOUTS, check_names, from_row
from potstill.capture.builder import BuildReport


class CacheDatasink(Datasink[int]):
    """Writes a Ray data set whose rows are sequences into a cache.

    layout: names of the columns, as in tables that `potstill convert` reads. "potstill": key, tokens [L], ids and
        log_probs (a list for each token, or [L, K]), log_rest [L], and what the spec asks for besides under its own
        name: counts, lse, token_log_probs, log_rest_at_T. "axolotl" and "trl": theirs, and key.
    shard_bytes: a shard is committed at this size; a task is given so many bytes where there are as many.

    A row that is there already with equal content is passed over, so tasks may be run again; other content under a
    known key raises ValueError, as in `cache.Writer.add`, and so does a row without a column that is needed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        spec: ps_cache.Spec,
        *,
        layout: str = "potstill",
        shard_bytes: int = 64 << 20,
    ) -> None:
        if layout not in LAYOUTS:
            raise ValueError(f"layout is {layout!r}: one of {', '.join(LAYOUTS)} is accepted")
        if spec.columns:
            raise ValueError(
                f"the spec has the column {spec.columns[0].name!r}: a table of rows has no place for it; leave it out"
            )
        self.path, self.spec = os.path.abspath(path), spec.to_json()
        self.layout, self.shard_bytes = layout, shard_bytes

    @property
    def min_bytes_per_write(self) -> int:
        return self.shard_bytes

    def write(self, blocks: Iterable[Any], ctx: Any) -> int:
        from ray.data.block import BlockAccessor

        layout, added = LAYOUTS[self.layout], 0
        spec = ps_cache.Spec.from_json(self.spec)
        with ps_cache.Writer(self.path, spec, shard_bytes=self.shard_bytes) as writer:
            for block in blocks:
                rows: Iterable[dict[str, Any]] = BlockAccessor.for_block(block).iter_rows(public_row_format=True)
                for number, row in enumerate(rows):
                    check_names(layout, row, "a row")
                    if row.get("key") is None:  # a number would be another row's in another task
                        raise ValueError("a row has no key: every sequence needs a name of its own")
                    sequence = from_row(layout, row, number)
                    added += writer.add(sequence.key, sequence.tokens, sequence)
        return added


@dataclass(frozen=True)
class RayReport(BuildReport):
    """A build's report; `new_*` is by how much the cache has grown. skipped: texts that are not UTF-8."""

    skipped: tuple[str, ...] = ()


class PartBuilder:
    """A Ray Data actor: `load()` once gives a `capture.Loaded`, then parts of the build, one a call."""

    def __init__(
        self, load: Callable[[], Any], texts: Callable[[], Any], out: str, parts: int, options: dict[str, Any]
    ) -> None:
        self.loaded, self.texts, self.out, self.parts, self.options = load(), texts, out, parts, options

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        from potstill.capture import build

        (part,) = batch["id"].tolist()
        texts = self.texts()
        report = build(
            self.loaded.model,
            self.loaded.tokenizer,
            texts,
            self.out,
            shard=(part, self.parts),
            teacher=self.loaded.name,
            teacher_revision=self.loaded.revision,
            **self.options,
        )
        if not report.finished:
            raise RuntimeError(f"part {part} of {self.parts} was interrupted; what it committed is kept")
        return {"skipped": np.array(["\n".join(getattr(texts, "skipped", ()))])}


def build_parts(
    load: Callable[[], Any],
    texts: Callable[[], Any],
    out: str | os.PathLike[str],
    *,
    workers: int,
    parts: int | None = None,
    num_gpus: float | None = None,
    **options: Any,
) -> RayReport:
    """`capture.build` in `parts` (default 4 a worker) by `workers` Ray actors, each with `num_gpus` (default: 1 where
    the cluster has any).

    load: returns a `capture.Loaded`, called once an actor; texts: returns what `open_text` does; both on the workers.
    options: those of `capture.build`. Sequences, batches and rows are those of a build by one process. A worker that
    dies is replaced and its part run again, as often as it takes: what it had committed is left alone.
    KeyboardInterrupt ends the run early (`finished=False`).
    """
    if workers < 1 or (parts is not None and parts < 1):
        raise ValueError(f"workers={workers}, parts={parts}: at least 1 each is needed")
    out, started = os.path.abspath(out), time.monotonic()
    count = parts or 4 * workers
    if not ray.is_initialized():
        ray.init()
    if num_gpus is None:
        num_gpus = float(ray.cluster_resources().get("GPU", 0) > 0)
    before = _size_of(out)
    names: set[str] = set()
    finished = False
    with contextlib.suppress(KeyboardInterrupt):
        # items and no range: a task that reads would wait for a CPU where the workers have them all
        found = (
            ray.data.from_items([{"id": part} for part in range(count)], override_num_blocks=count)
            .map_batches(
                PartBuilder,
                batch_size=1,
                fn_constructor_args=(load, texts, out, count, options),
                compute=ray.data.ActorPoolStrategy(size=workers),
                num_gpus=num_gpus,
            )
            .take_all()
        )
        names.update(name for row in found for name in row["skipped"].split("\n") if name)
        finished = True
    sequences, tokens, size = _size_of(out)
    return RayReport(
        out,
        sequences,
        tokens,
        size,
        sequences - before[0],
        tokens - before[1],
        time.monotonic() - started,
        finished,
        tuple(sorted(names)),
    )


def _size_of(path: str) -> tuple[int, int, int]:
    """Sequences, tokens and bytes committed at a path; zeros where there is no cache yet."""
    try:
        cache = ps_cache.open(path)
    except (ValueError, OSError):
        return 0, 0, 0
    return len(cache), cache.num_tokens, cache.num_bytes
