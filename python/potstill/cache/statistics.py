"""What the rows of a cache look like, and how far they are from those of another."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.cache.buffers import Buffers
from potstill.cache.reader import Cache, open

Column = NDArray[np.float64]
ENTRIES = 1 << 22  # of one sequence that are looked at


def spread_keys(cache: Cache, rows: int) -> list[str]:
    """Keys at even distances in commit order, of about so many rows together; all of a smaller cache."""
    keys = cache.keys()
    mean = max(cache.num_tokens / max(len(keys), 1), 1)
    step = max(len(keys) / max(rows / mean, 1), 1)
    return [keys[int(i * step)] for i in range(int(np.ceil(len(keys) / step))) if int(i * step) < len(keys)]


def leading(cache: Cache, key: str, rows: int | None = None) -> tuple[NDArray[np.int32], Buffers]:
    """Tokens and rows of a sequence, or the first of them: no more than ENTRIES hold, whatever the index says."""
    most = max(ENTRIES // max(cache.spec.k, 1), 1)
    n = min(cache.length(key), most if rows is None else min(rows, most))
    tokens, found = np.empty(n, np.int32), Buffers.empty(cache.spec, n)
    cache.read(key, tokens, found)
    return tokens, found


def quantiles(values: Column) -> dict[str, float]:
    """median, p90, p99 and max of [N]."""
    if not len(values):
        return {}
    names = {"median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: float(x) for name, x in zip(names, np.quantile(values, list(names.values())), strict=True)}


def distributions(cache: Cache, rows: int = 8192) -> dict[str, Any]:
    """Over about `rows` rows: entries a row, probability of the first entry, mass outside the entries, entropy in nats
    (the mass outside as one entry), and how far entries and rest together are from 1, which rounding makes. Of rows
    without entries (k = 0) the realised tokens' log-probabilities alone."""
    columns: dict[str, list[Column]] = {}
    seen = 0
    for key in spread_keys(cache, rows):
        if cache.spec.k == 0:
            _, found_here = leading(cache, key)
            assert found_here.extra is not None  # the realised tokens' alone
            finite = found_here.extra[np.isfinite(found_here.extra)]
            columns.setdefault("token_log_probs", []).append(finite.astype(np.float64))
            seen += len(found_here.extra)
            continue
        tokens, read = leading(cache, key)
        ids = read.ids.reshape(len(tokens), -1)
        lp, rest = read.log_probs.reshape(ids.shape).astype(np.float64), read.log_rest.astype(np.float64)
        p, q = np.exp(lp), np.exp(rest)
        with np.errstate(invalid="ignore"):
            entropy = -np.where(p > 0, p * lp, 0).sum(-1) - np.where(q > 0, q * rest, 0)
        found = {
            "entries": (ids >= 0).sum(-1).astype(np.float64),
            "first_probability": p[:, 0],
            "mass_outside": q,
            "entropy": entropy,
            "mass_error": np.abs(p.sum(-1) + q - 1),
        }
        for name, column in found.items():
            columns.setdefault(name, []).append(column)
        seen += len(ids)
    return {"rows": seen, **{name: quantiles(np.concatenate(parts)) for name, parts in columns.items()}}


def row_kl(
    ids: NDArray[Any], log_probs: NDArray[Any], log_rest: NDArray[Any],
    other_ids: NDArray[Any], other_log_probs: NDArray[Any], other_rest: NDArray[Any],
) -> tuple[Column, Column, NDArray[np.int64]]:  # fmt: skip
    """KL(p || q) of rows [N, K] over the entries and the rest as one, p and q normalised; the largest |difference| of a
    log-probability in each row; and the entries of p that q lacks (their share of the KL then falls to q's rest)."""
    order, other = np.argsort(ids, -1), np.argsort(other_ids, -1)
    n, k = ids.shape
    a, b = (
        np.take_along_axis(ids, order, -1).astype(np.int64),
        np.take_along_axis(other_ids, other, -1).astype(np.int64),
    )
    lp = np.take_along_axis(log_probs, order, -1).astype(np.float64)
    lq = np.take_along_axis(other_log_probs, other, -1).astype(np.float64)
    base = np.arange(n)[:, None] * (2**32)
    flat = (b + 1 + base).ravel()
    at = np.minimum(np.searchsorted(flat, (a + 1 + base).ravel()), max(flat.size - 1, 0))
    found = (flat[at] == (a + 1 + base).ravel()).reshape(n, k) & (a >= 0)
    matched = np.where(found, lq.ravel()[at].reshape(n, k), -np.inf)
    p, rest = np.exp(lp), log_rest.astype(np.float64)
    missing = (a >= 0) & ~found
    with np.errstate(divide="ignore", invalid="ignore"):
        p_rest = np.exp(rest) + np.where(missing, p, 0).sum(-1)
        q_all, q_rest = np.exp(lq).sum(-1), np.exp(other_rest.astype(np.float64))
        lonely = q_all - np.where(found, np.exp(matched), 0).sum(-1)  # entries of q that p lacks: part of p's rest
        q_rest = q_rest + np.maximum(lonely, 0)
        z_p, z_q = np.where(found, p, 0).sum(-1) + p_rest, q_all - lonely + q_rest
        terms = np.where(found & (p > 0), p * (lp - matched), 0).sum(-1)
        terms += np.where(p_rest > 0, p_rest * (np.log(p_rest) - np.log(q_rest)), 0)
        error = np.abs(np.where(found & np.isfinite(lp), lp - matched, 0))
    return terms / z_p - np.log(z_p) + np.log(z_q), error.max(-1, initial=0), missing.sum(-1)


def fidelity(cache: Cache, reference: str | os.PathLike[str] | Cache, rows: int = 8192) -> dict[str, Any]:
    """How far the cache is from `reference`, another cache of the same sequences, over about `rows` rows: mean and
    largest KL(reference || cache), largest error of a log-probability and of log_rest. Raises ValueError where tokens
    differ."""
    truth = reference if isinstance(reference, Cache) else open(reference)
    for store in (cache, truth):
        if store.spec.k == 0:
            raise ValueError(f"{store.path} has rows without entries (k = 0), which have no distribution to compare")
    kls, errors, rests, lost = [], [], [], 0
    for key in shared(spread_keys(cache, rows), truth):
        if cache.length(key) == truth.length(key):
            n = min(ENTRIES // max(cache.spec.k, truth.spec.k), cache.length(key))
            (tokens, a), (their_tokens, b) = leading(cache, key, n), leading(truth, key, n)
            here, there = ((x.ids.reshape(n, -1), x.log_probs.reshape(n, -1), x.log_rest) for x in (a, b))
        if cache.length(key) != truth.length(key) or not np.array_equal(tokens, their_tokens):
            raise ValueError(f"sequence {key!r} has other tokens in {truth.path} than in {cache.path}")
        kl, error, missing = row_kl(*there, *here)
        with np.errstate(invalid="ignore"):
            rests.append(np.nan_to_num(np.abs(here[2] - there[2]), nan=0.0))
        kls.append(kl)
        errors.append(error)
        lost += int(missing.sum())
    if not kls:
        raise ValueError(f"{cache.path} and {truth.path} share no sequence")
    kl = np.concatenate(kls)
    return {
        "rows": len(kl),
        "mean_kl": float(kl.mean()),
        "max_kl": float(kl.max()),
        "max_error": float(np.concatenate(errors).max()),
        "max_rest_error": float(np.concatenate(rests).max()),
        "missing_entries": lost,
    }


def shared(keys: Iterable[str], other: Cache) -> list[str]:
    return [key for key in keys if key in other]
