"""Log-probabilities at chosen ids, from hidden states through a head, with gradient; no [N, V] matrix is held."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from potstill import gemm
from potstill.arguments import promote
from potstill.teachers import Head


def log_probs_at(hidden: Tensor, head: Head | Tensor, ids: Tensor, *, precise: bool = False) -> Tensor:
    """`log_softmax(logits)[n, ids[n]]` of `logits = hidden @ weight.T` as the head applies them.

    hidden: [N, D].  ids: int [N] or [N, K]; negative ids give 0 and no gradient.  Returns fp32 (fp64 for fp64 hidden)
    in the shape of ids, with gradients to hidden, the head's weight and bias. Peak memory is one chunk of rows of
    logits, a second under softcap; backward computes them again. Raises ValueError when ids lie outside the vocabulary
    or shapes do not fit.
    """
    head = head if isinstance(head, Head) else Head(head)
    if ids.dim() not in (1, 2) or ids.shape[:1] != hidden.shape[:1] or hidden.dim() != 2:
        raise ValueError(
            f"hidden is {list(hidden.shape)}, ids {list(ids.shape)}; they must be [N, D] and [N] or [N, K]"
        )
    if ids.is_floating_point() or (ids.numel() and int(ids.max()) >= head.side.vocab_size):
        raise ValueError(f"ids must be integers below the head's vocabulary size {head.side.vocab_size}")
    x, weight, bias = promote(hidden, head)
    if x.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden has {x.shape[1]} columns, the head's weight {weight.shape[1]}")
    columns = ids.reshape(len(ids), -1).long()
    out = _At.apply(x, weight, bias, columns, head.side, precise)
    return out.reshape(ids.shape)


class _At(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, side: Any, precise: bool
    ) -> Tensor:
        how = gemm.plan(hidden.device, hidden.dtype, precise)
        ctx.side, ctx.how = side, how
        ctx.rows = gemm.chunk_rows(hidden.device, len(weight), how.logit_dtype)
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        out = torch.zeros(ids.shape, dtype=wide, device=hidden.device)
        lse = torch.zeros(len(ids), dtype=wide, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            buffer = _buffer(hidden, weight, ctx)
            for start in range(0, len(hidden), ctx.rows):
                piece = slice(start, start + ctx.rows)
                logits = _logits(buffer, hidden[piece], weight, bias, ctx)
                lse[piece] = logits[:, : side.vocab_size].logsumexp(1)
                at = ids[piece]
                found = logits.gather(1, at.clamp(min=0)).to(wide) - lse[piece, None]
                out[piece] = torch.where(at >= 0, found, 0.0)
        ctx.save_for_backward(hidden, weight, bias, ids, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, lse = ctx.saved_tensors
        side, how = ctx.side, ctx.how
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(hidden) if want_hidden else None
        acc = torch.zeros(weight.shape, dtype=lse.dtype, device=weight.device) if want_weight else None
        acc_bias = torch.zeros(len(weight), dtype=lse.dtype, device=weight.device) if want_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            buffer = _buffer(hidden, weight, ctx)
            for start in range(0, len(hidden), ctx.rows):
                piece = slice(start, start + ctx.rows)
                logits = _logits(buffer, hidden[piece], weight, bias, ctx)
                slope = (logits / side.softcap).square_().neg_().add_(1) if side.softcap else None
                at = ids[piece]
                given = torch.where(at >= 0, grad[piece], 0.0).to(logits.dtype)
                d_logits = logits.sub_(lse[piece, None]).exp_().mul_(-given.sum(1, keepdim=True))
                d_logits.scatter_add_(1, at.clamp(min=0), given)
                if slope is not None:
                    d_logits *= slope
                if side.scale != 1:
                    d_logits *= side.scale
                d_logits[:, side.vocab_size :] = 0
                d = d_logits.to(how.grad_dtype)
                if d_hidden is not None:
                    gemm.hidden_gradient_into(d_hidden[piece], d, weight, how)
                if acc is not None:
                    gemm.weight_gradient_add(acc, d, hidden[piece], start == 0)
                if acc_bias is not None:
                    acc_bias += d.sum(0, dtype=lse.dtype)
        d_weight = None if acc is None else acc.to(weight.dtype)
        d_bias = None if acc_bias is None or bias is None else acc_bias.to(bias.dtype)
        return d_hidden, d_weight, d_bias, None, None, None


def _buffer(hidden: Tensor, weight: Tensor, ctx: Any) -> Tensor:
    shape = (min(ctx.rows, len(hidden)), len(weight))
    return torch.empty(shape, dtype=ctx.how.logit_dtype, device=hidden.device)


def _logits(buffer: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, ctx: Any) -> Tensor:
    out = buffer[: len(hidden)]
    gemm.logits_into(out, hidden, weight, bias, ctx.how)
    if ctx.side.scale != 1:
        out *= ctx.side.scale
    if ctx.side.softcap:
        out.div_(ctx.side.softcap).tanh_().mul_(ctx.side.softcap)
    return out
