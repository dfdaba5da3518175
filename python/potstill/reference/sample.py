"""Draws from softmax(z / T) in plain torch, numbered so that every backend draws with the same uniforms.

Uniform i of row r is SplitMix64 (Steele, Lea and Flood 2014): draw i of the stream mix(mix(seed) ^ r * golden), its
upper 53 bits. The drawn id is the first whose running sum of exp(z / T), in fp64 and in order of ids, is above
uniform * total. Backends sum in another order, so a uniform within rounding of an id's edge may fall to its neighbour.
"""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.dispatch import register
from potstill.reference.rows import NEG_INF, apply_side, serves_all
from potstill.rows import Side


def signed(x: int) -> int:
    """The bits of an unsigned 64-bit number as int64."""
    return (x & (1 << 64) - 1) - ((x & 1 << 63) << 1)


GOLDEN = signed(0x9E3779B97F4A7C15)
ROWS = 16  # rows whose running sums are held at a time


def shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits, filling with zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 bits."""
    x = (x ^ shifted(x, 30)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ shifted(x, 27)) * signed(0x94D049BB133111EB)
    return x ^ shifted(x, 31)


def uniforms(rows: int, n: int, seed: int, first_row: int, device: torch.device) -> Tensor:
    """[rows, n] fp64 in [0, 1)."""
    numbers = torch.arange(first_row, first_row + rows, device=device)
    stream = mix(mix(torch.tensor(seed, device=device)) ^ numbers * GOLDEN)
    bits = mix(stream[:, None] + torch.arange(1, n + 1, device=device) * GOLDEN)
    return shifted(bits, 11).double() * 2.0**-53


@register("sample", "torch", rank=0, refuses=serves_all)
def sample(
    logits: Tensor, n: int, side: Side, temperature: float, seed: int, first_row: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits [R, V] -> (ids [R, n] int32, counts [R, n] int32, log_probs [R, n], lse [R])."""
    u = uniforms(len(logits), n, seed, first_row, logits.device)
    found = [
        _draw(logits[i : i + ROWS], u[i : i + ROWS], side, temperature) for i in range(0, max(1, len(logits)), ROWS)
    ]
    ids, counts, log_probs, lse = (torch.cat(x) for x in zip(*found, strict=True))
    return ids, counts, log_probs, lse


def _draw(logits: Tensor, u: Tensor, side: Side, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z = apply_side(logits, side)[0]
    lse = z.logsumexp(-1)
    scaled = z.double() / temperature
    weights = (scaled - scaled.amax(-1, keepdim=True)).exp() if z.numel() else scaled
    edges = weights.cumsum(-1)
    drawn = torch.searchsorted(edges, u * edges[:, -1:], right=True)
    last = torch.where(weights > 0, torch.arange(z.shape[1], device=z.device), 0).amax(-1, keepdim=True)
    drawn = torch.minimum(drawn, last).sort(-1).values
    new = torch.ones_like(drawn, dtype=torch.bool)
    new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    place = new.cumsum(-1) - 1  # of the id among the row's unique ones, ascending
    counts = torch.zeros_like(drawn).scatter_add(1, place, torch.ones_like(drawn))
    ids = torch.full_like(drawn, -1).scatter(1, place, drawn)
    possible = lse.isfinite()[:, None]
    counts = torch.where(possible, counts, 0)
    counts, order = counts.sort(dim=-1, descending=True, stable=True)
    ids = torch.where(counts > 0, ids.gather(1, order), -1)
    log_probs = torch.where(ids >= 0, z.gather(1, ids.clamp(min=0)) - lse[:, None], NEG_INF)
    return ids.int(), counts.int(), log_probs, lse
