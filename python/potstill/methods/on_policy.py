"""Training on what the student writes: the loss of a rollout, and the recipes of GKD and DistillSpec.

recipe = gkd(student, eos_token_id=2, pad_token_id=0, max_new_tokens=64, on_policy=0.5, teacher_weight=0.9)
for step, batch in enumerate(loader):
    rollout = recipe.rollouts(batch["prompts"], completions=batch["completions"], step=step).to(device)
    loss = recipe.loss(student, teacher, rollout)
    loss.backward(); optimizer.step(); optimizer.zero_grad()
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from potstill import divergences
from potstill.capture.hidden import final_hidden, teacher_hidden
from potstill.losses import linear_distill_loss
from potstill.teachers import Head, HiddenTeacher

from .rollout import Rollout, Rollouts, Source
from .sources import mixture_source, model_source, outside_top_k


def rollout_loss(student: Any, teacher: Any, rollout: Rollout, **objective: Any) -> Tensor:
    """`linear_distill_loss` over the rows that predict the completions of a rollout; the words of `objective` are its.

    student, teacher: transformers causal LMs of one vocabulary. The student's forward has gradients; the sampling
    has none: the on-policy loss of GKD without a policy gradient (arXiv:2306.13649, eq. 3).
    """
    student_hidden, _ = final_hidden(
        student, input_ids=rollout.tokens, attention_mask=rollout.mask.long(), use_cache=False
    )
    device = next(teacher.parameters()).device
    hidden = teacher_hidden(teacher, rollout.tokens.to(device), rollout.mask.long().to(device))
    return linear_distill_loss(
        student_hidden,
        Head.from_model(student, hidden="head_input"),
        HiddenTeacher(hidden.to(student_hidden.device), Head.from_model(teacher, hidden="head_input").detach()),
        rollout.labels,
        **objective,
    )


@dataclass(frozen=True)
class Recipe:
    """Rollouts and the objective over them: `recipe.loss(student, teacher, recipe.rollouts(prompts, step=step))`."""

    rollouts: Rollouts
    objective: Mapping[str, Any] = field(default_factory=dict)

    def loss(self, student: Any, teacher: Any, rollout: Rollout) -> Tensor:
        """`rollout_loss` with this recipe's objective."""
        return rollout_loss(student, teacher, rollout, **self.objective)


def gkd(
    student: Any,
    *,
    eos_token_id: Any,
    pad_token_id: int,
    max_new_tokens: int,
    on_policy: float = 0.5,
    teacher_weight: float = 0.5,
    temperature: float = 1.0,
    seed: int = 0,
    **objective: Any,
) -> Recipe:
    """Generalised knowledge distillation (arXiv:2306.13649).

    A share `on_policy` (lambda) of the sequences is the student's, sampled at temperature 1 as it stands, the others
    are given; the divergence is JSD with the teacher's weight in the mixture (their beta), or what `divergence` says.
    """
    words = {"divergence": divergences.jsd(teacher_weight=teacher_weight), "temperature": temperature, **objective}
    writer = model_source(student, eos_token_id=eos_token_id, pad_token_id=pad_token_id)
    rollouts = Rollouts(
        {"student": writer, "data": None},
        {"student": on_policy, "data": 1 - on_policy},
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_token_id,
        seed=seed,
    )
    return Recipe(rollouts, words)


def distillspec(
    student: Any,
    teacher: Any,
    *,
    eos_token_id: Any,
    pad_token_id: int,
    max_new_tokens: int,
    divergence: Any = "total_variation",
    teacher_weight: float = 0.0,
    seed: int = 0,
    **objective: Any,
) -> Recipe:
    """A draft model for speculative decoding (arXiv:2310.08461).

    All sequences are written by the draft (`student`), or by a mixture with a share `teacher_weight` of the target;
    1 - total variation is the chance that a drafted token is accepted.
    """
    words = {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    writer: Source = model_source(student, **words)
    if teacher_weight > 0:
        writer = mixture_source(student, teacher, teacher_weight=teacher_weight, **words)
    rollouts = Rollouts(
        {"draft": writer}, {"draft": 1.0}, max_new_tokens=max_new_tokens, pad_token_id=pad_token_id, seed=seed
    )
    return Recipe(rollouts, {"divergence": divergence, **objective})


def speculative_kd(
    student: Any,
    teacher: Any,
    *,
    eos_token_id: Any,
    pad_token_id: int,
    max_new_tokens: int,
    k: int = 25,
    rounds: int = 4,
    seed: int = 0,
    **objective: Any,
) -> Recipe:
    """The student writes; where a token is not among the teacher's k most probable the teacher writes on.

    In the spirit of arXiv:2410.11325, which replaces single tokens and lets the student go on; here the teacher keeps
    the pen.
    """
    words = {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    rollouts = Rollouts(
        {"student": model_source(student, **words)},
        {"student": 1.0},
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_token_id,
        first_error=outside_top_k(teacher, k, pad_token_id=pad_token_id),
        regenerate=model_source(teacher, top_k=k, **words),
        rounds=rounds,
        seed=seed,
    )
    return Recipe(rollouts, {"divergence": "forward_kl", **objective})


@torch.no_grad()
def acceptance_rate(student: Any, teacher: Any, rollout: Rollout) -> float:
    """Mean chance that the teacher accepts the student's token on the rows of a rollout: 1 - total variation."""
    return 1.0 - float(rollout_loss(student, teacher, rollout, divergence="total_variation"))
