"""`LigerFusedLinearJSDLoss` by this library's kernels: the same constructor, the same call. Liger is not imported.

from potstill.integrations.liger import LigerFusedLinearJSDLoss  # was: from liger_kernel.chunked_loss import ...
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from potstill.integrations.trl import divergence_of
from potstill.losses import linear_distill_loss
from potstill.teachers import Head, HiddenTeacher


class LigerFusedLinearJSDLoss(nn.Module):
    """weight_hard_loss * cross-entropy + weight_soft_loss * JSD(beta), each a mean over the labelled rows.

    beta: 0 is forward KL, 1 reverse KL, between them the JSD with the teacher's weight. temperature divides both sides'
    logits in the JSD; the cross-entropy stays at 1. compiled: taken and ignored, there is nothing to compile.
    chunk_size: rows of the logit buffers; None chooses from a byte budget.

    Equal to Liger's in value and gradient but for: a teacher whose matrix has more rows than the student's (Liger gives
    the student logits of 0 there; here those rows are padding and get no mass, so that equal models have loss 0),
    16-bit inputs (arithmetic after the logits is fp32 here), and logits of -inf.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int | None = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        self.weight_hard_loss, self.weight_soft_loss = weight_hard_loss, weight_soft_loss
        self.divergence, self.beta, self.ignore_index = divergence_of(beta), beta, ignore_index
        self.temperature, self.chunk_size, self.return_soft_hard_loss = temperature, chunk_size, return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """student_input [N, D], student_weight [V, D], teacher_input [N, D_t], teacher_weight [V', D_t] with V' >= V,
        true_labels [N] -> the loss, or (loss, soft, hard) with return_soft_hard_loss; soft and hard are detached.
        """
        size = student_weight.shape[0]
        if teacher_weight.shape[0] < size:
            raise ValueError(
                f"teacher_weight has {teacher_weight.shape[0]} rows, student_weight {size}: the student's vocabulary "
                "is larger, so their tokens are not the same"
            )
        teacher = HiddenTeacher(teacher_input.detach(), Head(teacher_weight, teacher_bias, vocab_size=size).detach())
        head = Head(student_weight, student_bias)
        loss, parts = linear_distill_loss(
            student_input, head, teacher, true_labels, divergence=self.divergence, temperature=self.temperature,
            distill_weight=self.weight_soft_loss, ce_weight=self.weight_hard_loss, ignore_index=self.ignore_index,
            chunk_rows=self.chunk_size, return_metrics=True,
        )  # fmt: skip
        if not self.return_soft_hard_loss:
            return loss
        hard = parts["ce"]
        if not self.weight_hard_loss:  # not computed above
            with torch.no_grad():
                hard = linear_distill_loss(
                    student_input, head, None, true_labels, distill_weight=0.0, ce_weight=1.0,
                    ignore_index=self.ignore_index, chunk_rows=self.chunk_size,
                )  # fmt: skip
        return loss, parts["distill"], hard
