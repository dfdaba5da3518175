"""Writing a cache: sequences go into an open shard, shards are committed whole and never change."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill import _rust
from potstill.cache.arrays import float32, int32
from potstill.cache.masses import leading
from potstill.cache.spec import Spec


class Writer:
    """Writes sequences of teacher rows into a cache folder.

    path: a new, empty or (resume=True) existing cache folder. Several writers, in several processes, may
        share one.
    resume: continue an existing cache of an equal spec; whole sequences of writers that died are taken
        over. False refuses an existing cache.
    shard_bytes: a shard is committed when it reaches this size; a kill loses at most the sequence being
        written and a power failure at most the open shard and the full one before it, which is committed while more
        is added: what fails then is raised by the next call. flush() and close() return when all is durable.

    A with-block commits and closes at its end; left by an exception it commits what is whole, and the
    exception goes on.

    Raises CacheError when the folder is not a cache, is damaged, or has another spec
    (naming the field); OSError when the system refuses, with everything committed so far intact.
    """

    def __init__(
        self, path: str | os.PathLike[str], spec: Spec, *, resume: bool = True, shard_bytes: int = 64 << 20
    ) -> None:
        if not isinstance(spec, Spec):
            raise TypeError(f"spec is a {type(spec).__name__}, a potstill.cache.Spec is accepted")
        if shard_bytes < 1:
            raise ValueError(f"shard_bytes is {shard_bytes}, at least 1 is accepted")
        self.path = os.fspath(path)
        self.spec = spec
        self._rust = _rust.Writer(self.path, spec.to_json(), bool(resume), int(shard_bytes))
        self._stored = False

    def take_stored(self) -> None:
        """From here on rows come from another cache: rounding may have lifted their mass above 1, and they are cut."""
        self._rust.accept_rounded()
        self._stored = True

    def add(
        self,
        key: str,
        tokens: Any,
        topk: Any,
        *,
        hidden: Any = None,
        scores: Any = None,
        classes: Any = None,
        columns: Mapping[str, Any] | None = None,
    ) -> bool:
        """Adds a sequence: row i is the teacher's distribution of the token after tokens[0..i].

        key: 1 to 512 bytes of UTF-8. tokens: [L] integers (tensor, array or list), L >= 1.
        topk: anything with ids [L, K] integers, log_probs [L, K] and log_rest [L], K <= spec.k; each row
            in descending log-probability, a missing entry (at the end of a row) is id -1 with log_prob -inf;
            spec.min_mass cuts them. What the spec asks for besides: log_rest_at[T] [L] of each temperature, counts
            [L, K] (rows in any order), lse [L], token_log_probs [L].
        hidden [L, D], scores (a mapping of labels, or [S]), classes [C], columns (name -> [L], [L, W] or [W]): values
            of the spec's columns, every one of them and no other; rounded to the column's dtype.

        Returns False, and writes nothing, when the key is there already with equal content.
        Raises ValueError naming key, row and value: other content under a known key, wrong shapes, ids
        outside the vocabulary or twice in a row, NaN, a log-probability above 1e-3, a row whose mass is
        above 1 + 1e-3, a column's value that is not finite.
        """
        if not isinstance(key, str):
            raise TypeError(f"key is a {type(key).__name__}, a str is accepted")
        rest = getattr(topk, "log_rest", None)
        if rest is None:
            raise ValueError(
                f"sequence {key!r}: topk.log_rest is missing; a cache keeps the log mass outside the entries "
                "of each row (potstill.topk gives it; for renormalised rows it is -inf)"
            )
        name = f"sequence {key!r}: topk"
        ids, log_probs = int32(topk.ids, f"{name}.ids", 2), float32(topk.log_probs, f"{name}.log_probs", 2)
        counts = lse = None
        if self.spec.sampled:
            counts = int32(self._wanted(topk, key, "counts"), f"{name}.counts", 2)
            if not ids.shape == log_probs.shape == counts.shape:
                raise ValueError(
                    f"{name}: ids {ids.shape}, log_probs {log_probs.shape} and counts {counts.shape} differ"
                )
            order = np.argsort(-log_probs, axis=-1, kind="stable")
            ids, counts = np.take_along_axis(ids, order, -1), np.take_along_axis(counts, order, -1)
            log_probs = np.take_along_axis(log_probs, order, -1)
        if self.spec.values == "bf16_logits":
            lse = float32(self._wanted(topk, key, "lse"), f"{name}.lse", 1)
        rests = float32(rest, f"{name}.log_rest", 1)
        extra = self._extra(topk, key, name)
        if self.spec.min_mass < 1 and not self._stored:
            ids, log_probs, rests, extra = self._cut(name, ids, log_probs, rests, extra)
        given = int32(tokens, f"sequence {key!r}: tokens", 1)
        named = {"hidden": hidden, "scores": scores, "classes": classes}
        further = {**(columns or {}), **{column: value for column, value in named.items() if value is not None}}
        return self._rust.add(
            key,
            given,
            ids,
            log_probs,
            rests,
            extra,
            lse,
            counts,
            self._columns(further, key, len(given)),
        )

    def _cut(
        self,
        name: str,
        ids: NDArray[np.int32],
        log_probs: NDArray[np.float32],
        rest: NDArray[np.float32],
        extra: NDArray[np.float32] | None,
    ) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32], NDArray[np.float32] | None]:
        if not ids.shape == log_probs.shape == (len(rest), ids.shape[1]):
            raise ValueError(f"{name}: ids {ids.shape}, log_probs {log_probs.shape} and log_rest {rest.shape} differ")
        others = [(i, t) for i, t in enumerate(self.spec.extra_columns) if not isinstance(t, str)]
        rests = [(1.0, rest), *((t, extra[:, i]) for i, t in others if extra is not None)]
        ids, log_probs, (rest, *cut) = leading(ids, log_probs, rests, self.spec.min_mass)
        if extra is not None and cut:
            extra = np.concatenate([np.stack(cut, -1), extra[:, len(cut) :]], -1)
        return ids, log_probs, rest, extra

    def _columns(self, given: dict[str, Any], key: str, tokens: int) -> list[NDArray[np.uint8]] | None:
        names = [column.name for column in self.spec.columns]
        if sorted(given) != sorted(names):
            raise ValueError(f"sequence {key!r} has the further columns {sorted(given)}, the spec has {sorted(names)}")
        return [column.encode(given[column.name], key, tokens) for column in self.spec.columns] or None

    def _wanted(self, topk: Any, key: str, name: str) -> Any:
        value = getattr(topk, name, None)
        if value is None:
            raise ValueError(f"sequence {key!r}: topk.{name} is missing; the spec of this cache asks for it")
        return value

    def _extra(self, topk: Any, key: str, name: str) -> NDArray[np.float32] | None:
        columns = []
        for column in self.spec.extra_columns:
            if isinstance(column, str):
                columns.append(float32(self._wanted(topk, key, column), f"{name}.{column}", 1))
                continue
            rests = getattr(topk, "log_rest_at", None) or {}
            if column not in rests:
                raise ValueError(f"sequence {key!r}: topk.log_rest_at[{column}] is missing; Spec.temperatures names it")
            columns.append(float32(rests[column], f"{name}.log_rest_at[{column}]", 1))
        if not columns:
            return None
        if len({len(c) for c in columns}) > 1:
            raise ValueError(f"{name}: log_rest_at and token_log_probs differ in length")
        return np.ascontiguousarray(np.stack(columns, -1))

    def __contains__(self, key: object) -> bool:
        """True when the key is committed or waits in the open shard."""
        return isinstance(key, str) and key in self._rust

    def __len__(self) -> int:
        """Sequences committed and waiting."""
        return self._rust.committed + self._rust.pending[0]

    @property
    def committed(self) -> int:
        """Sequences that are safe on disk."""
        return self._rust.committed

    @property
    def pending(self) -> int:
        """Sequences that the next commit will hold."""
        return self._rust.pending[0]

    @property
    def salvaged(self) -> int:
        """Sequences taken over, when this writer was opened, from writers that died."""
        return self._rust.salvaged[0]

    def flush(self) -> str | None:
        """Commits everything added so far as one shard; its name, or None when there was nothing new."""
        return self._rust.flush()

    def close(self) -> None:
        """Commits and writes the manifest. Closing twice is harmless."""
        self._rust.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as failed:
            if error is None:
                raise
            error.add_note(f"the cache could not be closed either: {failed}") if hasattr(error, "add_note") else None
