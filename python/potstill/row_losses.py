"""Row losses that are no sum over the vocabulary of one formula: sorted, squared, ranked.

Each is one function of a row's logits in plain torch, differentiated by autograd inside the chunk loop, on any device:
no kernel, the same memory bound. A function takes `zs, zt [R, C]`, both sides' logits divided by the temperature (the
teacher's may be log-probabilities: they are logits too), `keep [R, C]` (False for a missing entry; both logits are 0
there), and its parameters; it returns [R]. With a dense teacher C is the vocabulary, with TopK its K entries.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from potstill.divergences import Parameter, bind

__all__ = ["TABLE", "RowLoss", "row_loss"]

INF = float("inf")
TABLE: dict[str, RowLoss] = {}


@dataclass(frozen=True)
class RowLoss:
    """A row loss with its parameters bound; pass it, or its name, as `divergence=`. `takes`: "dense", "sparse"."""

    name: str
    function: Callable[..., Tensor]
    parameters: tuple[Parameter, ...]
    values: tuple[float, ...]
    takes: tuple[str, ...]
    kind: str = "row loss"

    def __call__(self, **bound: float) -> RowLoss:
        return replace(self, values=bind(self.name, self.parameters, self.values, bound))

    def __repr__(self) -> str:
        pairs = zip(self.parameters, self.values, strict=True)
        return f"{self.name}({', '.join(f'{p.name}={v}' for p, v in pairs)})" if self.values else self.name


def row_loss(*parameters: Parameter, takes: tuple[str, ...]) -> Callable[..., RowLoss]:
    """Enter the decorated function into the table under its own name."""

    def enter(function: Callable[..., Tensor]) -> RowLoss:
        expected = ["zs", "zt", "keep", *(p.name for p in parameters)]
        if list(inspect.signature(function).parameters) != expected:
            raise TypeError(f"row loss {function.__name__!r} must take {expected}")
        entry = RowLoss(function.__name__, function, parameters, tuple(p.default for p in parameters), takes)
        TABLE[entry.name] = entry
        return entry

    return enter


def mean_over(x: Tensor, keep: Tensor) -> Tensor:
    """Mean over the kept entries of each row: [R]."""
    return (x * keep).sum(-1) / keep.sum(-1).clamp(min=1)


@row_loss(takes=("dense",))
def mse_logits(zs, zt, keep):
    """mean (z_s - z_t)^2 over the vocabulary: absolute logits; a constant added to one side changes it."""
    return mean_over((zs - zt).square(), keep)


@row_loss(takes=("dense", "sparse"))
def mse_centred(zs, zt, keep):
    """mean (d - mean d)^2, d = z_s - z_t: the part of mse_logits that a softmax can see."""
    d = (zs - zt) * keep
    return mean_over((d - mean_over(d, keep)[:, None]).square(), keep)


@row_loss(takes=("dense", "sparse"))
def cosine_logits(zs, zt, keep):
    """1 - cosine of the centred logits (centred, so that log-probabilities give the same)."""
    a, b = ((z - mean_over(z, keep)[:, None]) * keep for z in (zs, zt))
    lengths = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(lengths > 0, 1 - (a * b).sum(-1) / lengths.clamp(min=torch.finfo(a.dtype).tiny), 0.0)


@row_loss(Parameter("head_mass", 0.5, 0.0, 1.0), takes=("dense",))
def adaptive_kl(zs, zt, keep, head_mass):
    """g_h KL(p||q) + g_t KL(q||p), g from the share of sum |p - q| that lies in the teacher's head or tail.

    The head is the fewest most probable entries whose mass reaches head_mass (AKL, arXiv:2404.02657, with the mask in
    the vocabulary's own order). g_h + g_t = 1, both 1/2 where p = q; the shares are detached.
    """
    lp, lq = zt.log_softmax(-1), zs.log_softmax(-1)
    p, q = lp.exp(), lq.exp()
    mass, order = p.sort(dim=-1, descending=True, stable=True)
    head = torch.zeros_like(keep).scatter(-1, order, mass.cumsum(-1) - mass < head_mass)
    gap = (p - q).abs().detach()
    total = gap.sum(-1)
    share = torch.where(total > 0, (gap * head).sum(-1) / total.clamp(min=torch.finfo(p.dtype).tiny), 0.5)
    return share * _kl(lp, lq) + (1 - share) * _kl(lq, lp)


def _kl(la: Tensor, lb: Tensor) -> Tensor:
    """KL(a || b) of log-probabilities [R, C]; entries of no mass in a count 0, and carry no gradient."""
    some = la > -INF
    a = torch.where(some, la, 0.0)
    b = torch.where(some, lb, 0.0)
    return (torch.where(some, a.exp(), 0.0) * (a - b)).sum(-1)


def _pairs(zs: Tensor, zt: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Student differences z_i - z_j [R, C, C] of the pairs that the teacher puts in the order i before j, and which."""
    before = (zt[:, :, None] > zt[:, None, :]) & keep[:, :, None] & keep[:, None, :]
    return zs[:, :, None] - zs[:, None, :], before


def _mean_of_pairs(loss: Tensor, before: Tensor) -> Tensor:
    return torch.where(before, loss, 0.0).sum((-1, -2)) / before.sum((-1, -2)).clamp(min=1)


@row_loss(Parameter("margin", 0.0, -1e-9, INF), takes=("sparse",))
def ranking_hinge(zs, zt, keep, margin):
    """mean max(0, margin - (z_i - z_j)) over the pairs of the K entries with teacher i above teacher j."""
    d, before = _pairs(zs, zt, keep)
    return _mean_of_pairs((margin - d).clamp(min=0), before)


@row_loss(takes=("sparse",))
def ranking_logistic(zs, zt, keep):
    """mean log(1 + exp(-(z_i - z_j))) over the pairs of the K entries with teacher i above teacher j."""
    d, before = _pairs(zs, zt, keep)
    return _mean_of_pairs(torch.nn.functional.softplus(-d), before)
