"""Sums over the tokens of each chunk of an alignment, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.dispatch import register
from potstill.reference.rows import serves_all


@register("chunk_sums", "torch", rank=0, refuses=serves_all)
def chunk_sums(values: Tensor, chunk: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """values [N] fp32 or fp64, chunk [N] int32 (-1 for none), starts and ends [C] int64 -> [C].

    Sum c is that of min(value, 0) over the tokens n of starts[c]..ends[c] with chunk[n] == c.
    """
    count = len(starts)
    # the slot behind the last chunk takes what belongs to none
    slot = torch.where(chunk < 0, count, chunk).long()
    return values.new_zeros(count + 1).index_add(0, slot, values.clamp(max=0))[:count]


@register("chunk_sums_backward", "torch", rank=0, refuses=serves_all)
def chunk_sums_backward(grad: Tensor, values: Tensor, chunk: Tensor) -> Tensor:
    """grad [C], values [N], chunk [N] int32 -> the gradient by the values, [N]."""
    if not len(grad):
        return torch.zeros_like(values)
    return torch.where((chunk >= 0) & (values <= 0), grad[chunk.clamp(min=0).long()], 0.0)
