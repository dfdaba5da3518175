"""Row losses that are no sum over the vocabulary of one formula: sorted, squared, ranked.

Each is one function of a chunk's rows in plain torch, on any device: no kernel, the same memory bound. It takes
`zs, zt [R, C]`, both sides' logits divided by the temperature (the teacher's may be log-probabilities: they are logits
too), `keep [R, C]` (1, and 0 for a missing entry, where both logits are 0), and its parameters; it returns the loss [R]
and its derivative by zs [R, C]. With a dense teacher C is the vocabulary, with TopK its K entries.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import softplus

from potstill.divergences import Parameter, bind, forward_kl, reverse_kl

__all__ = ["TABLE", "RowLoss", "row_loss"]

INF = float("inf")
TABLE: dict[str, RowLoss] = {}


@dataclass(frozen=True)
class RowLoss:
    """A row loss with its parameters bound; pass it, or its name, as `divergence=`. `takes`: "dense", "sparse"."""

    name: str
    function: Callable[..., tuple[Tensor, Tensor]]
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

    def enter(function: Callable[..., tuple[Tensor, Tensor]]) -> RowLoss:
        expected = ["zs", "zt", "keep", *(p.name for p in parameters)]
        if list(inspect.signature(function).parameters) != expected:
            raise TypeError(f"row loss {function.__name__!r} must take {expected}")
        entry = RowLoss(function.__name__, function, parameters, tuple(p.default for p in parameters), takes)
        TABLE[entry.name] = entry
        return entry

    return enter


def _differences(zs, zt, keep):
    """(z_s - z_t with 0 for missing entries [R, C], number of entries [R, 1])."""
    return (zs - zt) * keep, keep.sum(-1, keepdim=True).clamp(min=1)


def _centred(z, keep):
    return (z - (z * keep).sum(-1, keepdim=True) / keep.sum(-1, keepdim=True).clamp(min=1)) * keep


@row_loss(takes=("dense",))
def mse_logits(zs, zt, keep):
    """mean (z_s - z_t)^2 over the vocabulary: absolute logits; a constant added to one side changes it."""
    d, n = _differences(zs, zt, keep)
    return (d * d / n).sum(-1), 2 * d / n


@row_loss(takes=("dense", "sparse"))
def mse_centred(zs, zt, keep):
    """mean (d - mean d)^2, d = z_s - z_t: the part of mse_logits that a softmax can see."""
    d, n = _differences(zs, zt, keep)
    d = _centred(d, keep)
    return (d * d / n).sum(-1), 2 * d / n


@row_loss(takes=("dense", "sparse"))
def cosine_logits(zs, zt, keep):
    """1 - cosine of the centred logits (centred, so that log-probabilities give the same); 0 where one side is flat."""
    a, b = _centred(zs, keep), _centred(zt, keep)
    length = a.norm(dim=-1, keepdim=True)
    lengths = length * b.norm(dim=-1, keepdim=True)
    some = lengths > 0
    cosine = torch.where(some, (a * b).sum(-1, keepdim=True) / lengths, 1.0)
    slope = torch.where(some, cosine * a / length.square() - b / lengths, 0.0)
    return 1 - cosine[:, 0], slope


@row_loss(Parameter("head_mass", 0.5, 0.0, 1.0), takes=("dense",))
def adaptive_kl(zs, zt, keep, head_mass):
    """h KL(p || q) + (1 - h) KL(q || p), h the share of sum |p - q| that lies in the head of the teacher.

    The head is the fewest most probable entries whose mass reaches head_mass (AKL, arXiv:2404.02657, with the mask in
    the vocabulary's own order). h is a constant for the gradient, and 1/2 where p = q.
    """
    lp, lq = zt.log_softmax(-1), zs.log_softmax(-1)
    p, q = lp.exp(), lq.exp()
    mass, order = p.sort(dim=-1, descending=True, stable=True)
    head = torch.empty_like(p).scatter_(-1, order, (mass.cumsum(-1) - mass < head_mass).to(p.dtype))
    gap = (p - q).abs()
    total = gap.sum(-1, keepdim=True)
    share = torch.where(total > 0, (gap * head).sum(-1, keepdim=True) / total, 0.5)
    value, slope = torch.zeros_like(share), torch.zeros_like(zs)
    for weight, kl in ((share, forward_kl), (1 - share, reverse_kl)):
        term, by_lq = kl.formula(lp, lq)
        value = value + weight * (term + kl.centre * (q - p)).sum(-1, keepdim=True)
        slope = slope + weight * (by_lq - q * by_lq.sum(-1, keepdim=True))
    return value[:, 0], slope


PAIRS = 1 << 22  # differences held at a time


def _over_pairs(zs, zt, keep, loss):
    """Mean of loss(z_i - z_j) -> (value, slope) over the pairs of entries that the teacher puts in the order i, j."""
    values, slopes = torch.zeros_like(zs[:, 0]), torch.zeros_like(zs)
    rows = max(1, PAIRS // max(1, zs.shape[1] ** 2))
    for at in range(0, len(zs), rows):
        s, t, k = zs[at : at + rows], zt[at : at + rows], keep[at : at + rows] > 0
        before = (t[:, :, None] > t[:, None, :]) & k[:, :, None] & k[:, None, :]
        n = before.sum((-1, -2)).clamp(min=1).to(zs.dtype)
        value, slope = (torch.where(before, x, 0.0) for x in loss(s[:, :, None] - s[:, None, :]))
        values[at : at + rows] = value.sum((-1, -2)) / n
        slopes[at : at + rows] = (slope.sum(-1) - slope.sum(-2)) / n[:, None]
    return values, slopes


@row_loss(Parameter("margin", 0.0, -1e-9, INF), takes=("sparse",))
def ranking_hinge(zs, zt, keep, margin):
    """mean max(0, margin - (z_i - z_j)) over the pairs of the K entries with teacher i above teacher j."""
    return _over_pairs(zs, zt, keep, lambda d: ((margin - d).clamp(min=0), -(d < margin).to(d.dtype)))


@row_loss(takes=("sparse",))
def ranking_logistic(zs, zt, keep):
    """mean log(1 + exp(-(z_i - z_j))) over the pairs of the K entries with teacher i above teacher j."""
    return _over_pairs(zs, zt, keep, lambda d: (softplus(-d), -torch.sigmoid(-d)))
