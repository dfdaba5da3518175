"""The log-sum-exp over candidates of which some are left out, by anchor, chunk by chunk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from potstill import gemm
from potstill.methods.hidden import wide


def log_sum_exp(
    anchors: Tensor, candidates: Tensor, scale: float, positives: Tensor, labels: Tensor | None,
    candidate_labels: Tensor | None, with_positive: bool, chunk_rows: int = 0,
) -> Tensor:  # fmt: skip
    """log sum_j exp(scale a_i . c_j) over the candidates j that are not left out, [N] fp32 (fp64); -inf for none.

    anchors: [N, D].  candidates: [M, D].  positives: int [N].  labels: int [N], candidate_labels: int [M], or None.
    Left out: candidates of the anchor's label other than its positive, and the positive unless with_positive. The
    gradient reaches both sides; backward computes the chunks again, so that [chunk_rows, M] is the largest tensor.
    """
    if labels is not None and candidate_labels is not None:
        for name, x, n in (("labels", labels, len(anchors)), ("candidate_labels", candidate_labels, len(candidates))):
            if x.shape != (n,):
                raise ValueError(f"{name} has shape {list(x.shape)}; it must be [{n}]")
    out: Tensor = _Lse.apply(anchors, candidates, scale, positives, labels, candidate_labels, with_positive, chunk_rows)
    return out


class _Lse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, c: Tensor, scale: float, positives: Tensor, labels: Tensor | None,
        candidate_labels: Tensor | None, with_positive: bool, rows: int,
    ) -> Tensor:  # fmt: skip
        ctx.scale, ctx.with_positive = scale, with_positive
        ctx.rows = rows or gemm.chunk_rows(a.device, len(c), wide(a).dtype)
        ctx.places = positives.clamp(min=0), labels, candidate_labels
        out = torch.empty(len(a), dtype=wide(a).dtype, device=a.device)
        for at in range(0, len(a), ctx.rows):
            piece = slice(at, at + ctx.rows)
            out[piece] = _scores(ctx, a, c, piece).logsumexp(1)
        ctx.save_for_backward(a, c, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
        a, c, lse = ctx.saved_tensors
        d_a = torch.empty_like(a) if ctx.needs_input_grad[0] else None
        d_c = torch.zeros(c.shape, dtype=lse.dtype, device=c.device) if ctx.needs_input_grad[1] else None
        shift = torch.where(lse == float("-inf"), 0.0, lse)
        for at in range(0, len(a), ctx.rows):
            piece = slice(at, at + ctx.rows)
            d = (_scores(ctx, a, c, piece) - shift[piece, None]).exp_() * (ctx.scale * given[piece, None])
            if d_a is not None:
                d_a[piece] = (d @ wide(c)).to(a.dtype)
            if d_c is not None:
                d_c.addmm_(d.t(), wide(a[piece]))
        return d_a, None if d_c is None else d_c.to(c.dtype), None, None, None, None, None, None


def _scores(ctx: Any, a: Tensor, c: Tensor, piece: slice) -> Tensor:
    """[R, M] in fp32 (fp64), -inf where a candidate is left out."""
    z = wide(a[piece]) @ wide(c).t() * ctx.scale
    positives, labels, candidate_labels = ctx.places
    own = positives[piece, None]
    if labels is not None:
        at_positive = z.gather(1, own)
        z.masked_fill_(labels[piece, None] == candidate_labels, float("-inf"))
        z.scatter_(1, own, at_positive)
    return z if ctx.with_positive else z.scatter_(1, own, float("-inf"))
