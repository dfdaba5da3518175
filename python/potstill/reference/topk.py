"""Top-k in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from potstill.dispatch import register
from potstill.reference.rows import NEG_INF, apply_side, serves_all
from potstill.rows import Side


@register("topk", "torch", rank=0, refuses=serves_all)
def topk(logits: Tensor, k: int, side: Side) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits [R, V] -> (ids [R, k] int32, log_probs [R, k], log_rest [R], lse [R]); order as potstill.topk says."""
    z = apply_side(logits, side)[0]
    values, ids = z.sort(dim=-1, descending=True, stable=True)
    lse = z.logsumexp(-1)
    rest = values[:, k:].logsumexp(-1) if k < values.shape[1] else torch.full_like(lse, NEG_INF)
    return ids[:, :k].int(), values[:, :k] - lse[:, None], rest - lse, lse


@register("topk_with", "torch", rank=0, refuses=serves_all)
def topk_with(
    logits: Tensor, k: int, side: Side, tokens: Tensor | None, temperatures: Sequence[float]
) -> tuple[Tensor, ...]:
    """The same with tokens [R] (negative: none) -> log-probability [R] and rank [R] int32; and log_rest_at [R, T]."""
    z = apply_side(logits, side)[0]
    found = topk(logits, k, side)
    empty = z.new_empty(0)
    token_log_probs, ranks = empty, empty.to(torch.int32)
    if tokens is not None:
        given = tokens >= 0
        value = z.gather(1, torch.where(given, tokens, 0)[:, None])
        token_log_probs = torch.where(given, value[:, 0] - found[3], NEG_INF)
        ranks = torch.where(given, (z > value).sum(-1), -1).int()
    at = []
    for t in temperatures:
        scaled = z / t
        rest = scaled.scatter(1, found[0].long(), NEG_INF).logsumexp(-1)
        at.append(rest - scaled.logsumexp(-1))
    return *found, token_log_probs, ranks, torch.stack(at, 1) if at else empty.reshape(0, 0).clone()
