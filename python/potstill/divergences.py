"""Every divergence, written once.

A formula takes the teacher's and the student's log-probability of one vocabulary entry, `lp` and `lq`, and returns
`(term, slope)`: the summand of the divergence at that entry and its derivative by `lq`. With `q = exp(lq)` and
`S = sum(slope)` over the row, the gradient by the student's logits is `(slope - q * S) / temperature`; this identity is
all that the kernels know. The same source runs in torch, as a Triton device function and, spelled, as C++
(see spell.py), so a formula uses only arithmetic, comparisons, `exp`, `expm1`, `log1p`, `abs`, `where` and helpers
written in the same way. Formulas stay in log space, and an entry of probability 0 gives what the limit gives.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import abs, exp, expm1, log1p, where

__all__ = ["Divergence", "Parameter", "divergence", "get", "names"]


@dataclass(frozen=True)
class Parameter:
    """A parameter of a divergence, accepted in the open interval (low, high)."""

    name: str
    default: float
    low: float
    high: float


@dataclass(frozen=True)
class Divergence:
    """A divergence with its parameters bound; pass it, or its name, as `divergence=`.

    Calling a parametrised one binds its parameters: `jsd(teacher_weight=0.9)`.
    """

    name: str
    formula: Callable[..., Any]
    parameters: tuple[Parameter, ...]
    values: tuple[float, ...]
    centre_of: Callable[..., float]

    @property
    def centre(self) -> float:
        """The `c` for which `term + c * (q - p)` has zero slope where q = p.

        Over complete distributions that addition sums to nothing, but entry by entry it removes the first-order part,
        so that near q = p a sum in fp32 does not cancel.
        """
        return float(self.centre_of(*self.values))

    def __call__(self, **bound: float) -> Divergence:
        known = [p.name for p in self.parameters]
        for name in bound:
            if name not in known:
                raise TypeError(f"divergence {self.name!r} got {name!r}; it takes {known or 'no parameters'}")
        values = []
        for parameter, current in zip(self.parameters, self.values, strict=True):
            value = float(bound.get(parameter.name, current))
            if not parameter.low < value < parameter.high:
                raise ValueError(
                    f"divergence {self.name!r}: {parameter.name}={value} is outside the open interval "
                    f"({parameter.low}, {parameter.high})" + LIMIT_HINT.get((self.name, value), "")
                )
            values.append(value)
        return replace(self, values=tuple(values))

    def __repr__(self) -> str:
        pairs = zip(self.parameters, self.values, strict=True)
        return f"{self.name}({', '.join(f'{p.name}={v}' for p, v in pairs)})" if self.values else self.name


TABLE: dict[str, Divergence] = {}
LIMIT_HINT = {
    ("skew_forward_kl", 0.0): "; at 0 it is forward_kl",
    ("skew_reverse_kl", 0.0): "; at 0 it is 0 for every student",
    ("skew_reverse_kl", 1.0): "; at 1 it is reverse_kl",
    ("jsd", 0.0): "; at 0 it is 0 for every student; its scaled limit there is forward_kl",
    ("jsd", 1.0): "; at 1 it is 0 for every student; its scaled limit there is reverse_kl",
}


def divergence(*parameters: Parameter, centre: float | Callable[..., float] = 0.0) -> Callable[..., Divergence]:
    """Enter the decorated formula into the table under its own name.

    `parameters` follow `lp, lq` in the formula's signature. `centre` is a number or a function of the parameters: minus
    the slope at q = p = 1 (see `Divergence.centre`).
    """

    def enter(formula: Callable[..., Any]) -> Divergence:
        arguments = list(inspect.signature(formula).parameters)
        expected = ["lp", "lq", *(p.name for p in parameters)]
        if arguments != expected:
            raise TypeError(f"formula {formula.__name__!r} has arguments {arguments}; the table line says {expected}")
        centre_of = centre if callable(centre) else lambda *_: centre
        entry = Divergence(formula.__name__, formula, parameters, tuple(p.default for p in parameters), centre_of)
        TABLE[entry.name] = entry
        return entry

    return enter


def names() -> list[str]:
    """The names in the table, in order of definition."""
    return list(TABLE)


def get(which: str | Divergence) -> Divergence:
    """The divergence of that name (default parameters), or `which` itself."""
    if isinstance(which, Divergence):
        return which
    if isinstance(which, str) and which in TABLE:
        return TABLE[which]
    raise ValueError(f"divergence={which!r} is not known; known are {', '.join(TABLE)}, or a Divergence object")


def times(p, x):
    """p * x, and 0 where p is 0 whatever x is."""
    return where(p > 0, p * x, 0.0)


def log_mixture(lp, lq, teacher_weight):
    """(log m - lp, log m - lq) for m = teacher_weight * p + (1 - teacher_weight) * q, without underflow."""
    d = lq - lp
    e = expm1(-abs(d))
    rest = log1p(where(d > 0, teacher_weight * e, (1 - teacher_weight) * e))
    return where(d > 0, d, 0.0) + rest, where(d > 0, 0.0, -d) + rest


@divergence(centre=1.0)
def forward_kl(lp, lq):
    """KL(p || q) = sum p (log p - log q)."""
    p = exp(lp)
    return times(p, lp - lq), -p


@divergence(centre=-1.0)
def reverse_kl(lp, lq):
    """KL(q || p) = sum q (log q - log p)."""
    q = exp(lq)
    term = times(q, lq - lp)
    return term, term + q


@divergence()
def soft_cross_entropy(lp, lq):
    """-sum p log q: forward KL plus the teacher's entropy."""
    p = exp(lp)
    return times(p, -lq), -p


WEIGHT = Parameter("teacher_weight", 0.5, 0.0, 1.0)


@divergence(WEIGHT)
def jsd(lp, lq, teacher_weight):
    """w KL(p || m) + (1 - w) KL(q || m), m = w p + (1 - w) q, w = teacher_weight."""
    up, uq = log_mixture(lp, lq, teacher_weight)
    slope = -(1 - teacher_weight) * times(exp(lq), uq)
    return slope - teacher_weight * times(exp(lp), up), slope


@divergence(Parameter("teacher_weight", 0.1, 0.0, 1.0), centre=lambda w: 1.0 - w)
def skew_forward_kl(lp, lq, teacher_weight):
    """KL(p || m), m = w p + (1 - w) q, w = teacher_weight (DistiLLM, arXiv:2402.03898)."""
    p = exp(lp)
    up, uq = log_mixture(lp, lq, teacher_weight)
    return -times(p, up), -(1 - teacher_weight) * times(p, exp(-uq))


@divergence(Parameter("teacher_weight", 0.9, 0.0, 1.0), centre=lambda w: -w)
def skew_reverse_kl(lp, lq, teacher_weight):
    """KL(q || m), m = w p + (1 - w) q, w = teacher_weight (DistiLLM, arXiv:2402.03898)."""
    q = exp(lq)
    up, uq = log_mixture(lp, lq, teacher_weight)
    term = -times(q, uq)
    return term, term + teacher_weight * times(q, exp(-up))


@divergence()
def symmetric_kl(lp, lq):
    """(KL(p || q) + KL(q || p)) / 2 = sum (p - q) (log p - log q) / 2."""
    p = exp(lp)
    q = exp(lq)
    term = where(p + q > 0, 0.5 * (p - q) * (lp - lq), 0.0)
    return term, 0.5 * (q - p + times(q, lq - lp))


@divergence()
def total_variation(lp, lq):
    """sum |p - q| / 2; the slope at a tie is 0."""
    p = exp(lp)
    q = exp(lq)
    return 0.5 * abs(p - q), 0.5 * where(q > p, q, where(p > q, -q, 0.0))
