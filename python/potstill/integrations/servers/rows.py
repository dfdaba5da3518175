"""What every parser of a server's answer ends in: entries by position -> the TopK of a sequence, checked row by row.

A position is what a server said of one token, in no order: `(ids, log_probs, realised)`, where `realised` is the
log-probability of the token that came, or None when it stands among the entries. In its place a position may be a
reason (a str: the row cannot be used, and is counted) or None (no row was asked for there).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.teachers import TopK

Position = tuple[list[int], list[float], "float | None"] | str | None

# Servers that write JSON put this in place of -inf.
MINUS_INFINITY = -9999.0
# A row's mass is 1 to within this: float32 log-softmax over a large vocabulary, summed over k entries.
MASS_TOLERANCE = 1e-4
# 1 - mass is noise below this, the spacing of float32 below 1.
_RESOLUTION = 2.0**-24
# The realised token's log-probability may be rounded otherwise where a server gives it a second time.
_AGREE = 1e-3

MISSING = "no entries"
MALFORMED = "not in the server's format"
OUTSIDE = "an id outside the vocabulary"
NAN = "a log-probability that is no number or above 0"
TWICE = "one id with two log-probabilities"
MASS = "a mass above 1"
REALISED = "without the token that came"
AMBIGUOUS = "a token string that several ids have"
UNKNOWN = "a token string that no id has"


@dataclass(frozen=True)
class ServerRows:
    """The rows of one sequence of L tokens: row i is the teacher's distribution of tokens[i + 1].

    topk: TopK [L, k] at T = 1 with log_rest [L] and token_log_probs [L], the realised token's log-probability (-inf in
        the last row, which has none, and in rows that are not valid).
    valid: bool [L]. A row that is not valid has no entries and log_rest 0: the bucket tail gives it loss 0.
    problems: reason -> number of rows that were given and cannot be used.
    short: rows with fewer than k entries, where the vocabulary has k.
    """

    topk: TopK
    valid: Tensor
    problems: Counter[str] = field(default_factory=Counter)
    short: int = 0


def topk_rows(
    positions: Sequence[Position],
    tokens: Any,
    *,
    k: int,
    vocab_size: int,
    mass_tolerance: float = MASS_TOLERANCE,
    renormalised: bool = False,
) -> ServerRows:
    """positions [L] of a sequence's tokens [L] -> its rows; positions[i] speaks of tokens[i + 1].

    The k most probable entries are kept, whatever order they came in; the realised token, which servers add to the k
    of a row, is kept apart and not counted as one of them unless it is. log_rest is log(1 - mass of the k), no smaller
    than a realised token outside them and no larger than (V - k) times the least of them; it is -inf at k = V and for
    `renormalised` rows, whose mass says nothing of the rest.

    Raises ValueError for k or a number of positions that does not fit.
    """
    tokens = np.asarray(tokens, dtype=np.int64)
    length = len(tokens)
    if not 1 <= k <= vocab_size:
        raise ValueError(f"k is {k}: it must be between 1 and the teacher's vocabulary of {vocab_size}")
    if len(positions) != length:
        raise ValueError(f"{len(positions)} positions for {length} tokens: one a token is needed")
    problems: Counter[str] = Counter()
    reason: list[str | None] = [p if isinstance(p, str) else None for p in positions]
    given: list[tuple[list[int], list[float], float | None]]
    given = [p if isinstance(p, tuple) else ([], [], None) for p in positions]
    ids, log_probs, count = _arrays([p[0] for p in given], [p[1] for p in given])
    realised = np.array([np.nan if p[2] is None else p[2] for p in given], dtype=np.float64)
    realised[realised <= MINUS_INFINITY] = -np.inf
    asked = np.array([isinstance(p, tuple) for p in positions])
    has_next = np.arange(length) < length - 1
    next_token = np.append(tokens[1:], -1)

    def refuse(bad: Any, why: str) -> None:
        for row in np.flatnonzero(bad & asked).tolist():
            reason[row] = reason[row] or why
        log_probs[bad] = -np.inf
        ids[bad] = -1

    held = np.arange(ids.shape[1]) < count[:, None]
    is_next = held & (ids == next_token[:, None])
    # something beside the realised token has no mass at all, so nothing less probable has any
    banned = (held & ~is_next & (log_probs == -np.inf)).any(-1)
    refuse(count == 0, MISSING)
    # > 0 beyond float noise, or NaN, which fails every comparison
    refuse((held & ~(log_probs <= mass_tolerance)).any(-1), NAN)
    refuse((held & ((ids < 0) | (ids >= vocab_size)) & (log_probs > -np.inf)).any(-1), OUTSIDE)
    refuse(_once(ids, log_probs), TWICE)

    among = np.where(is_next.any(-1), np.where(is_next, log_probs, -np.inf).max(-1), np.nan)
    refuse(has_next & (np.abs(realised - among) > _AGREE), TWICE)
    realised = np.where(np.isnan(realised), among, realised)
    refuse(has_next & ~(realised <= mass_tolerance), REALISED)
    ids[log_probs == -np.inf] = -1
    is_next &= ids >= 0

    # the most probable first; among equals the realised token last, as it may be the one beyond the k
    order = np.lexsort((ids, is_next, -log_probs), axis=-1)
    ids, log_probs, is_next = (np.take_along_axis(x, order, -1) for x in (ids, log_probs, is_next))
    entries = (ids >= 0).sum(-1)
    rows = np.arange(length)
    # in a row of fewer than k entries the least one may be a realised token that is not next in rank
    last = np.maximum(entries - 1, 0)
    stray = (entries < k) & (entries > 1) & (entries < vocab_size) & ~banned & is_next[rows, last]
    ids[rows[stray], last[stray]], log_probs[rows[stray], last[stray]] = -1, -np.inf
    if ids.shape[1] < k:
        extra = ((0, 0), (0, k - ids.shape[1]))
        ids, log_probs = np.pad(ids, extra, constant_values=-1), np.pad(log_probs, extra, constant_values=-np.inf)
        is_next = np.pad(is_next, extra)
    inside = (is_next & (ids >= 0))[:, :k].any(-1)
    ids, log_probs = ids[:, :k], log_probs[:, :k]
    entries = (ids >= 0).sum(-1)
    mass = np.log(np.maximum(np.exp(log_probs).sum(-1), 1e-300))
    refuse(mass > np.log1p(mass_tolerance), MASS)
    if renormalised:
        log_rest = np.full(length, -np.inf)
    else:
        outside = np.where(has_next & ~inside, realised, -np.inf)
        log_rest = _log_rest(mass, log_probs, entries, outside, vocab_size)
        log_rest[banned] = -np.inf

    problems.update(r for r in reason if r is not None)
    valid = asked & np.array([r is None for r in reason])
    log_rest[~valid], realised[~valid | ~has_next] = 0.0, -np.inf
    ids[~valid], log_probs[~valid] = -1, -np.inf
    short = valid & (entries < min(k, vocab_size)) & ~banned
    topk = TopK(
        torch.from_numpy(ids.astype(np.int32)),
        torch.from_numpy(np.minimum(log_probs, 0.0).astype(np.float32)),
        torch.from_numpy(log_rest.astype(np.float32)),
        token_log_probs=torch.from_numpy(np.minimum(realised, 0.0).astype(np.float32)),
    )
    return ServerRows(topk, torch.from_numpy(valid), problems, int(short.sum()))


def _arrays(
    ids: Sequence[Sequence[int]], log_probs: Sequence[Sequence[float]]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Ragged rows -> ids [L, W] padded with -1, log_probs [L, W] padded with -inf, entries [L]."""
    count = np.fromiter(map(len, ids), np.int64, len(ids))
    width = max(1, int(count.max(initial=0)))
    held = np.arange(width) < count[:, None]
    all_ids = np.full((len(ids), width), -1, np.int64)
    all_log_probs = np.full((len(ids), width), -np.inf)
    total = int(count.sum())
    all_ids[held] = np.fromiter(chain.from_iterable(ids), np.int64, total)
    all_log_probs[held] = np.fromiter(chain.from_iterable(log_probs), np.float64, total)
    all_log_probs[all_log_probs <= MINUS_INFINITY] = -np.inf
    return all_ids, all_log_probs, count


def _once(ids: NDArray[np.int64], log_probs: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Removes, in place, entries that stand twice; True [L] for rows in which one id has two log-probabilities."""
    order = np.argsort(ids, axis=-1, kind="stable")
    by_id, by_lp = np.take_along_axis(ids, order, -1), np.take_along_axis(log_probs, order, -1)
    again = np.zeros_like(by_id, dtype=bool)
    again[:, 1:] = (by_id[:, 1:] == by_id[:, :-1]) & (by_id[:, 1:] >= 0)
    differ = np.zeros_like(again)
    differ[:, 1:] = again[:, 1:] & (by_lp[:, 1:] != by_lp[:, :-1])
    twice = np.zeros_like(again)
    np.put_along_axis(twice, order, again, -1)
    ids[twice], log_probs[twice] = -1, -np.inf
    return np.asarray(differ.any(-1))


def _log_rest(
    mass: NDArray[np.float64],
    log_probs: NDArray[np.float64],
    entries: NDArray[np.int64],
    outside: NDArray[np.float64],
    vocab_size: int,
) -> NDArray[np.float64]:
    """log(1 - exp(mass)) [L] between what the least kept entry and a realised token outside the kept ones allow."""
    rest = np.log(np.maximum(-np.expm1(np.minimum(mass, 0.0)), _RESOLUTION))
    rows, left = np.arange(len(mass)), vocab_size - entries
    least = log_probs[rows, np.maximum(entries - 1, 0)]
    most = np.where(left > 0, np.log(np.maximum(left, 1)) + least, -np.inf)
    return np.asarray(np.minimum(np.maximum(rest, outside), most))
