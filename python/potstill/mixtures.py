"""Teachers made of others: mixtures in logit or probability space, masks, and the sources that they alone take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from potstill.teachers import HiddenTeacher, LogitsTeacher, TopK, describe


@dataclass(frozen=True, eq=False)
class Student:
    """The student itself, without gradient; a source of a Mix."""


@dataclass(frozen=True, eq=False)
class OneHot:
    """All mass on `labels` [...]; a source of a Mix in probability space. Rows left out by the loss are free."""

    labels: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.labels, Tensor) or self.labels.is_floating_point():
            raise TypeError(f"OneHot labels must be integers [...], not {describe(self.labels)}")


@dataclass(frozen=True, eq=False)
class Uniform:
    """The same mass on every entry of the vocabulary; a source of a Mix in probability space (label smoothing)."""


SPACES = ("logits", "probabilities")
TAILS = ("uniform", "renormalize")


@dataclass(frozen=True, eq=False)
class Mix:
    """A target made of several sources, evaluated chunk by chunk and never held whole.

    terms: (coefficient, source) or (coefficient, source, temperature). The coefficient is a number, a 0-dim tensor (a
        schedule that must not recompile) or a tensor [...] of one number a row; no gradient goes to it. Sources are
        HiddenTeacher, LogitsTeacher, Student() and, in probability space, OneHot(labels), Uniform() and TopK.
    space: "logits": softmax(sum a_i z_i / T_i), coefficients of any sign (TAID, arXiv:2501.16937; AlignDistil,
        arXiv:2503.02832); "probabilities": sum a_i softmax(z_i / T_i), with coefficients >= 0 that sum to 1.
    tail: what a TopK among the sources has outside its K entries: "uniform" spreads the rest over the other entries,
        "renormalize" drops it. There is no default: a part of the target is made up here, so it has to be named.

    The loss's `temperature` applies to the result, as to any teacher's logits. Raises ValueError or TypeError on terms
    that do not fit.
    """

    terms: Sequence[tuple[Any, ...]]
    space: str = field(default="logits", kw_only=True)
    tail: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.space not in SPACES:
            raise ValueError(f"Mix space={self.space!r} is not known; use one of {', '.join(map(repr, SPACES))}")
        if not self.terms:
            raise ValueError("Mix has no terms; give [(coefficient, source), ...]")
        object.__setattr__(self, "terms", tuple(self._term(i, term) for i, term in enumerate(self.terms)))
        numbers = [a for a, _, _ in self.terms if not isinstance(a, Tensor)]
        if self.space == "probabilities":
            if any(a < 0 for a in numbers):
                raise ValueError(
                    f"Mix in probability space has a negative coefficient among {numbers}; they are masses"
                )
            if len(numbers) == len(self.terms) and abs(sum(numbers) - 1) > 1e-6:
                raise ValueError(f"Mix in probability space has coefficients {numbers}; they must sum to 1")

    def _term(self, i: int, term: Any) -> tuple[Any, Any, float]:
        if not isinstance(term, tuple) or len(term) not in (2, 3):
            raise TypeError(f"Mix term {i} must be (coefficient, source) or (coefficient, source, temperature)")
        a, source, temperature = (*term, 1.0)[:3]
        if not isinstance(a, Tensor) and not (isinstance(a, (int, float)) and math.isfinite(a)):
            raise TypeError(f"Mix term {i}: the coefficient must be a finite number or a tensor, not {describe(a)}")
        dense = (HiddenTeacher, LogitsTeacher, Student)
        accepted = dense if self.space == "logits" else (*dense, OneHot, Uniform, TopK)
        if not isinstance(source, accepted):
            names = ", ".join(c.__name__ for c in accepted)
            raise TypeError(f"Mix term {i}: {describe(source)} is no source in {self.space} space; use {names}")
        if isinstance(source, TopK) and self.tail not in TAILS:
            raise ValueError(
                f"Mix term {i} is a TopK, tail={self.tail!r}: say what stands outside its K entries, tail='uniform' or "
                "'renormalize'"
            )
        if isinstance(source, TopK) and self.tail == "uniform" and source.log_rest is None:
            raise ValueError(f"Mix term {i}: tail='uniform' needs TopK.log_rest; give it, or use tail='renormalize'")
        if isinstance(source, TopK) and temperature != 1:
            raise ValueError(
                f"Mix term {i}: temperature={temperature} on a TopK; give its log_probs at that temperature"
            )
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"Mix term {i}: temperature={temperature} must be positive and finite")
        return a, source, float(temperature)


@dataclass(frozen=True, eq=False)
class Masked:
    """A teacher compared with the student only where the teacher's cumulative mass lies between two bounds.

    An entry's place is the mass of all entries more probable than it plus half its own: 0 is the head of the teacher's
    distribution, 1 its tail. Both sides are multiplied by the mask and renormalised. lower, upper: numbers, or tensors
    [] or [...] that may require grad when softness > 0.
    softness: 0 keeps lower <= place <= upper; s > 0 weights by
    `sigmoid((place - lower) / s) * sigmoid((upper - place) / s)`, whose gradient reaches the bounds (the class range of
    DAC-KL is of this kind; its exact form was not at hand). A row of which nothing is kept counts 0.
    """

    teacher: HiddenTeacher | LogitsTeacher | Mix
    lower: float | Tensor
    upper: float | Tensor
    softness: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.teacher, (HiddenTeacher, LogitsTeacher, Mix)):
            raise TypeError(
                f"Masked takes a HiddenTeacher, LogitsTeacher or Mix, not {describe(self.teacher)}; TopK with "
                "tail='renormalize' is the mask of the K most probable entries"
            )
        if not (math.isfinite(self.softness) and self.softness >= 0):
            raise ValueError(f"Masked softness={self.softness} must be >= 0 and finite")
        for name in ("lower", "upper"):
            bound = getattr(self, name)
            if isinstance(bound, Tensor) and bound.requires_grad and not self.softness:
                raise ValueError(f"Masked {name} requires grad, but a hard mask has none for it; give softness > 0")


Teacher = HiddenTeacher | LogitsTeacher | TopK | Mix | Masked
TEACHERS = (HiddenTeacher, LogitsTeacher, TopK, Mix, Masked)  # torch.compile before 2.7 knows no isinstance of a union
