"""Recipes for encoders and sentence models: attention maps, layers, pooled states, scores (families A and B).

student_hidden: [B, T, D].  student_layers, teacher_layers: sequences of [B, T, D_s] and [B, T, D_t]; attention maps
[B, heads, T, T].  labels: [B, T] int64, -100 leaves a row out. Every recipe returns a scalar unless it says more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from potstill.losses import linear_distill_loss
from potstill.methods.contrastive import contrastive_loss, mutual_information_bound, similarity_loss
from potstill.methods.hidden import Pairs, Projector, cosine, hidden_loss, nearest_layers, over_layers, wide
from potstill.methods.papers import CODE, MEMORY, SECOND_HAND, row
from potstill.methods.relation import attention_mse, relation_kl
from potstill.methods.restricted import binary_loss
from potstill.mixtures import Teacher
from potstill.teachers import Head, HiddenTeacher, LogitsTeacher

Layers = Sequence[Tensor]


def maps_and_layers(
    student_maps: Layers, teacher_maps: Layers, student_layers: Layers, teacher_layers: Layers, pairs: Pairs, *,
    teacher_projectors: Sequence[Projector] | None = None, map_weight: float = 1.0, layer_weight: float = 1.0,
    keep: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Squared errors of attention maps (entries that the teacher masks left out) and of layers, means over the pairs.

    teacher_projectors: one a pair, fixed or learned; they take the teacher's layers to the student's width.
    """
    maps = over_layers(attention_mse, student_maps, teacher_maps, pairs)
    layers = over_layers(
        hidden_loss, student_layers, teacher_layers, pairs, teacher_projectors=teacher_projectors, token_weights=keep
    )
    return map_weight * maps + layer_weight * layers


@row(
    22, "BiStil", "arXiv:2306.01709", family="A", knowledge=CODE,
    formula="a_attn mean_l MSE(A_S, A_T) over A_T != 0 + a_h mean_l MSE(h_S, h_T P_l) + a_ce (-sum softmax(z_T/2) log "
    "softmax(z_S/2)), no T^2, + a_task CE; teacher layer (i + 1) k - 1",
    note="The layer map is `hidden.uniform_pairs`.",
    also=(maps_and_layers,),
)  # fmt: skip
def soft_labels_and_layers(
    student_hidden: Tensor, student_head: Head | Tensor, teacher: Teacher, labels: Tensor, layers: Tensor, *,
    soft_weight: float = 1.0, hard_weight: float = 1.0, temperature: float = 2.0, **options: Any,
) -> Tensor:  # fmt: skip
    """Soft cross-entropy at a temperature without T squared, hard cross-entropy, and `maps_and_layers` as `layers`."""
    words: dict[str, Any] = dict(divergence="soft_cross_entropy", distill_weight=soft_weight, ce_weight=hard_weight)
    loss: Tensor = linear_distill_loss(
        student_hidden, student_head, teacher, labels, temperature=temperature, **words, **options
    )
    return loss + layers


@row(
    23, "ERNIE-Tiny", "arXiv:2106.02241", family="A", knowledge=MEMORY,
    formula="stages 1 to 3: MSE of hidden states and attention maps, teacher and data exchanged; stage 4: soft and "
    "hard cross-entropy",
    note="The stages are `schedules.Stages`; latent stages call `maps_and_layers`, the last this.",
    also=(maps_and_layers,),
)  # fmt: skip
def soft_and_hard_labels(
    student_hidden: Tensor, student_head: Head | Tensor, teacher: Teacher, labels: Tensor, *, temperature: float = 1.0,
    **options: Any,
) -> Any:  # fmt: skip
    """The soft-label and the hard-label cross-entropy, one to one."""
    words: dict[str, Any] = dict(divergence="soft_cross_entropy", temperature=temperature, ce_weight=1.0, **options)
    return linear_distill_loss(student_hidden, student_head, teacher, labels, **words)


@row(
    24, "Multi-level distillation for OOD detection in text", "arXiv:2211.11300", family="A", knowledge=CODE,
    formula="KL(softmax(z_T / T) || softmax(z_S / T)), no T^2, mean over active tokens (+ CE) + for some student "
    "layers the distances MSE(W h_T^j, h_S^i) to the 2 nearest teacher layers of each token",
    note="The score of a text is its perplexity (`metrics.perplexity`), the measure `metrics.auroc`.",
)  # fmt: skip
def kl_and_nearest_layers(
    student_hidden: Tensor, student_head: Head | Tensor, teacher: Teacher, labels: Tensor, student_layers: Layers,
    teacher_layers: Layers, keep: Tensor, *, k: int = 2, weights: Sequence[float] | Tensor | None = None,
    projector: Projector | None = None, temperature: float = 2.0, ce_weight: float = 0.0, layer_weight: float = 1.0,
    **options: Any,
) -> Tensor:  # fmt: skip
    """KL without T squared over labelled rows, and each student layer near its k nearest teacher layers, summed.

    student_layers: those that learn (3 to 9 in the paper).  projector: shared, on the teacher's side.  keep: bool [B,
    T].
    """
    words: dict[str, Any] = dict(temperature=temperature, ce_weight=ce_weight, **options)
    loss: Tensor = linear_distill_loss(student_hidden, student_head, teacher, labels, **words)
    more: dict[str, Any] = dict(teacher_projector=projector, weights=weights, token_weights=keep)
    for layer in student_layers:
        loss = loss + layer_weight * nearest_layers(layer, teacher_layers, k, **more)
    return loss


def passage_scores(
    student_queries: Tensor, student_passages: Tensor, teacher_scores: Tensor, *, temperature: float = 1.0,
    normalize: bool = True,
) -> Tensor:  # fmt: skip
    """-sum softmax(s_T / tau) log softmax(s_S / tau) over the passages of the batch.

    student_queries [B, D], student_passages [M, D]; s_S their cosines.  teacher_scores: [B, M], raw.
    """
    targets = LogitsTeacher(teacher_scores / temperature)
    return similarity_loss(student_queries, student_passages, targets, temperature=temperature, normalize=normalize)


@row(
    28, "INDUS", "arXiv:2405.10725", family="A", knowledge=MEMORY,
    formula="encoder: KL of softmax(A A^T / sqrt(d)) of the teacher's and the student's self-relations; retriever: "
    "-sum softmax(s_T / tau) log softmax(s_S / tau) over the batch's passages",
    also=(passage_scores,),
)  # fmt: skip
def self_relations(
    student: Sequence[Tensor], teacher: Sequence[Tensor], *, heads: int, token_mask: Tensor | None = None,
    weights: Sequence[float] | None = None,
) -> Tensor:  # fmt: skip
    """`relation.relation_kl` summed over, for example, queries, keys and values of one layer ([B, L, D] each)."""
    return over_layers(relation_kl, student, teacher, weights=weights, total="sum", heads=heads, token_mask=token_mask)


def cosine_to_score(u: Tensor, v: Tensor, logits: Tensor) -> Tensor:
    """mean (cos(u, v) - sigmoid(logits))^2: a bi-encoder ([B, D] twice) learns a cross-encoder's scores [B]."""
    return hidden_loss(cosine(u, v)[..., None], wide(logits.detach()).sigmoid()[..., None])


@row(
    38, "Trans-Encoder", "arXiv:2109.13059", family="B",
    knowledge=f"the squared error of cosines and the loop {CODE}; BCE is the default of the library it uses",
    formula="bi to cross: BCE(sigmoid(s), cos); cross to bi: (cos(u, v) - sigmoid(s))^2; several models: the mean of "
    "their scores",
    also=(cosine_to_score,),
)  # fmt: skip
def score_to_cosine(logits: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Binary cross-entropy of a cross-encoder's logits [B] against a bi-encoder's cosines, which are held to 0..1."""
    return binary_loss(logits, cosine(u, v).detach().clamp(0, 1))


def pooled(hidden: Tensor, owner: Tensor, count: int) -> Tensor:
    """The mean hidden state of each owner, [count, D] fp32 (fp64), with gradient; 0 for an owner without rows.

    hidden: [..., D].  owner: int [...], the chunk, word or new token that a row belongs to; negative for none.
    Equals, for each c, `hidden[owner == c].mean(0)`.
    """
    if owner.shape != hidden.shape[:-1]:
        raise ValueError(f"owner has shape {list(owner.shape)}; the rows of hidden have {list(hidden.shape[:-1])}")
    rows, at = wide(hidden).flatten(0, -2), owner.flatten().long()
    at = torch.where(at < 0, count, at)
    total = rows.new_zeros(count + 1, rows.shape[1]).index_add(0, at, rows)
    number = rows.new_zeros(count + 1).index_add(0, at, torch.ones_like(rows[:, 0]))
    return (total / number.clamp(min=1)[:, None])[:count]


def sequence_kl(student_hidden: Tensor, student_head: Head | Tensor, teacher: HiddenTeacher, **options: Any) -> Any:
    """KL(teacher || student) of a classifier's or language model's outputs: the second, task stage."""
    return linear_distill_loss(student_hidden, student_head, teacher, **options)


@row(
    39, "Model stacking by self-distillation", "arXiv:2406.12739", family="B",
    knowledge=f"the two stages {SECOND_HAND}; their losses {MEMORY}",
    formula="stage 1: MSE of the sequence representation made from the other encoder's input to the model's own; "
    "stage 2: KL to the model's own task outputs",
    also=(sequence_kl, pooled),
)  # fmt: skip
def pooled_mse(student: Tensor, teacher: Tensor, student_owner: Tensor, teacher_owner: Tensor, count: int) -> Tensor:
    """Mean squared error of mean states of the same `count` texts or chunks, read by two tokenizers.

    student: [B, T_s, D], teacher: [B, T_t, D], owners as in `pooled`. Owners without rows on a side are left out.
    """
    there = torch.zeros(2, count, dtype=torch.bool, device=student.device)
    for side, owner in enumerate((student_owner, teacher_owner)):
        there[side, owner[owner >= 0].long()] = True
    states = pooled(student, student_owner, count), pooled(teacher, teacher_owner, count)
    return hidden_loss(*states, token_weights=there.all(0))


@row(
    40, "Self-distillation for further pre-training", "arXiv:2210.02871", family="B", knowledge=CODE,
    formula="L_masked + (1/B) sum |h_S - sg(h_T)|^2, sum over features of the class token",
)  # fmt: skip
def pretraining_and_state(pretraining_loss: Tensor, student: Tensor, teacher: Tensor, *, weight: float = 1.0) -> Tensor:
    """A pre-training loss of the student's own, and the squared distance of its states [B, D], mean over the batch."""
    return pretraining_loss + weight * hidden_loss(student, teacher, features="sum")


@row(
    42, "Distiller", "arXiv:2109.11105", family="B", knowledge=MEMORY,
    formula="-I_alpha, the interpolated lower bound of the mutual information of intermediate states; MSE, L1, cosine "
    "beside it",
    note="The other intermediate objectives are distances of `hidden.hidden_loss` and `relation.gram_loss`.",
)  # fmt: skip
def mutual_information(
    student: Tensor, teacher: Tensor, *, alpha: float = 0.5, temperature: float = 1.0,
    log_baseline: Tensor | float = 0.0,
    normalize: bool = True,
) -> Tensor:  # fmt: skip
    """Minus `contrastive.mutual_information_bound` of student states [K, D] and teacher states [K, D]."""
    words: dict[str, Any] = dict(alpha=alpha, temperature=temperature, log_baseline=log_baseline, normalize=normalize)
    return -mutual_information_bound(student, teacher.detach(), **words).value


@row(
    43, "ModularStarEncoder", "arXiv:2503.03008", family="B", knowledge=MEMORY,
    formula="sum over exits i of (i / |I|) contrastive(L_i), one head for all exits",
)  # fmt: skip
def exits_contrastive(anchors: Layers, candidates: Layers, *, temperature: float | Tensor = 0.07) -> Tensor:
    """Two-way contrasts of the features [B, D] of each exit, deeper exits weighted more: 1/n, 2/n, ..., 1."""
    weights = [(i + 1) / len(anchors) for i in range(len(anchors))]
    found = [w * contrastive_loss(a, c, temperature=temperature, two_way=True)
             for w, a, c in zip(weights, anchors, candidates, strict=True)]  # fmt: skip
    return torch.stack(found).sum()


@row(
    46, "BIOptimus", "arXiv:2308.08625", family="B", knowledge=MEMORY,
    formula="the vector of a new token = the mean over the corpus of the old model's hidden states of the pieces it "
    "replaces",
    note="An initialisation, not a loss: nothing falls.",
)  # fmt: skip
@torch.no_grad()
def vectors_from_contexts(hidden: Tensor, owner: Tensor, count: int) -> Tensor:
    """The mean hidden state of the rows that each of `count` new tokens replaces, [count, D], without gradient."""
    return pooled(hidden, owner, count)
