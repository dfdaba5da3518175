"""Divergences of self-relations, softmax(q k^T / sqrt(d)): many heads in one product, or one as a fused linear loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from potstill.divergences import Divergence
from potstill.losses import distill_loss, linear_distill_loss
from potstill.methods.hidden import wide
from potstill.teachers import Head, HiddenTeacher, LogitsTeacher

Sides = tuple[Tensor, Tensor, Tensor, Tensor]  # the student's queries and keys [B, L, D_s], the teacher's [B, L, D_t]
LONG = 384  # positions from which one head at a time is quicker
ENTRIES = {"cpu": 1 << 19}  # of the relation matrices that are held at a time; elsewhere OTHER_ENTRIES
OTHER_ENTRIES = 1 << 23


def relation_sum(sides: Sides, heads: int, keep: Tensor | None, divergence: str | Divergence) -> Tensor:
    """The sum over sequences, heads and live queries: 0-dim, in fp32 (fp64). The gradient reaches the student's sides.

    keep: bool [B, L], or None for all; a position left out is neither query nor key.
    """
    return (long_sum if sides[0].shape[1] >= LONG else short_sum)(sides, heads, keep, divergence)


def long_sum(sides: Sides, heads: int, keep: Tensor | None, divergence: str | Divergence) -> Tensor:
    """One head of one sequence at a time, the sequence itself being the head: memory grows with L."""
    total: Any = wide(sides[0][:0]).sum()
    for b in range(len(sides[0])):
        parts = [x[b] if keep is None else x[b][keep[b]] for x in sides]
        if not len(parts[0]):
            continue
        for q, k, tq, tk in zip(*(x.unflatten(-1, (heads, -1)).unbind(1) for x in parts), strict=True):
            head, t_head = (Head(x, logit_scale=x.shape[-1] ** -0.5) for x in (k, tk.detach()))
            teacher = HiddenTeacher(tq, t_head)
            total = total + linear_distill_loss(q, head, teacher, divergence=divergence, reduction="sum")
    assert isinstance(total, Tensor)
    return total


def short_sum(sides: Sides, heads: int, keep: Tensor | None, divergence: str | Divergence) -> Tensor:
    """As many heads at a time as have ENTRIES relations together."""
    dtype = wide(sides[0]).dtype
    given = [wide(x).to(dtype) for x in sides]
    if keep is not None:  # what is left out may hold anything
        given = [torch.where(keep[..., None], x, 0.0) for x in given]
    q, k, tq, tk = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in given)
    out: Tensor = _Relations.apply(q, k, tq.detach(), tk.detach(), keep, divergence)
    return out


class _Relations(torch.autograd.Function):
    """Gradient in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, tq: Tensor, tk: Tensor, keep: Tensor | None, divergence: str | Divergence
    ) -> Tensor:
        heads, length = q.shape[1:3]
        flat = [x.flatten(0, 1) for x in (q, k, tq, tk)]  # [P, L, d]
        live = None if keep is None else keep.repeat_interleave(heads, 0)  # [P, L]
        want = any(ctx.needs_input_grad[:2])
        grads = [torch.empty_like(x) if need else None for x, need in zip(flat, ctx.needs_input_grad[:2], strict=False)]
        total = q.new_zeros(())
        with torch.autocast(q.device.type, enabled=False):
            some = max(1, ENTRIES.get(q.device.type, OTHER_ENTRIES) // max(1, length * length))
            for at in range(0, len(flat[0]), some):
                part = slice(at, at + some)
                sides = [(a[part] * a.shape[-1] ** -0.5, b[part]) for a, b in (flat[:2], flat[2:])]
                z, zt = (torch.bmm(a, b.mT) for a, b in sides)  # [p, L, L]
                weights = None
                if live is not None:
                    z, zt = (x.masked_fill_(~live[part, None], float("-inf")) for x in (z, zt))
                    weights = live[part].to(z.dtype)
                with torch.set_grad_enabled(want):
                    value = distill_loss(
                        z.requires_grad_(want), LogitsTeacher(zt), divergence=divergence, token_weights=weights,
                        reduction="sum",
                    )  # fmt: skip
                total += value.detach()
                if not want:
                    continue
                (dz,) = torch.autograd.grad(value, z)
                if grads[0] is not None:
                    torch.bmm(dz, sides[0][1] * q.shape[-1] ** -0.5, out=grads[0][part])
                if grads[1] is not None:
                    torch.bmm(dz.mT, sides[0][0], out=grads[1][part])
        ctx.save_for_backward(*(None if g is None else g.view_as(q) for g in grads))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
        return (*(None if g is None else g * given for g in ctx.saved_tensors), None, None, None, None)
