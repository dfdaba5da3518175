"""TRL's divergence losses by the fused kernels, with TRL's call shapes; this module does not import TRL.

    from trl.experimental.gkd import GKDTrainer
    GKDTrainer.generalized_jsd_loss = staticmethod(generalized_jsd_loss)

    from trl.trainer import distillation_trainer
    distillation_trainer._chunked_divergence_loss = chunked_divergence_loss

Their `beta` is the teacher's weight in the mixture, but for its ends: beta = 0 is KL(teacher || student) and beta = 1
KL(student || teacher), where the Jensen-Shannon divergence itself would go to 0 (GKD, arXiv:2306.13649).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from potstill import divergences
from potstill.distributed import gathered, zero3_gathered
from potstill.divergences import Divergence
from potstill.losses import distill_loss, linear_distill_loss
from potstill.teachers import Head, HiddenTeacher, LogitsTeacher


def divergence_of(beta: float) -> Divergence:
    """The divergence that TRL and Liger mean by `beta`, 0 to 1."""
    if not 0 <= beta <= 1:
        raise ValueError(f"beta={beta} must lie in 0..1: 0 is forward KL, 1 reverse KL, between them the JSD")
    if beta in (0, 1):
        return divergences.TABLE["forward_kl" if beta == 0 else "reverse_kl"]
    return divergences.jsd(teacher_weight=float(beta))


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """`GKDTrainer.generalized_jsd_loss`: logits [B, L, V] already shifted, labels [B, L] with -100 to leave a row out.

    reduction: "sum"; "batchmean", the sum over the number of labelled rows, or over B where there are no labels;
        "mean", the sum over rows times V. num_items_in_batch: the sum over this number instead, at least 1.

    Equal to TRL's in value and gradient but for: logits of 16 bits (TRL rounds log-probabilities and beta to 16 bits;
    here everything after them is fp32, and the loss is fp32), logits of -inf (NaN there, finite here), and
    reduction="none", which is refused, as the terms [rows, V] are never held.
    """
    if reduction not in ("batchmean", "sum", "mean"):
        raise ValueError(
            f"reduction={reduction!r} is not offered; use 'batchmean', 'sum' or 'mean' (the [rows, V] terms of 'none' "
            "are never held; ps.distill_loss(..., reduction='none') gives a loss a row)"
        )
    total = distill_loss(
        student_logits, LogitsTeacher(teacher_logits.detach()), labels, divergence=divergence_of(beta),
        temperature=temperature, reduction="sum",
    )  # fmt: skip
    rows: Any = student_logits[..., 0].numel() if labels is None else (labels != -100).sum()
    if num_items_in_batch is not None:
        return total / _at_least_one(num_items_in_batch, total)
    if reduction == "sum":
        return total
    if reduction == "mean":
        return total / _at_least_one(rows * student_logits.shape[-1], total)
    return total / _at_least_one(student_logits.shape[0] if labels is None else rows, total)


def _at_least_one(count: Tensor | int, like: Tensor) -> Tensor:
    return torch.as_tensor(count, dtype=like.dtype, device=like.device).clamp(min=1)


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of `trl.DistillationTrainer`: (loss, sum of the student's entropies in nats, number of valid rows).

    student_hidden_states [B, K, D], teacher_hidden_states [B, K, D_t] aligned to the completion tokens; completion_mask
    [B, K] not 0 where a row counts. The loss is the sum over valid rows by their number (at least 1), or by
    num_items_in_batch (at least 1). The entropy is that of softmax(logits / temperature). Weights may be DTensors or
    ZeRO-3's. Rows by which the teacher's matrix is longer are taken as padding, as TRL does.
    """
    parameters = [student_lm_head_weight, teacher_lm_head_weight, student_lm_head_bias, teacher_lm_head_bias]
    mask = completion_mask != 0
    with zero3_gathered([x for x in parameters if x is not None]):

        def head(weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None, like: Tensor) -> Head:
            size = min(len(student_lm_head_weight), len(weight))
            return Head(  # z / T = (c / T) tanh((s / T) y / (c / T))
                gathered(weight, like.dtype), None if bias is None else gathered(bias, like.dtype),
                logit_scale=scale / temperature, softcap=None if softcap is None else softcap / temperature,
                vocab_size=size,
            )  # fmt: skip

        student = head(
            student_lm_head_weight, student_lm_head_bias, student_logit_scale, student_final_logit_softcapping,
            student_hidden_states,
        )  # fmt: skip
        theirs = head(
            teacher_lm_head_weight, teacher_lm_head_bias, teacher_logit_scale, teacher_final_logit_softcapping,
            teacher_hidden_states,
        ).detach()  # fmt: skip
        total, parts = linear_distill_loss(
            student_hidden_states, student, HiddenTeacher(teacher_hidden_states.detach(), theirs),
            torch.where(mask, 0, -100), divergence=divergence_of(beta), reduction="sum",
            return_metrics=["student_entropy"],
        )  # fmt: skip
    valid = mask.sum()
    loss = total / _at_least_one(valid if num_items_in_batch is None else num_items_in_batch, total)
    return loss, parts["student_entropy"], valid
