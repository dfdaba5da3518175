"""Every divergence that is a sum over the vocabulary, written once. (row_losses.py has the sorted and squared ones.)

A formula takes the teacher's and the student's log-probability of one vocabulary entry, `lp` and `lq`, and returns
`(term, slope)`: the summand of the divergence at that entry and its derivative by `lq`. With `q = exp(lq)` and
`S = sum(slope)` over the row, the gradient by the student's logits is `(slope - q * S) / temperature`; this identity is
all that the kernels know. The same source runs in torch, as a Triton device function and, spelled, as C++
(see spell.py), so a formula uses only arithmetic, comparisons, `exp`, `expm1`, `log1p`, `abs`, `where` and helpers
written in the same way. Formulas stay in log space, and an entry of probability 0 gives what the limit gives.
A divergence that is a function of such a sum adds `outer(total, slope, *parameters) -> (value,
its derivative by total)` of the two sums; it may use `log` too.

Three kinds share the table: divergences; estimators, whose sum runs over sampled tokens (tail="sampled"); and the
metrics that `return_metrics` names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import abs, exp, expm1, log, log1p, where

if TYPE_CHECKING:
    from potstill.row_losses import RowLoss

__all__ = ["Divergence", "Parameter", "divergence", "get", "names"]


@dataclass(frozen=True)
class Parameter:
    """A parameter of a divergence, accepted in the open interval (low, high)."""

    name: str
    default: float
    low: float
    high: float


def bind(
    name: str, parameters: tuple[Parameter, ...], current: tuple[float, ...], bound: dict[str, float]
) -> tuple[float, ...]:
    """`current` with those in `bound` put in place. Raises TypeError on an unknown one, ValueError out of range."""
    known = [p.name for p in parameters]
    if unknown := [x for x in bound if x not in known]:
        raise TypeError(f"divergence {name!r} got {unknown[0]!r}; it takes {known or 'no parameters'}")
    values = []
    for parameter, old in zip(parameters, current, strict=True):
        value = float(bound.get(parameter.name, old))
        if not parameter.low < value < parameter.high:
            raise ValueError(
                f"divergence {name!r}: {parameter.name}={value} is outside the open interval "
                f"({parameter.low}, {parameter.high})" + LIMIT_HINT.get((name, value), "")
            )
        values.append(value)
    return tuple(values)


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
    outer: Callable[..., Any] | None = None
    kind: str = "divergence"

    @property
    def centre(self) -> float:
        """The `c` for which `term + c * (q - p)` has zero slope where q = p.

        Over complete distributions that addition sums to nothing, but entry by entry it removes the first-order part,
        so that near q = p a sum in fp32 does not cancel.
        """
        return float(self.centre_of(*self.values))

    def __call__(self, **bound: float) -> Divergence:
        return replace(self, values=bind(self.name, self.parameters, self.values, bound))

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
    ("alpha_divergence", 0.0): "; at 0 it is reverse_kl",
    ("alpha_divergence", 1.0): "; at 1 it is forward_kl",
    ("renyi", 0.0): "; at 0 it is 0 for students that miss nothing",
    ("renyi", 1.0): "; at 1 it is forward_kl",
}


def divergence(
    *parameters: Parameter, centre: float | Callable[..., float] = 0.0, outer: Callable[..., Any] | None = None,
    kind: str = "divergence",
) -> Callable[..., Divergence]:  # fmt: skip
    """Enter the decorated formula into the table under its own name.

    `parameters` follow `lp, lq` in the formula's signature. `centre` is a number or a function of the parameters: minus
    the slope at q = p = 1 (see `Divergence.centre`). `outer` takes the row's two sums and the parameters, where both
    sides are complete distributions (tail "bucket" or "renormalize").
    """

    def enter(formula: Callable[..., Any]) -> Divergence:
        arguments = list(inspect.signature(formula).parameters)
        expected = ["lp", "lq", *(p.name for p in parameters)]
        if arguments != expected:
            raise TypeError(f"formula {formula.__name__!r} has arguments {arguments}; the table line says {expected}")
        centre_of = centre if callable(centre) else lambda *_: centre
        defaults = tuple(p.default for p in parameters)
        entry = Divergence(formula.__name__, formula, parameters, defaults, centre_of, outer, kind)
        TABLE[entry.name] = entry
        return entry

    return enter


def names(kind: str = "divergence") -> list[str]:
    """The names in the table, in order of definition."""
    return [name for name, entry in TABLE.items() if entry.kind == kind]


def get(which: str | Divergence | RowLoss) -> Divergence | RowLoss:
    """The divergence, estimator or row loss of that name (default parameters), or `which` itself."""
    from potstill import row_losses

    if isinstance(which, (Divergence, row_losses.RowLoss)):
        return which
    found = TABLE.get(which) if isinstance(which, str) else None
    if found is not None and found.kind != "metric":
        return found
    if isinstance(which, str) and which in row_losses.TABLE:
        return row_losses.TABLE[which]
    known = ", ".join([*names(), *names("estimator"), *row_losses.TABLE])
    raise ValueError(f"divergence={which!r} is not known; known are {known}, or one of these objects")


def __getattr__(name: str) -> RowLoss:
    """The row losses are found here too: `divergences.mse_logits`."""
    from potstill import row_losses

    if name in row_losses.TABLE:
        return row_losses.TABLE[name]
    raise AttributeError(f"module 'potstill.divergences' has no attribute {name!r}")


def times(p, x):
    """p * x, and 0 where p is 0 whatever x is; NaN stays NaN."""
    return where(p == 0, 0.0, p * x)


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
    term = where(p + q == 0, 0.0, 0.5 * (p - q) * (lp - lq))
    return term, 0.5 * (q - p + times(q, lq - lp))


@divergence()
def total_variation(lp, lq):
    """sum |p - q| / 2; the slope at a tie is 0."""
    p = exp(lp)
    q = exp(lq)
    return 0.5 * abs(p - q), 0.5 * where(q > p, q, where(p > q, -q, 0.0))


ALPHA = Parameter("alpha", 0.5, 0.0, 1.0)


def geometric_gap(lp, lq, alpha):
    """a p + (1-a) q - p^a q^(1-a), a = alpha, from differences that do not cancel near p = q."""
    d = lq - lp
    larger = where(d > 0, exp(lq), exp(lp))
    share = where(d > 0, alpha + 0 * larger, 1 - alpha)
    return times(larger, share * expm1(-abs(d)) - expm1(-share * abs(d)))


@divergence(ALPHA, centre=lambda alpha: 1.0 / alpha)
def alpha_divergence(lp, lq, alpha):
    """(1 - sum p^a q^(1-a)) / (a (1-a)), a = alpha: reverse KL towards 0, 4 (1 - sum sqrt(pq)) at 1/2, KL towards 1."""
    term = geometric_gap(lp, lq, alpha) / (alpha * (1 - alpha)) - (exp(lq) - exp(lp)) / alpha
    return term, -exp(alpha * lp + (1 - alpha) * lq) / alpha


def renyi_outer(total, slope, alpha):
    """Of the alpha-divergence's sums, log(m) / (a - 1) for m = sum p^a q^(1-a), and its derivative by the first."""
    lost = alpha * (1 - alpha) * total
    m = where(lost < 0.5, 1 - lost, -alpha * slope)
    return where(lost < 0.5, log1p(-lost), log(m)) / (alpha - 1), where(m > 1e-37, alpha / m, 0.0)


@divergence(ALPHA, centre=lambda alpha: 1.0 / alpha, outer=renyi_outer)
def renyi(lp, lq, alpha):
    """Renyi divergence log(sum p^a q^(1-a)) / (a - 1), a = alpha; in fp32 +inf without gradient past 87 / (1-a)."""
    term = geometric_gap(lp, lq, alpha) / (alpha * (1 - alpha)) - (exp(lq) - exp(lp)) / alpha
    return term, -exp(alpha * lp + (1 - alpha) * lq) / alpha


@divergence(kind="estimator")
def k1(lp, lq):
    """log q - log p at tokens drawn from the student: its mean is KL(q || p), its gradient is not (mean zero)."""
    d = lq - lp
    return d, 1 + 0 * exp(lq)


@divergence(kind="estimator")
def k2(lp, lq):
    """(log q - log p)^2 / 2 at tokens drawn from the student: its gradient's mean is that of KL(q || p)."""
    d = lq - lp
    return 0.5 * d * d, d


@divergence(kind="estimator")
def k3(lp, lq):
    """p/q - 1 - log(p/q) at tokens drawn from the student: mean KL(q || p), never negative, low variance."""
    d = lp - lq
    return expm1(d) - d, -expm1(d)


@divergence(kind="metric")
def student_entropy(lp, lq):
    """-sum q log q."""
    q = exp(lq)
    term = -times(q, lq)
    return term, term - q


@divergence(kind="metric")
def teacher_entropy(lp, lq):
    """-sum p log p."""
    p = exp(lp)
    return -times(p, lp), 0 * p


@divergence(kind="metric")
def acceptance(lp, lq):
    """sum min(p, q): the probability that speculative decoding accepts the student's draft token."""
    p = exp(lp)
    q = exp(lq)
    return where(q < p, q, p), where(q < p, q, 0.0)


@divergence(kind="metric")
def student_mass(lp, lq):
    """sum q over the teacher's entries."""
    q = exp(lq)
    return q, q


@divergence(kind="metric")
def teacher_mass(lp, lq):
    """sum p over the teacher's entries."""
    p = exp(lp)
    return p, 0 * p
