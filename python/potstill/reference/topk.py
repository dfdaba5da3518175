"""Extraction in plain torch."""

from __future__ import annotations

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
