"""Numbers that change while training: TAID's controller, ramps, stages, and weights from detached ratios of losses."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from torch import Tensor

from potstill.arguments import check_choice


class TAIDController:
    """TAID's adaptive share t of the teacher in the target softmax((1 - t) sg(z_student) + t z_teacher).

    With L_n the loss of step n of N (n from 0; the first call only stores L):
        delta = (L_{n-1} - L_n) / (L_{n-1} + 1e-15);  m <- beta m + (1 - beta) delta
        t <- min(t_end, max(t_start + (t_end - t_start) n / N, t + alpha sigmoid(m) (1 - t)))

    arXiv:2501.16937, read in the authors' code, which gives it the soft cross-entropy; the KL divergence (that without
    the target's entropy) moves t otherwise, as its relative changes are larger. The driver is what you pass: train with
    divergence="soft_cross_entropy" or "forward_kl" and hand over that loss. alpha = 0 leaves the linear ramp.

        t = controller.t
        loss = linear_distill_loss(h, head, Mix([(1 - t, Student()), (t, teacher)]), divergence="soft_cross_entropy")
        controller.update(loss)
    """

    def __init__(
        self, steps: int, *, t_start: float = 0.4, t_end: float = 1.0, alpha: float = 5e-4, beta: float = 0.99
    ) -> None:
        if steps < 1 or not 0 <= t_start <= t_end <= 1:
            raise ValueError(f"steps={steps} must be at least 1 and 0 <= t_start={t_start} <= t_end={t_end} <= 1")
        if alpha < 0 or not 0 <= beta < 1:
            raise ValueError(f"alpha={alpha} must be at least 0 and beta={beta} in [0, 1)")
        self.steps, self.t_start, self.t_end, self.alpha, self.beta = steps, t_start, t_end, alpha, beta
        self.t = t_start
        self.momentum = 0.0
        self.previous: float | None = None
        self.step = 0

    def update(self, loss: float | Tensor, step: int | None = None) -> float:
        """t for the next step, from the loss of this one. `step`: n; None counts the calls.

        A loss on a device is read back: pass one of an earlier step where that wait matters.
        """
        n = self.step if step is None else step
        loss = float(loss.detach() if isinstance(loss, Tensor) else loss)
        self.step = n + 1
        if self.previous is None:
            self.previous = loss
            return self.t
        relative = (self.previous - loss) / (self.previous + 1e-15)
        self.momentum = self.beta * self.momentum + (1 - self.beta) * relative
        self.previous = loss
        moved = self.t + self.alpha * _sigmoid(self.momentum) * (1 - self.t)
        ramp = self.t_start + (self.t_end - self.t_start) * n / self.steps
        self.t = min(self.t_end, max(ramp, moved))
        return self.t

    def state_dict(self) -> dict[str, Any]:
        return {"t": self.t, "momentum": self.momentum, "previous": self.previous, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.t, self.momentum = state["t"], state["momentum"]
        self.previous, self.step = state["previous"], state["step"]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


SHAPES = ("linear", "cosine", "exponential")


@dataclass(frozen=True)
class Ramp:
    """A number as a function of the step: `start` until step `after`, then to `end` within `steps`.

    shape: "linear", "cosine" (half a wave) or "exponential" (a constant factor a step; start and end above 0).
    ALBEF's share of the momentum target is Ramp(0, 0.4, steps_of_an_epoch) (arXiv:2107.07651, read in the authors'
    code); a factor 0.9 an iteration is Ramp(a, a * 0.9**n, n, shape="exponential").
    """

    start: float
    end: float
    steps: int
    after: int = field(default=0, kw_only=True)
    shape: str = field(default="linear", kw_only=True)

    def __post_init__(self) -> None:
        check_choice("shape", self.shape, SHAPES)
        if self.steps < 1 or self.after < 0:
            raise ValueError(f"steps={self.steps} must be at least 1 and after={self.after} at least 0")
        if self.shape == "exponential" and not (self.start > 0 and self.end > 0):
            raise ValueError(f"an exponential ramp from {self.start} to {self.end} needs both above 0")

    def __call__(self, step: int) -> float:
        x = min(1.0, max(0.0, (step - self.after) / self.steps))
        if x in (0.0, 1.0):
            return self.end if x else self.start
        if self.shape == "exponential":
            return self.start * (self.end / self.start) ** x
        if self.shape == "cosine":
            x = (1 - math.cos(math.pi * x)) / 2
        return self.start + (self.end - self.start) * x


@dataclass(frozen=True)
class Stage:
    """A stage of a recipe: `steps` long, with its own options (loss weights, teacher, data, learning rate, ...)."""

    name: str
    steps: int
    options: dict[str, Any] = field(default_factory=dict)


class Stages:
    """Stages one after another; `at(step)` is the stage of a step and how many steps of it are behind.

    The last stage goes on without end. ERNIE-Tiny's four (arXiv:2106.02241, from memory) are hidden and attention
    losses in three stages with teacher and data exchanged, then soft and hard labels.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        if not stages or any(stage.steps < 1 for stage in stages):
            raise ValueError(f"{len(stages)} stages were given; at least one is needed, each of at least 1 step")
        self.stages = list(stages)
        self.ends = list(accumulate(stage.steps for stage in stages))

    def at(self, step: int) -> tuple[Stage, int]:
        if step < 0:
            raise ValueError(f"step={step} must be at least 0")
        i = min(bisect_right(self.ends, step), len(self.stages) - 1)
        return self.stages[i], step - (self.ends[i - 1] if i else 0)

    @property
    def steps(self) -> int:
        """Steps of all stages together."""
        return self.ends[-1]


def loss_ratio(reference: Tensor, loss: Tensor) -> Tensor:
    """sg(reference) / sg(loss), no gradient; 1 where the loss is 0 (and has nothing to weigh)."""
    r, x = reference.detach(), loss.detach()
    return (r / x.where(x != 0, r.new_ones(()))).where(x != 0, r.new_ones(()))


def balanced_total(
    cross_entropy: Tensor | None, logits_loss: Tensor, hidden_loss: Tensor | None = None, *, scale: float = 1.0
) -> Tensor:
    """CE + scale * sg(CE)/sg(KD) * KD with KD = logits + sg(logits)/sg(hidden) * hidden; without CE, KD alone.

    Scalars. Every ratio is of detached values, so that the gradient is that of a sum with constant weights.
    The balancer of Minitron, arXiv:2407.14679 (read in the code of ModelOpt, which uses KL divergences here: a soft
    cross-entropy's constant would shift the ratios).
    """
    kd = logits_loss if hidden_loss is None else logits_loss + loss_ratio(logits_loss, hidden_loss) * hidden_loss
    return kd if cross_entropy is None else cross_entropy + scale * loss_ratio(cross_entropy, kd) * kd
