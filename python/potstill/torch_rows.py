"""Rows that no row kernel serves, in plain torch on any device: row losses, and divergences under a mask.

The contract is that of a row kernel (rows.py), with a few more buffers of the chunk's size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from potstill.divergences import Divergence
from potstill.reference.rows import apply_side, finish, outer
from potstill.row_losses import RowLoss
from potstill.rows import RowSpec

NEG_INF = float("-inf")


def loss_rows(
    student: Tensor, teacher: Tensor, coef: Tensor, labels: Tensor | None, spec: RowSpec, grad: Tensor | None
) -> Tensor:
    """A dense row loss. student [R, Vs], teacher [R, Vt] raw logits -> [2, R]."""
    assert spec.teacher is not None and isinstance(spec.divergence, RowLoss)
    z, chain = apply_side(student, spec.student)
    zt = apply_side(teacher, spec.teacher)[0].to(z.dtype) / spec.temperature
    value, slope = spec.divergence.function(z / spec.temperature, zt, torch.ones_like(zt), *spec.divergence.values)
    return _finished(value, slope / spec.temperature, z, chain, coef, labels, spec, grad)


def loss_entries(
    student: Tensor, ids: Tensor, log_probs: Tensor, coef: Tensor, labels: Tensor | None, spec: RowSpec,
    grad: Tensor | None,
) -> Tensor:  # fmt: skip
    """A row loss over the K entries. student [R, Vs], ids and log_probs [R, K] -> [2, R]."""
    assert isinstance(spec.divergence, RowLoss)
    z, chain = apply_side(student, spec.student)
    given = ids >= 0
    columns = torch.where(given, ids, 0).long()
    zk = torch.where(given, z.gather(1, columns), 0.0) / spec.temperature
    zt = torch.where(given, log_probs.to(z.dtype), 0.0)
    value, slope = spec.divergence.function(zk, zt, given.to(z.dtype), *spec.divergence.values)
    dz = torch.zeros_like(z).scatter_add_(1, columns, torch.where(given, slope / spec.temperature, 0.0))
    return _finished(value, dz, z, chain, coef, labels, spec, grad)


def masked_rows(
    student: Tensor, teacher: Tensor, bounds: Tensor, softness: float, coef: Tensor, labels: Tensor | None,
    spec: RowSpec, grad: Tensor | None, d_bounds: Tensor | None,
) -> Tensor:  # fmt: skip
    """A divergence under the mask of potstill.Masked. bounds [2, R]; d_bounds [2, R] receives their gradient.

    The mask multiplies both sides' probabilities, so its logarithm m is added to both sides' logits:
        d value / d m = (slope - q S) + (slope_p - p S_p)
    where slope_p, the derivative by lp, is term - slope: divergences are homogeneous of degree one in (p, q).
    """
    assert spec.teacher is not None and isinstance(spec.divergence, Divergence)
    z, chain = apply_side(student, spec.student)
    zt = apply_side(teacher, spec.teacher)[0].to(z.dtype) / spec.temperature
    place = _place(zt.softmax(-1))
    lower, upper = (x.to(z.dtype)[:, None] for x in bounds)
    some = torch.ones_like(lower, dtype=torch.bool)
    if softness:
        log_mask = logsigmoid((place - lower) / softness) + logsigmoid((upper - place) / softness)
    else:
        keep = (place >= lower) & (place <= upper)
        some = keep.any(-1, keepdim=True)
        log_mask = torch.where(keep | ~some, 0.0, NEG_INF).to(z.dtype)
    lq = (z / spec.temperature + log_mask).log_softmax(-1)
    lp = (zt + log_mask).log_softmax(-1)
    term, slope = spec.divergence.formula(lp, lq, *spec.divergence.values)
    p, q, total = lp.exp(), lq.exp(), slope.sum(-1, keepdim=True)
    value, factor = outer((term + spec.centre * (q - p)).sum(-1), total, spec)
    dz = (slope - q * total) * factor
    if d_bounds is not None:
        slope_p = term - slope
        dm = dz + (slope_p - p * slope_p.sum(-1, keepdim=True)) * factor
        weight = spec.distill_weight * coef.to(z.dtype) / softness
        d_lower = -(dm * torch.sigmoid((lower - place) / softness)).sum(-1)
        d_upper = (dm * torch.sigmoid((place - upper) / softness)).sum(-1)
        d_bounds.copy_(torch.where(coef != 0, weight * torch.stack([d_lower, d_upper]), 0.0))
    value, dz = torch.where(some[:, 0], value, 0.0), torch.where(some, dz, 0.0)
    return _finished(value, dz / spec.temperature, z, chain, coef, labels, spec, grad)


def _place(p: Tensor) -> Tensor:
    """Mass of the more probable entries and half of one's own, for each entry: [R, V] in (0, 1)."""
    mass, order = p.sort(dim=-1, descending=True, stable=True)
    return torch.empty_like(p).scatter_(-1, order, mass.cumsum(-1) - mass / 2)


def _finished(
    value: Tensor, dz: Tensor, z: Tensor, chain: Tensor | float, coef: Tensor, labels: Tensor | None, spec: RowSpec,
    grad: Tensor | None,
) -> Tensor:  # fmt: skip
    out = torch.zeros(2, len(z), dtype=z.dtype, device=z.device)
    out[0] = value
    lq1 = z.log_softmax(-1) if spec.ce_weight else z
    return finish(out, dz, chain, lq1, coef.to(z.dtype), labels, spec, grad)
