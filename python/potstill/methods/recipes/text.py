"""Recipes on text and labels that a teacher wrote, filtered or voted on (family D): weighted cross-entropy alone.

What writes, runs, criticises or retrieves is outside of this library; its verdict arrives here as a weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from potstill.losses import linear_distill_loss
from potstill.methods.hidden import hidden_loss, wide
from potstill.methods.papers import ABSTRACT, CODE, row
from potstill.teachers import Head


def weighted_text(
    student_hidden: Tensor, student_head: Head | Tensor, labels: Tensor, weights: Tensor | None = None, *,
    num_items: int | Tensor | None = None, **options: Any,
) -> Any:  # fmt: skip
    """sum_i w_i CE(y_i | x_i) / sum_i w_i over the tokens of written or filtered examples.

    student_hidden: [B, T, D].  labels: [B, T] int64, -100 for the prompt.  weights: [B] by example, [B, T] by token, or
    None: all 1. An example of weight 0 (a critic's no, a failed run, a lost vote) has no gradient at all.
    """
    if weights is not None:
        weights = weights[:, None].expand(labels.shape) if weights.dim() == 1 else weights
    words: dict[str, Any] = dict(distill_weight=0.0, ce_weight=1.0, token_weights=weights, num_items=num_items)
    return linear_distill_loss(student_hidden, student_head, None, labels, **words, **options)


TEXT = {
    54: ("Symbolic knowledge distillation", "arXiv:2110.07178", "a critic's filter"),
    55: ("Clinical Camel", "arXiv:2305.12031", "dialogues written from articles"),
    56: ("Visual program distillation", "arXiv:2312.03052", "the runs of programs that were right"),
    57: ("TSMMG", "arXiv:2403.13244", "pairs of text and molecule"),
    58: ("Program distillation for numerical reasoning", "arXiv:2305.18170", "programs that ran to the answer"),
    59: ("Distillation for adverse drug events", "arXiv:2307.06439", "labels of a language model"),
    60: ("Impossible Distillation", "arXiv:2305.16635", "pairs of sentences that passed its filters"),
    61: ("SleepCoT", "arXiv:2410.16924", "chains of thought"),
    62: ("I2D2", "arXiv:2212.09246", "a critic's filter, then its own generations"),
    63: ("LogiGLUE", "arXiv:2310.00836", "chains of thought"),
    64: ("NeuroComparatives", "arXiv:2305.04978", "constrained decoding"),
    65: ("UniversalNER", "arXiv:2308.03279", "entities named by a language model"),
    66: ("NesyCD", "arXiv:2409.13203", "reasoning beside retrieved knowledge"),
    67: ("PromptMix", "arXiv:2310.14192", "examples near the border of classes, labelled again"),
    68: ("CensorChat", "arXiv:2403.13250", "labels by vote"),
}
for number, (paper, source, what) in TEXT.items():
    row(
        number, paper, source, family="D", knowledge=CODE if number == 66 else ABSTRACT, status="part",
        formula="sum_i w_i CE(y_i | x_i), w in {0, 1} from a critic, an execution or a vote",
        note=f"Its data ({what}) are made outside.",
    )(weighted_text)  # fmt: skip


@row(
    69, "Distilling step-by-step", "arXiv:2305.02301", family="D", knowledge=CODE,
    formula="alpha CE(label task) + (1 - alpha) CE(rationale task), alpha = 0.5",
    note="The paper writes L_label + lambda L_rationale: the same up to a factor, lambda = (1 - alpha) / alpha.",
)  # fmt: skip
def labels_and_rationales(
    student_hidden: Tensor, student_head: Head | Tensor, labels: Tensor, rationale: Tensor, *, alpha: float = 0.5
) -> Any:
    """One batch of two tasks, told apart by their prefix: alpha times the mean over label tokens, plus the other's.

    labels: [B, T].  rationale: bool [B], the examples of the rationale task; the others are of the label task.
    """
    live = labels != -100
    share = torch.zeros(labels.shape, dtype=wide(student_hidden[:0]).dtype, device=labels.device)
    for of_task, weight in ((live & ~rationale[:, None], alpha), (live & rationale[:, None], 1 - alpha)):
        share = share + weight * of_task.to(share.dtype) / of_task.sum().clamp(min=1)
    words: dict[str, Any] = dict(distill_weight=0.0, ce_weight=1.0, token_weights=share, reduction="sum")
    return linear_distill_loss(student_hidden, student_head, None, labels, **words)


@row(
    70, "Multi-hop self-distillation of vision-language models", "arXiv:2503.01754", family="D",
    knowledge=ABSTRACT, status="part",
    formula="CE on its own ensembled traces, or MSE to the hidden states of the run with the trace",
    note="Which of the two was not at hand (the abstract speaks of traces in the form of hidden states); the modules "
    "that intervene in them are outside.",
)  # fmt: skip
def traces(
    student_hidden: Tensor, student_head: Head | Tensor, labels: Tensor, *, traced_hidden: Tensor | None = None,
    ce_weight: float = 1.0, hidden_weight: float = 1.0,
) -> Any:  # fmt: skip
    """Cross-entropy on labelled rows; where given, the squared error to the states of the run that saw the trace."""
    loss = ce_weight * weighted_text(student_hidden, student_head, labels)
    if traced_hidden is None:
        return loss
    return loss + hidden_weight * hidden_loss(student_hidden, traced_hidden, token_weights=labels != -100)
