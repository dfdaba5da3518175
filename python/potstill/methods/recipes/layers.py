"""Recipes that join the student's distribution with its hidden states, blocks or relations (family A of the catalog).

student_hidden: [B, T, D], the last states.  student_head: Head, or its weight [V, D].  labels: [B, T] int64, -100
leaves a
row out.  student_layers, teacher_layers: sequences of [B, T, D_s] and [B, T, D_t].  Every recipe returns a scalar
unless it
says more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from potstill.losses import linear_distill_loss
from potstill.methods.hidden import Pairs, Projector, frobenius, hidden_loss, normalized_mse, over_layers, unit
from potstill.methods.papers import CODE, MEMORY, SECOND_HAND, row
from potstill.methods.relation import gram_loss
from potstill.methods.schedules import balanced_total
from potstill.mixtures import Teacher
from potstill.teachers import Head, HiddenTeacher

Layers = Sequence[Tensor]


@row(
    9, "Minitron", "arXiv:2407.14679", family="A", status="part",
    knowledge=f"losses and balancer {CODE}; their sum {SECOND_HAND}; 'KL alone is best, T = 1' {MEMORY}",
    formula="CE + w KL(p || q at tau) + alpha mean over layers of Loss(h_T, W h_S), alpha = sg(KL) / sg(hidden), w = "
    "sg(CE) / sg(KD)",
    note="Pruning is outside. Without labels the loss is KD alone.",
)  # fmt: skip
def balanced_layers(
    student_hidden: Tensor, student_head: Head | Tensor, teacher: Teacher, student_layers: Layers,
    teacher_layers: Layers,
    pairs: Pairs | None = None, labels: Tensor | None = None, *, projectors: Sequence[Projector] | None = None,
    temperature: float = 1.0, scale: float = 1.0, **options: Any,
) -> Tensor:  # fmt: skip
    """Cross-entropy, KL and hidden states, each brought to the size of the other by ratios that carry no gradient.

    projectors: one a pair, on the student's side.  options go to `hidden.hidden_loss`.
    """
    words: dict[str, Any] = dict(divergence="forward_kl", temperature=temperature)
    kl = linear_distill_loss(student_hidden, student_head, teacher, labels, **words)
    ce = None
    if labels is not None:
        ce = linear_distill_loss(student_hidden, student_head, None, labels, distill_weight=0.0, ce_weight=1.0)
    between = over_layers(hidden_loss, student_layers, teacher_layers, pairs, student_projectors=projectors, **options)
    return balanced_total(ce, kl, between, scale=scale)


def kl_and_cosine(
    student_hidden: Tensor, student_head: Head | Tensor, teacher: HiddenTeacher, *,
    projector: Projector | None = None, token_weights: Tensor | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """KL(p || q) + (1 - cos) of the last hidden states, no cross-entropy: Puzzle's repair of the whole model."""
    words: dict[str, Any] = dict(token_weights=token_weights, **options)
    loss: Tensor = linear_distill_loss(student_hidden, student_head, teacher, **words)
    more = dict(distance="cosine", student_projector=projector, token_weights=token_weights)
    return loss + hidden_loss(student_hidden, teacher.hidden, **more)  # type: ignore[arg-type]


@row(
    10, "Puzzle", "arXiv:2411.19146", family="A", status="part",
    knowledge=f"block loss, cosine and replace-one scores {CODE}; which mix is best at the end {MEMORY}",
    formula="each block on the teacher's inputs: MSE(o_S, o_T) / (MSE(o_T, 0) + 1e-6); score of a candidate: KL of "
    "the model with one block replaced; at last KL + (1 - cos)",
    note="`blocks.block_losses` runs the blocks, `blocks.replace_one_scores` scores; the integer programme that "
    "chooses is outside.",
    also=(kl_and_cosine,),
)  # fmt: skip
def block_normalized_mse(student_output: Tensor, teacher_output: Tensor, *, eps: float = 1e-6) -> Tensor:
    """MSE(o_S, o_T) / (MSE(o_T, 0) + eps) of one block: the `loss` of `blocks.block_losses`."""
    return normalized_mse(student_output, teacher_output, eps=eps)


@row(
    12, "LLaVA-KD", "arXiv:2410.16236", family="A",
    knowledge=f"the relation matrix and the divergences {CODE}; 1 - cos and which divergence {MEMORY}",
    formula="KL on answer and visual tokens + 1 - cos(vec R_S, vec R_T), R = X X^T of the visual tokens at unit "
    "length",
)  # fmt: skip
def kl_and_relation(
    student_hidden: Tensor, student_head: Head | Tensor, teacher: HiddenTeacher, visual: Tensor, keep: Tensor, *,
    divergence: Any = "forward_kl", relation_weight: float = 1.0, **options: Any,
) -> Tensor:  # fmt: skip
    """A divergence on the kept rows and the cosine of the Gram matrices of the visual ones, whatever the widths.

    visual: bool [B, T].  keep: bool [B, T], the rows of the divergence (answer and visual tokens).
    """
    words: dict[str, Any] = dict(divergence=divergence, token_weights=keep, **options)
    loss: Tensor = linear_distill_loss(student_hidden, student_head, teacher, **words)
    relation = gram_loss(student_hidden, teacher.hidden, distance="cosine", normalize=True, token_weights=visual)
    return loss + relation_weight * relation


def kl_by_sequence(
    student_hidden: Tensor, student_head: Head | Tensor, teacher: Teacher, labels: Tensor | None = None, *,
    temperature: float = 1.0, **options: Any,
) -> Any:  # fmt: skip
    """T^2 KL summed over all rows and divided by the number of sequences (`batchmean` of [B, T, V] logits)."""
    words: dict[str, Any] = dict(temperature=temperature, scale_by_t2=True, num_items=len(student_hidden), **options)
    return linear_distill_loss(student_hidden, student_head, teacher, labels, **words)


@row(
    13, "mmMamba", "arXiv:2502.13145", family="A", knowledge=CODE,
    formula="stages 1, 2: 1000 x mean over converted layers of MSE(attention output); stage 3: T^2 KL(p || q), T = 1, "
    "divided by B alone",
    note="The teacher's output goes on to the next layer: `blocks.block_losses`.",
    also=(kl_by_sequence,),
)  # fmt: skip
def block_outputs_mse(student_outputs: Layers, teacher_outputs: Layers, *, scale: float = 1000.0) -> Tensor:
    """scale times the mean over blocks of the squared error of their outputs, each block on the teacher's input."""
    return scale * over_layers(hidden_loss, student_outputs, teacher_outputs)


@row(
    14, "MaTVLM", "arXiv:2503.13440", family="A", knowledge=CODE,
    formula="KL(p || q) / B, T = 1, + sum over replaced layers of |f_S(h_T) - h_T'|_F (norm, not square)",
    note="The code's 'jsd' is (KL(m || q) + KL(m || p)) / 2, which is no JSD; `divergences.jsd` is one.",
)  # fmt: skip
def kl_and_block_norms(
    student_hidden: Tensor, student_head: Head | Tensor, teacher: Teacher, student_outputs: Layers,
    teacher_outputs: Layers, labels: Tensor | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """KL divided by the number of sequences, and the Frobenius norm of each replaced block's error, summed."""
    loss: Tensor = kl_by_sequence(student_hidden, student_head, teacher, labels, **options)
    return loss + over_layers(frobenius, student_outputs, teacher_outputs, total="sum")


@row(
    15, "Efficient transformer distillation, a review", "arXiv:2311.13657", family="A", knowledge=MEMORY,
    formula="a_ce T^2 KL(p/T || q/T) + a_mlm CE + a_cos (1 - cos(h_S, h_T)), T = 2 (the DistilBERT recipe)",
)  # fmt: skip
def kl_ce_and_cosine(
    student_hidden: Tensor, student_head: Head | Tensor, teacher: HiddenTeacher, labels: Tensor, *,
    keep: Tensor | None = None,
    kl_weight: float = 5.0, ce_weight: float = 2.0, cosine_weight: float = 1.0, temperature: float = 2.0,
    **options: Any,
) -> Tensor:  # fmt: skip
    """T^2 KL and cross-entropy on labelled rows, cosine of the last hidden states on kept rows (None: all)."""
    words: dict[str, Any] = dict(
        distill_weight=kl_weight, ce_weight=ce_weight, temperature=temperature, scale_by_t2=True, **options
    )
    loss: Tensor = linear_distill_loss(student_hidden, student_head, teacher, labels, **words)
    return loss + cosine_weight * hidden_loss(student_hidden, teacher.hidden, distance="cosine", token_weights=keep)


@row(
    16, "SquareHead", "arXiv:2310.06927", family="A", knowledge=CODE,
    formula="sum over layers of MSE(h_S, h_T) / (MSE(h_T, 0) + 2^-7) over non-padding tokens + h T^2 sum KL / #tokens "
    "+ c CE",
)  # fmt: skip
def layers_normalized_mse(
    student_hidden: Tensor, student_head: Head | Tensor, teacher: Teacher, labels: Tensor, student_layers: Layers,
    teacher_layers: Layers, keep: Tensor, *, eps: float = 2.0**-7, kl_weight: float = 1.0, ce_weight: float = 1.0,
    temperature: float = 1.0, pairs: Pairs | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """Each layer's squared error over its own size, summed; T^2 KL and cross-entropy on the labelled rows.

    keep: bool [B, T], rows that are no padding.  Give the layers without the embeddings.
    """
    words: dict[str, Any] = dict(
        distill_weight=kl_weight, ce_weight=ce_weight, temperature=temperature, scale_by_t2=True, **options
    )
    loss: Tensor = linear_distill_loss(student_hidden, student_head, teacher, labels, **words)
    each: dict[str, Any] = dict(total="sum", eps=eps, token_weights=keep)
    return loss + over_layers(normalized_mse, student_layers, teacher_layers, pairs, **each)


@row(
    17, "oBERT", "arXiv:2203.07259", family="A", knowledge=CODE, status="part",
    formula="(1 - h) CE + h T^2 sum KL / #tokens",
    note="The Fisher inverse and its pruning scores need gradients of single samples and are outside.",
)  # fmt: skip
def hardness_mix(
    student_hidden: Tensor, student_head: Head | Tensor, teacher: Teacher, labels: Tensor, *, hardness: float = 0.5,
    temperature: float = 2.0, **options: Any,
) -> Any:  # fmt: skip
    """(1 - hardness) cross-entropy + hardness T^2 KL, over labelled rows."""
    words: dict[str, Any] = dict(distill_weight=hardness, ce_weight=1 - hardness, temperature=temperature)
    return linear_distill_loss(student_hidden, student_head, teacher, labels, scale_by_t2=True, **words, **options)


@row(
    18, "OPTIN", "arXiv:2403.17921", family="A", knowledge=CODE, status="part",
    formula="score = -sum over layers of |F_T F_T^T - F_S F_S^T|_F^2 on up to 768 tokens - s T^2 max(KL, 0)",
    note="A score of a pruned model, no gradient. The code multiplies by T^2 and does not divide the logits by T; so "
    "does this. F at unit length is our reading. The search for masks is outside.",
)  # fmt: skip
@torch.no_grad()
def pruning_score(
    student_hidden: Tensor, student_head: Head | Tensor, teacher: HiddenTeacher, student_layers: Layers,
    teacher_layers: Layers, *, scale: float = 1.0, t_squared: float = 16.0, tokens: int = 768, normalize: bool = True,
) -> Tensor:  # fmt: skip
    """How little a pruned model's relations and distribution have moved: 0 for the model itself, else negative.

    tokens: the first so many of all [B T] rows are related to each other.
    """
    total = torch.zeros((), device=student_hidden.device, dtype=unit(student_hidden[:1]).dtype)
    for s, t in zip(student_layers, teacher_layers, strict=True):
        flat = (x.flatten(0, -2)[:tokens] for x in (s, t))
        total -= gram_loss(*flat, normalize=normalize, entries="sum")
    kl: Tensor = linear_distill_loss(student_hidden, student_head, teacher)
    return total - scale * t_squared * kl.clamp(min=0)


@row(
    19, "EchoAtt", "arXiv:2409.14595", family="A", knowledge=MEMORY, status="part",
    formula="CE + KL(p || q) + MSE of intermediate states between teacher and shared-attention student",
    note="Which layers share their attention is decided outside.",
)  # fmt: skip
def ce_kl_and_layers(
    student_hidden: Tensor, student_head: Head | Tensor, teacher: Teacher, labels: Tensor, student_layers: Layers,
    teacher_layers: Layers, pairs: Pairs | None = None, *, kl_weight: float = 1.0, layer_weight: float = 1.0,
    keep: Tensor | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """Cross-entropy, KL, and the mean squared error of paired layers (mean over pairs) on kept rows."""
    words: dict[str, Any] = dict(distill_weight=kl_weight, ce_weight=1.0, **options)
    loss: Tensor = linear_distill_loss(student_hidden, student_head, teacher, labels, **words)
    return loss + layer_weight * over_layers(hidden_loss, student_layers, teacher_layers, pairs, token_weights=keep)


@row(
    20, "FoldGPT", "arXiv:2407.00928", family="A", knowledge=MEMORY, status="part",
    formula="CE + MSE of the hidden states of the last layers alone",
    note="Ranking and folding of blocks are outside.",
)  # fmt: skip
def tail_layers(
    student_hidden: Tensor, student_head: Head | Tensor, labels: Tensor, student_layers: Layers, teacher_layers: Layers,
    last: int, *, layer_weight: float = 1.0, keep: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Cross-entropy, and the mean squared error of the last `last` layers of both sides, the last beside the last."""
    ce: Tensor = linear_distill_loss(student_hidden, student_head, None, labels, distill_weight=0.0, ce_weight=1.0)
    s, t = list(student_layers)[-last:], list(teacher_layers)[-last:]
    return ce + layer_weight * over_layers(hidden_loss, s, t, token_weights=keep)


@row(
    21, "FSPAD", "arXiv:2408.15562", family="A", knowledge=f"the draft loss it starts from {CODE}; the split {MEMORY}",
    formula="SmoothL1(f_S, f_T) mean over features, masked token mean, + 0.1 (-sum_v p log softmax(W f_S)), one "
    "frozen head",
    note="Partial alignment: two outputs of the draft model, one for each loss.",
)  # fmt: skip
def draft_features(
    student_features: Tensor, teacher_features: Tensor, head: Head, keep: Tensor, *,
    logit_features: Tensor | None = None,
    logit_weight: float = 0.1, **options: Any,
) -> Tensor:  # fmt: skip
    """A draft model's features against the target's, and what the target's own frozen head makes of them.

    student_features, teacher_features: [B, T, D].  keep: bool [B, T].  logit_features: the output that meets the head,
    where it is not student_features.
    """
    frozen = head.detach()
    given = student_features if logit_features is None else logit_features
    words: dict[str, Any] = dict(divergence="soft_cross_entropy", token_weights=keep, **options)
    logits: Tensor = linear_distill_loss(given, frozen, HiddenTeacher(teacher_features, frozen), **words)
    features = hidden_loss(student_features, teacher_features, distance="smooth_l1", token_weights=keep)
    return features + logit_weight * logits
