"""The row kernels in plain torch; they read as the formulas in potstill/rows.py and divergences.py do."""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.dispatch import Facts, register
from potstill.rows import RowSpec, Side

NEG_INF = float("-inf")


def compute_dtype(x: Tensor) -> torch.dtype:
    """fp64 for fp64 logits, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def serves_all(facts: Facts) -> str | None:
    return None if facts.dtype.is_floating_point else f"logits must be floating point, not {facts.dtype}"


def apply_side(x: Tensor, side: Side) -> tuple[Tensor, Tensor | float]:
    """Raw logits [R, V'] -> (logits [R, side.vocab_size], their derivative by the raw ones)."""
    z = x[:, : side.vocab_size].to(compute_dtype(x)) * side.scale
    if not side.softcap:
        return z, side.scale
    t = torch.tanh(z / side.softcap)
    return side.softcap * t, side.scale * (1 - t * t)


def outer(total: Tensor, slope: Tensor, spec: RowSpec) -> tuple[Tensor, Tensor | float]:
    """(divergence [R], its derivative by the terms' sum, [R, 1]) of the sums of terms [R] and slopes [R, 1]."""
    d = spec.divergence
    if d.outer is None:
        return total, 1.0
    value, factor = d.outer(total, slope[:, 0], *d.values)
    return value, factor[:, None]


def finish(
    out: Tensor, dz: Tensor, chain: Tensor | float, lq1: Tensor, coef: Tensor, labels: Tensor | None,
    spec: RowSpec, grad: Tensor | None,
) -> Tensor:  # fmt: skip
    """Add the cross-entropy to out [2, R] and the gradient, scale by coef, write grad, clear the dead rows."""
    live = coef != 0
    if spec.ce_weight:
        assert labels is not None
        index = torch.where(live, labels, 0)[:, None]
        out[1] = -lq1.gather(1, index)[:, 0]
        dce = lq1.exp()
        dce.scatter_add_(1, index, torch.full_like(index, -1, dtype=dce.dtype))
        dz = spec.distill_weight * dz + spec.ce_weight * dce
    else:
        dz = spec.distill_weight * dz
    if grad is not None:
        dx = torch.where(live[:, None], coef[:, None] * dz * chain, 0.0)
        grad[:, : dx.shape[1]] = dx.to(grad.dtype)
        grad[:, dx.shape[1] :] = 0
    return torch.where(live, out, 0.0)


@register("dense_rows", "torch", rank=0, refuses=serves_all)
def dense_rows(
    student: Tensor, teacher: Tensor, coef: Tensor, labels: Tensor | None, spec: RowSpec, grad: Tensor | None
) -> Tensor:
    """See rows.py. student [R, Vs], teacher [R, Vt], coef [R], labels [R] -> [2, R]."""
    assert spec.teacher is not None
    zs, chain = apply_side(student, spec.student)
    zt = apply_side(teacher, spec.teacher)[0].to(zs.dtype)
    lq = torch.log_softmax(zs / spec.temperature, -1)
    lp = torch.log_softmax(zt / spec.temperature, -1)
    term, slope = spec.divergence.formula(lp, lq, *spec.divergence.values)
    q = lq.exp()
    out = torch.zeros(2, len(zs), dtype=zs.dtype, device=zs.device)
    total = slope.sum(-1, keepdim=True)
    out[0], factor = outer((term + spec.centre * (q - lp.exp())).sum(-1), total, spec)
    dz = (slope - q * total) * factor / spec.temperature
    lq1 = lq if spec.temperature == 1 else torch.log_softmax(zs, -1)
    return finish(out, dz, chain, lq1, coef.to(zs.dtype), labels, spec, grad)


@register("sparse_rows", "torch", rank=0, refuses=serves_all)
def sparse_rows(
    student: Tensor, ids: Tensor, log_probs: Tensor, log_rest: Tensor | None, coef: Tensor, labels: Tensor | None,
    spec: RowSpec, grad: Tensor | None, weights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See rows.py. student [R, Vs], ids, log_probs and weights [R, K], log_rest and coef [R], labels [R] -> [2, R]."""
    zs, chain = apply_side(student, spec.student)
    given = ids >= 0
    columns = torch.where(given, ids, 0).long()
    lp = torch.where(given, log_probs.to(zs.dtype), NEG_INF)
    lq_all = torch.log_softmax(zs / spec.temperature, -1)
    lq = torch.where(given, lq_all.gather(1, columns), NEG_INF)
    if spec.tail == "renormalize":
        total = lq.logsumexp(-1, keepdim=True)
        lq = lq - torch.where(total == NEG_INF, 0.0, total)  # a row without entries stays empty
    inside = torch.zeros(len(zs), zs.shape[1] + 1, dtype=torch.bool, device=zs.device)
    inside = inside.scatter_(1, torch.where(given, columns, zs.shape[1]), True)[:, :-1]
    if spec.tail == "bucket":
        assert log_rest is not None
        lq_rest = lq_all.masked_fill(inside, NEG_INF).logsumexp(-1, keepdim=True)
        lp = torch.cat([lp, log_rest.to(zs.dtype)[:, None]], -1)
        lq = torch.cat([lq, lq_rest], -1)
    term, slope = spec.divergence.formula(lp, lq, *spec.divergence.values)
    given = given if spec.tail != "bucket" else torch.cat([given, torch.ones_like(given[:, :1])], -1)
    if spec.tail == "sampled":
        assert weights is not None
        term, slope = weights.to(zs.dtype) * term, weights.to(zs.dtype) * slope
    term, slope = torch.where(given, term, 0.0), torch.where(given, slope, 0.0)
    out = torch.zeros(2, len(zs), dtype=zs.dtype, device=zs.device)
    total = slope.sum(-1, keepdim=True)
    out[0], factor = outer((term + spec.centre * (lq.exp() - lp.exp())).sum(-1), total, spec)
    if spec.tail == "renormalize":
        dz = torch.zeros_like(zs).scatter_add_(1, columns, (slope - lq.exp() * total).where(given, 0.0))
    else:
        dz = -lq_all.exp() * total
        if spec.tail == "bucket":
            share = torch.where(inside | (lq_all == NEG_INF), 0.0, (lq_all - lq[:, -1:]).exp())
            dz = dz + slope[:, -1:] * share
        dz = dz.scatter_add_(1, columns, slope[:, : ids.shape[1]])
    lq1 = lq_all if spec.temperature == 1 else torch.log_softmax(zs, -1)
    return finish(out, dz * factor / spec.temperature, chain, lq1, coef.to(zs.dtype), labels, spec, grad)
