"""Rows cut to the entries that hold a given probability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def leading(
    ids: NDArray[np.int32], log_probs: Floats, rests: Sequence[tuple[float, Floats]], min_mass: float
) -> tuple[NDArray[np.int32], Floats, list[Floats]]:
    """(ids, log_probs, rests) with the fewest first entries of each row whose probabilities sum to `min_mass` or more,
    all of a row that does not reach it; the others become missing (id -1, log_prob -inf).

    ids, log_probs: [L, K], in descending log-probability at temperature 1. rests: temperatures, and log-mass
    outside the entries at each, [L]; what is cut joins it. Sums in fp64.
    """
    p = np.exp(log_probs.astype(np.float64))
    gone = np.cumsum(p, -1) - p >= min_mass
    gone[:, :1] = False
    if not gone.any():
        return ids, log_probs, [rest for _, rest in rests]
    kept = [_joined(log_probs, gone, temperature, rest) for temperature, rest in rests]
    return np.where(gone, np.int32(-1), ids), np.where(gone, np.float32(-np.inf), log_probs), kept


def _joined(log_probs: Floats, gone: NDArray[Any], temperature: float, rest: Floats) -> Floats:
    """log(exp(rest) + mass of what is gone) at a temperature: its softmax is exp(log_prob / T) / Z, and all entries
    together hold 1 - exp(rest) of it."""
    weights = np.exp(log_probs.astype(np.float64) / temperature)
    given = rest.astype(np.float64)
    mass = np.where(gone, weights, 0).sum(-1)
    if temperature != 1.0:
        mass *= -np.expm1(np.minimum(given, 0)) / np.maximum(weights.sum(-1), np.finfo(np.float64).tiny)
    with np.errstate(divide="ignore"):
        joined = np.logaddexp(given, np.log(mass))
    return np.where(gone.any(-1), joined, given).astype(np.float32)
