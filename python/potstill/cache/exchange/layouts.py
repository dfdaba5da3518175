"""Names and alignment of columns in tables that hold a list of tokens and, for each token, lists of top-k ids and
log-probabilities.

`potstill`: all that a cache holds; row i is the distribution of the token after tokens[0..i].
`axolotl`: input_ids, target_token_ids, target_logprobs, target_mask (and labels, attention_mask); entry i belongs to
token i, so row i - 1 stands there, and entries with mask 0 are no targets.
`trl`: input_ids, logprobs, logprob_token_ids, as TRL's clients of a teacher's server return them for a completion: the
last entry belongs to the last token, and a prompt in front has none.

The last two have no place for the row after the last token, nor for log_rest, which is computed as what the entries
leave; both are stated losses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.cache.exchange.sequence import AT, Sequence, of_columns, rest_of

Ragged = list[NDArray[Any]]


@dataclass(frozen=True)
class Layout:
    """Column names; `whole` when every column of a cache is kept and rows are not shifted."""

    tokens: str
    ids: str
    log_probs: str
    mask: str | None = None
    whole: bool = False

    @property
    def needed(self) -> tuple[str, ...]:
        needed = (self.tokens, self.ids, self.log_probs)
        return (*needed, "key", "log_rest") if self.whole else needed


LAYOUTS = {
    "potstill": Layout("tokens", "ids", "log_probs", whole=True),
    "axolotl": Layout("input_ids", "target_token_ids", "target_logprobs", mask="target_mask"),
    "trl": Layout("input_ids", "logprob_token_ids", "logprobs"),
}


def check_names(layout: Layout, names: Iterable[str], where: str) -> None:
    """Refuses a table that lacks a column of the layout."""
    names = list(names)
    missing = [name for name in layout.needed if name not in names]
    if missing:
        raise ValueError(
            f"{where} has no column {', '.join(missing)} (it has {', '.join(names) or 'none'}); --layout names "
            f"another of {', '.join(LAYOUTS)}"
        )


def to_row(layout: Layout, s: Sequence) -> dict[str, Any]:
    """Columns of one table row: arrays [n], and lists of arrays where each token has its own length."""
    entries = s.entries
    if layout.whole:
        lists = {name: ragged(column, entries) for name, column in s.per_entry().items()}
        return {"key": s.key, "tokens": s.tokens, **lists, **s.per_row()}
    if layout.mask is None:  # completion only: from the first token that has a row
        ids, log_probs = ragged(s.ids[:-1], entries[:-1]), ragged(s.log_probs[:-1], entries[:-1])
        return {"key": s.key, layout.tokens: s.tokens, layout.ids: ids, layout.log_probs: log_probs}
    # every token has an entry of K; what is missing has mask 0
    here = np.vstack([np.zeros_like(s.ids[:1]), s.ids[:-1] >= 0]).astype(np.int8)
    shown = np.vstack([s.ids[:1], s.ids[:-1]])
    values = np.vstack([s.log_probs[:1], s.log_probs[:-1]])
    return {
        "key": s.key,
        layout.tokens: s.tokens,
        "labels": s.tokens,
        "attention_mask": np.ones_like(s.tokens),
        layout.ids: list(np.where(here, shown, 0)),
        layout.log_probs: list(np.where(here, values, np.float32(-np.inf))),
        layout.mask: list(here),
    }


def ragged(column: NDArray[Any], entries: NDArray[Any]) -> Ragged:
    return [row[:n] for row, n in zip(column, entries, strict=True)]


def from_row(layout: Layout, row: dict[str, Any], number: int) -> Sequence:
    """The sequence of one table row; `number` names it where the table has no key."""
    try:
        return _from_row(layout, row, number)
    except TypeError as error:
        raise ValueError(f"row {number} does not hold lists of numbers: {error}") from None


def _from_row(layout: Layout, row: dict[str, Any], number: int) -> Sequence:
    key = row.get("key")
    key = f"{number:08d}" if key is None else str(key)
    tokens = integers(row[layout.tokens], f"sequence {key!r}: {layout.tokens}")
    ids, log_probs = row[layout.ids], row[layout.log_probs]
    where = f"sequence {key!r}: "
    if len(ids) != len(log_probs):
        raise ValueError(f"{where}{len(ids)} lists of {layout.ids}, {len(log_probs)} of {layout.log_probs}")
    masks = row.get(layout.mask) if layout.mask else None
    if masks is not None and len(masks) != len(ids):
        raise ValueError(f"{where}{len(masks)} lists of {layout.mask}, {len(ids)} of {layout.ids}")
    if layout.whole:
        return _whole(layout, row, key, tokens)
    width = max((len(x) for x in ids), default=0)
    table = np.full((len(ids), max(width, 1)), -1, np.int32)
    values = np.full(table.shape, -np.inf, np.float32)
    for i, (x, y) in enumerate(zip(ids, log_probs, strict=True)):
        x, y = integers(x, f"{where}{layout.ids}"), floats(y, f"{where}{layout.log_probs}")
        if len(x) != len(y):
            raise ValueError(f"{where}entry {i} has {len(x)} ids and {len(y)} log-probabilities")
        kept = ~np.isneginf(y)
        if masks is not None:
            if len(masks[i]) != len(x):
                raise ValueError(f"{where}entry {i} has {len(x)} ids and a mask of {len(masks[i])}")
            kept &= np.asarray(masks[i], bool)
        x, y = x[kept], y[kept]
        order = np.argsort(-y, kind="stable")
        table[i, : len(x)], values[i, : len(x)] = x[order], y[order]
    return shifted(key, tokens, table, values)


def shifted(key: str, tokens: NDArray[np.int32], ids: NDArray[np.int32], log_probs: NDArray[np.float32]) -> Sequence:
    """Rows of the last M tokens [M, K] put where a cache has them: one earlier, the others empty."""
    n, m = len(tokens), len(ids)
    if m > n:
        raise ValueError(f"sequence {key!r}: {m} lists of ids for {n} tokens")
    all_ids = np.full((n, ids.shape[1]), -1, np.int32)
    all_log_probs = np.full(all_ids.shape, -np.inf, np.float32)
    first = n - m  # the first token that has an entry; that of token 0 would come before every row
    skip = 1 if first == 0 else 0
    if skip and m and (ids[0] >= 0).any():
        raise ValueError(f"sequence {key!r}: the first token has targets, but nothing comes before it")
    all_ids[first + skip - 1 : n - 1], all_log_probs[first + skip - 1 : n - 1] = ids[skip:], log_probs[skip:]
    try:
        rest = rest_of(all_log_probs)
    except ValueError as error:
        raise ValueError(f"sequence {key!r}, {error}") from None
    return Sequence(key, tokens, all_ids, all_log_probs, rest)


def _whole(layout: Layout, row: dict[str, Any], key: str, tokens: NDArray[np.int32]) -> Sequence:
    where = f"sequence {key!r}: "
    columns: dict[str, NDArray[Any]] = {}
    counts = row.get("counts")
    lists: dict[str, tuple[Any, Any]] = {"ids": (row["ids"], -1), "log_probs": (row["log_probs"], -np.inf)}
    lists |= {"counts": (counts, 0)} if counts is not None else {}
    lengths = [len(x) for x in row["ids"]]
    width = max(lengths, default=0)
    for name, (column, fill) in lists.items():
        if [len(x) for x in column] != lengths:
            raise ValueError(f"{where}{name} and ids have lists of different lengths")
        dtype = np.float32 if name == "log_probs" else np.int32
        take = floats if name == "log_probs" else integers
        out = np.full((len(column), max(width, 1)), fill, dtype)
        if width:
            flat = take(flatten(column), f"{where}{name}")
            out[np.arange(out.shape[1]) < np.asarray(lengths)[:, None]] = flat
        columns[name] = out
    for name in ("log_rest", "lse", "token_log_probs", *(n for n in row if n.startswith(AT))):
        if row.get(name) is not None:
            columns[name] = floats(row[name], f"{where}{name}")
    return of_columns(key, tokens, columns)


def flatten(column: Any) -> Any:
    if all(isinstance(x, np.ndarray) for x in column):
        return np.concatenate(list(column))
    return [value for x in column for value in x]


def integers(values: Any, name: str) -> NDArray[np.int32]:
    """int32 [n]; nothing is rounded and nothing is wrapped."""
    array = np.asarray(values)
    if array.size == 0:
        return np.empty(0, np.int32)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ValueError(f"{name} holds {array.dtype} of shape {array.shape}; a list of integers is accepted")
    low, high = int(array.min()), int(array.max())
    if low < -(2**31) or high >= 2**31:
        raise ValueError(f"{name} holds {low if low < -(2**31) else high}, which is outside int32")
    return array.astype(np.int32)


def floats(values: Any, name: str) -> NDArray[np.float32]:
    """fp32 [n]; None stands for -inf, as JSON has no infinity."""
    if not isinstance(values, np.ndarray):
        values = [-np.inf if v is None else v for v in values]
    array = np.asarray(values)
    if array.size == 0:
        return np.empty(0, np.float32)
    if array.dtype.kind not in "fiu" or array.ndim != 1:
        raise ValueError(f"{name} holds {array.dtype} of shape {array.shape}; a list of numbers is accepted")
    return array.astype(np.float32)
