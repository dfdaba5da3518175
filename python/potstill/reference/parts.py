"""The kernels over parts of the vocabulary in plain torch; rows_parts.py is the contract."""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.dispatch import register
from potstill.reference.rows import NEG_INF, apply_side, serves_all
from potstill.rows import RowSpec, Side


def in_part(ids: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Which ids [R, K] lie in the part, and the ids with the others put at `columns`."""
    here = (ids >= 0) & (ids < columns)
    return here, torch.where(here, ids, columns)


def members(ids: Tensor, columns: int) -> Tensor:
    """[R, columns]: whether a column is among the row's ids."""
    marks = torch.zeros(len(ids), columns + 1, dtype=torch.bool, device=ids.device)
    return marks.scatter_(1, in_part(ids, columns)[1], True)[:, :-1]


@register("part_lse", "torch", rank=0, refuses=serves_all)
def part_lse(x: Tensor, side: Side, temperature: float, ids: Tensor | None = None) -> Tensor:
    """See rows_parts.py. x [R, C], ids [R, K] -> [R] fp64."""
    z = apply_side(x, side)[0] / temperature
    if ids is not None:
        z = z.masked_fill(members(ids, side.vocab_size), NEG_INF)
    return z.logsumexp(-1).double()


def _log_probs(x: Tensor, side: Side, lse: Tensor, spec: RowSpec, dtype: torch.dtype) -> Tensor:
    return apply_side(x, side)[0].to(dtype) / spec.temperature - lse.to(dtype)[:, None]


@register("dense_part_sums", "torch", rank=0, refuses=serves_all)
def dense_part_sums(
    student: Tensor, teacher: Tensor, lse_s: Tensor, lse_t: Tensor, coef: Tensor, spec: RowSpec
) -> Tensor:
    """See rows_parts.py. student [R, C], teacher [R, C'], lse_s, lse_t and coef [R] -> [2, R] fp64."""
    assert spec.teacher is not None
    lq = apply_side(student, spec.student)[0] / spec.temperature
    lq = lq - lse_s.to(lq.dtype)[:, None]
    lp = _log_probs(teacher, spec.teacher, lse_t, spec, lq.dtype)
    term, slope = spec.divergence.formula(lp, lq, *spec.divergence.values)
    sums = torch.stack([(term + spec.centre * (lq.exp() - lp.exp())).sum(-1), slope.sum(-1)]).double()
    return torch.where(coef != 0, sums, 0.0)


def _write(
    dz: Tensor, z: Tensor, chain: Tensor | float, coef: Tensor, labels: Tensor | None, lse_1: Tensor, spec: RowSpec,
    grad: Tensor,
) -> None:  # fmt: skip
    """Add the cross-entropy's gradient to dz [R, C] and write grad."""
    if spec.ce_weight:
        assert labels is not None
        here, place = in_part(labels[:, None], z.shape[1])
        dce = torch.exp(z - lse_1.to(z.dtype)[:, None])
        dce.scatter_add_(1, torch.where(here, place, 0), -here.to(z.dtype))
        dz = dz + spec.ce_weight * dce
    dx = torch.where((coef != 0)[:, None], coef.to(z.dtype)[:, None] * dz * chain, 0.0)
    grad[:, : dx.shape[1]] = dx.to(grad.dtype)
    grad[:, dx.shape[1] :] = 0


@register("dense_part_grad", "torch", rank=0, refuses=serves_all)
def dense_part_grad(
    student: Tensor, teacher: Tensor, lse_s: Tensor, lse_t: Tensor, total: Tensor, weight: Tensor, coef: Tensor,
    labels: Tensor | None, lse_1: Tensor, spec: RowSpec, grad: Tensor,
) -> None:  # fmt: skip
    """See rows_parts.py. student and grad [R, C], teacher [R, C'], the others [R]."""
    assert spec.teacher is not None
    z, chain = apply_side(student, spec.student)
    lq = z / spec.temperature - lse_s.to(z.dtype)[:, None]
    lp = _log_probs(teacher, spec.teacher, lse_t, spec, z.dtype)
    slope = spec.divergence.formula(lp, lq, *spec.divergence.values)[1]
    dz = weight.to(z.dtype)[:, None] * (slope - lq.exp() * total.to(z.dtype)[:, None])
    _write(dz, z, chain, coef, labels, lse_1, spec, grad)


@register("sparse_part_grad", "torch", rank=0, refuses=serves_all)
def sparse_part_grad(
    student: Tensor, ids: Tensor, entries: Tensor, lse_s: Tensor, lse_rest: Tensor, outside: Tensor, rest: Tensor,
    coef: Tensor, labels: Tensor | None, lse_1: Tensor, spec: RowSpec, grad: Tensor,
) -> None:  # fmt: skip
    """See rows_parts.py. student and grad [R, C], ids and entries [R, K], the others [R]."""
    z, chain = apply_side(student, spec.student)
    lse_s, lse_rest, outside, rest = (x.to(z.dtype)[:, None] for x in (lse_s, lse_rest, outside, rest))
    zt = z / spec.temperature
    dz = torch.where(outside != 0, -outside * torch.exp(zt - lse_s), 0.0)
    dz = dz + torch.where((rest != 0) & (zt > NEG_INF), rest * torch.exp(zt - lse_rest), 0.0)
    here, place = in_part(ids, z.shape[1])
    dz = torch.where(members(ids, z.shape[1]), 0.0, dz)
    dz = dz.scatter_add_(1, torch.where(here, place, 0), torch.where(here, entries.to(z.dtype), 0.0))
    _write(dz, z, chain, coef, labels, lse_1, spec, grad)
