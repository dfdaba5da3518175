"""One sequence on its way between a cache and another file, and what every format must refuse of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.cache.reader import Cache
from potstill.cache.spec import Spec

AT = "log_rest_at_"  # column names of log_rest at other temperatures begin so


@dataclass(frozen=True)
class Sequence:
    """tokens int32 [L]; ids int32 [L, K] and log_probs fp32 [L, K], missing entries -1 and -inf at the end of a row;
    log_rest fp32 [L]. None where the spec has no such column: counts int32 [L, K], lse fp32 [L], token_log_probs
    fp32 [L]; log_rest_at[T] fp32 [L]. Rows are as in a cache, so `Writer.add(key, tokens, sequence)` takes it.
    """

    key: str
    tokens: NDArray[np.int32]
    ids: NDArray[np.int32]
    log_probs: NDArray[np.float32]
    log_rest: NDArray[np.float32]
    counts: NDArray[np.int32] | None = None
    lse: NDArray[np.float32] | None = None
    token_log_probs: NDArray[np.float32] | None = None
    log_rest_at: dict[float, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def entries(self) -> NDArray[np.int64]:
        """Entries of each row [L]."""
        return (self.ids >= 0).sum(-1)

    def per_entry(self) -> dict[str, NDArray[Any]]:
        """Columns [L, K] by name."""
        named = {"ids": self.ids, "log_probs": self.log_probs, "counts": self.counts}
        return {name: column for name, column in named.items() if column is not None}

    def per_row(self) -> dict[str, NDArray[Any]]:
        """Columns [L] by name, tokens apart."""
        named = {"log_rest": self.log_rest, "lse": self.lse, "token_log_probs": self.token_log_probs}
        others = {f"{AT}{t!r}": column for t, column in self.log_rest_at.items()}
        return {name: column for name, column in {**named, **others}.items() if column is not None}


def row_columns(spec: Spec) -> list[str]:
    """Names of the columns [L] of a cache, tokens apart."""
    names = ["log_rest"] + (["lse"] if spec.values == "bf16_logits" else [])
    return names + [c if isinstance(c, str) else f"{AT}{c!r}" for c in reversed(spec.extra_columns)]


def entry_columns(spec: Spec) -> list[str]:
    """Names of the columns [L, K] of a cache."""
    return ["ids", "log_probs"] + (["counts"] if spec.sampled else [])


def spec_of(text: str | bytes, where: object) -> Spec:
    """The spec that a file carries as JSON. Raises ValueError for anything else."""
    try:
        return Spec.from_json(text if isinstance(text, str) else text.decode())
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{where} carries a spec that cannot be read: {error}") from None


def of_columns(key: str, tokens: NDArray[Any], columns: dict[str, NDArray[Any]]) -> Sequence:
    """A sequence of columns by name; others are left out. Raises ValueError where their lengths differ."""
    n = len(tokens)
    for name, column in columns.items():
        if len(column) != n:
            raise ValueError(f"sequence {key!r}: {len(column)} rows of {name} for {n} tokens")
    at = {float(name[len(AT) :]): column for name, column in columns.items() if name.startswith(AT)}
    known = {name: columns.get(name) for name in ("counts", "lse", "token_log_probs")}
    return Sequence(key, tokens, columns["ids"], columns["log_probs"], columns["log_rest"], log_rest_at=at, **known)  # type: ignore[arg-type]


def of_cache(cache: Cache, keys: list[str] | None = None) -> Iterator[Sequence]:
    """The sequences of a cache in commit order, one in memory at a time."""
    k, columns = cache.spec.k, cache.spec.extra_columns
    for key in cache.keys() if keys is None else keys:
        tokens, b = cache._decode(key)
        n = len(tokens)
        extra = {} if b.extra is None else dict(zip(columns, b.extra.reshape(n, -1).T, strict=True))
        yield Sequence(
            key, tokens, b.ids.reshape(n, k), b.log_probs.reshape(n, k), b.log_rest,
            counts=None if b.counts is None else b.counts.reshape(n, k),
            lse=b.lse,
            token_log_probs=extra.get("token_log_probs"),
            log_rest_at={t: column for t, column in extra.items() if isinstance(t, float)},
        )  # fmt: skip


def padded(values: NDArray[Any], ends: NDArray[Any], fill: Any) -> NDArray[Any]:
    """Ragged rows [sum of lengths], row i ending at ends[i], as [L, longest] filled up with `fill`."""
    lengths = np.diff(ends, prepend=0)
    here = np.arange(max(lengths.max(initial=0), 1)) < lengths[:, None]
    out = np.full(here.shape, fill, values.dtype)
    out[here] = values
    return out


def rest_of(log_probs: NDArray[np.float32]) -> NDArray[np.float32]:
    """log(1 - sum p) of rows [L, K], for files that do not keep it; -inf where nothing is left."""
    mass = np.exp(log_probs.astype(np.float64)).sum(-1)
    if mass.size and mass.max() > 1 + 1e-3:
        i = int(mass.argmax())
        raise ValueError(f"row {i}: the probabilities sum to {mass[i]:.6g}, at most 1.001 is accepted")
    with np.errstate(divide="ignore"):
        return np.log(np.maximum(1 - mass, 0)).astype(np.float32)
