"""Divergences of two coins: whether a chunk is written, by the teacher's probability and by the student's.

Binarised f-divergences as in Minixhofer et al., "Universal Cross-Tokenizer Distillation via Approximate Likelihood
Matching", arXiv 2503.20083.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

DIVERGENCES = ("forward_kl", "soft_cross_entropy", "reverse_kl", "total_variation", "renyi", "squared")
EPS = 1e-6  # nats that keep a certain chunk a little below certain


def coins(x: Tensor, y: Tensor, divergence: str, tau: float, alpha: float) -> Tensor:
    """Divergence of the student's coin exp(x / tau) from the teacher's exp(y / tau), [C]; for an infinite tau the limit
    of tau times it."""
    if math.isinf(tau):
        return _limit(x, y, divergence, alpha)
    return _coins(x / tau, y / tau, divergence, alpha)


class _Log1mexp(torch.autograd.Function):
    """log(1 - exp(x)) for x < 0, with a slope that is right next to 0: -1 / expm1(-x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return -grad / torch.expm1(-x)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0: exact next to 0 and far from it, in value and slope."""
    return _Log1mexp.apply(x)


def _coins(x: Tensor, y: Tensor, divergence: str, alpha: float) -> Tensor:
    """Divergence of the coins q = exp(x - EPS) from p = exp(y - EPS), [C]."""
    b, a = x - EPS, y - EPS
    if divergence == "total_variation":
        return torch.maximum(a, b).exp() * -torch.expm1(-(x - y).abs())
    if divergence == "squared":
        return (x - y).square() / 2
    not_a, not_b = log1mexp(a), log1mexp(b)
    if divergence == "soft_cross_entropy":
        return -(a.exp() * b - torch.expm1(a) * not_b)
    if divergence == "forward_kl":
        return a.exp() * (y - x) - torch.expm1(a) * (not_a - not_b)
    if divergence == "reverse_kl":
        return b.exp() * (x - y) - torch.expm1(b) * (not_b - not_a)
    both = torch.logaddexp(alpha * a + (1 - alpha) * b, alpha * not_a + (1 - alpha) * not_b)
    return both / (alpha - 1)


def _limit(x: Tensor, y: Tensor, divergence: str, alpha: float) -> Tensor:
    """The limit of tau * divergence as tau grows: the coins become rates -x and -y."""
    q, p = EPS - x, EPS - y
    if divergence == "forward_kl":
        return q - p + p * (p / q).log()
    if divergence == "soft_cross_entropy":
        return q - p * q.log()
    if divergence == "reverse_kl":
        return p - q + q * (q / p).log()
    if divergence == "total_variation":
        return (p - q).abs()
    if divergence == "squared":
        return (p - q).square() / 2
    return (p**alpha * q ** (1 - alpha) - alpha * p - (1 - alpha) * q) / (alpha - 1)
