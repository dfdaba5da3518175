"""Recipes on embeddings and class scores, of images, regions, graphs, patients (family B of the catalog).

Features are [B, D] unless a recipe says more; row i of all arguments is the same example. The teacher has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from potstill.losses import distill_loss, linear_distill_loss
from potstill.methods.contrastive import contrastive_loss, similarity_loss, soft_targets
from potstill.methods.hidden import Projector, hidden_loss, over_layers, unit
from potstill.methods.papers import CODE, MEMORY, SECOND_HAND, row
from potstill.methods.relation import gram_loss
from potstill.methods.restricted import binary_loss
from potstill.teachers import Head, HiddenTeacher, LogitsTeacher, TopK


def masked_tokens_with_momentum(
    student_hidden: Tensor, student_head: Head | Tensor, momentum: HiddenTeacher, labels: Tensor, *, alpha: float = 0.4,
    **options: Any,
) -> Any:  # fmt: skip
    """(1 - alpha) CE + alpha soft cross-entropy to the momentum model, on masked tokens (labels elsewhere -100)."""
    words: dict[str, Any] = dict(divergence="soft_cross_entropy", distill_weight=alpha, ce_weight=1 - alpha, **options)
    return linear_distill_loss(student_hidden, student_head, momentum, labels, **words)


@row(
    29, "ALBEF", "arXiv:2107.07651", family="B", knowledge=CODE,
    formula="contrast both ways: -sum t log softmax(f . [f_m; queue] / tau), t = alpha softmax(sim_m / tau) + (1 - "
    "alpha) one-hot; masked tokens: (1 - alpha) CE + alpha (-sum softmax(z_m) log q)",
    note="The momentum model is `ema.EMA`, updated before it is called; alpha a `schedules.Ramp`; tau learned, held "
    "to [0.001, 0.5]; the queues `contrastive.Queue`.",
    also=(masked_tokens_with_momentum,),
)  # fmt: skip
def momentum_contrast(
    images: Tensor, texts: Tensor, momentum_images: Tensor, momentum_texts: Tensor, *,
    image_queue: Tensor | None = None, text_queue: Tensor | None = None, temperature: float | Tensor = 0.07,
    alpha: float | Tensor = 0.4,
) -> Tensor:  # fmt: skip
    """Image to text and text to image, each against the momentum model's features and its queue, with softened targets.

    temperature: a 0-dim tensor learns; for the targets it counts without gradient.
    """
    total: Any = 0.0
    sides = (images, momentum_images, momentum_texts, text_queue), (texts, momentum_texts, momentum_images, image_queue)
    fixed = temperature.detach() if isinstance(temperature, Tensor) else temperature
    for own, momentum, others, queue in sides:
        keys = others.detach() if queue is None else torch.cat([others.detach(), queue])
        targets = soft_targets(momentum, keys, temperature=fixed, alpha=alpha)
        total = total + similarity_loss(own, keys, targets, temperature=temperature) / 2
    return total


@row(
    30, "ViLD", "arXiv:2104.13921", family="B", knowledge=CODE, status="part",
    formula="CE over softmax(cos(region, [background; class texts]) / tau) + w sum_d |R_S - R_T|, unit length, mean "
    "over valid regions, w = 0.5",
    note="The losses of the detector are its own.",
)  # fmt: skip
def regions(
    student: Tensor, teacher: Tensor, class_features: Tensor, background: Tensor, labels: Tensor, valid: Tensor, *,
    temperature: float = 0.01, weight: float = 0.5,
) -> Tensor:  # fmt: skip
    """Region features as a classifier over class texts, and their absolute distance to the teacher's.

    student, teacher: [N, D].  class_features: [C, D], fixed.  background: [D], learned, class 0.
    labels: int [N], -100 for regions without a class.  valid: bool [N], regions with a teacher feature.
    """
    classes = torch.cat([background[None], class_features.detach().to(background.dtype)])
    ce = contrastive_loss(student, classes, positives=labels, temperature=temperature)
    words: dict[str, Any] = dict(distance="l1", features="sum", token_weights=valid)
    return ce + weight * hidden_loss(unit(student), unit(teacher), **words)


@row(
    31, "PromptKD", "arXiv:2403.02781", family="B", knowledge=CODE,
    formula="w T^2 KL(softmax(z_T / T) || softmax(z_S / T)) / (B C), z = scale f W^T, W the teacher's class texts on "
    "both sides",
)  # fmt: skip
def shared_class_vectors(
    student: Tensor, teacher: Tensor, class_features: Tensor, *, scale: float = 100.0, temperature: float = 1.0,
    weight: float = 1000.0, normalize: bool = True,
) -> Any:  # fmt: skip
    """KL over classes with one fixed matrix of class vectors [C, D] for both sides, divided by B and by C.

    student, teacher: [B, D] image features, the student's already at the teacher's width.
    """
    s, t, w = (unit(x) if normalize else x for x in (student, teacher.detach(), class_features.detach()))
    head = Head(w.to(s.dtype), logit_scale=scale)
    words: dict[str, Any] = dict(temperature=temperature, scale_by_t2=True, num_items=len(s) * len(w))
    return linear_distill_loss(s, head, HiddenTeacher(t.to(s.dtype), head), distill_weight=weight, **words)


@row(
    32, "Distilling large vision-language models with OOD generalizability", "arXiv:2307.03135", family="B",
    knowledge=CODE,
    formula="CE + KL over the teacher's K best classes (renormalised, / tau, only where its best is the label) + |s - "
    "t|^2 (sum over features, mean over the batch) + (InfoNCE both ways) / 2",
)  # fmt: skip
def classes_and_features(
    student: Tensor, teacher: Tensor, class_features: Tensor, labels: Tensor, topk: TopK, *, temperature: float = 0.07,
    kl_weight: float = 1.0, mse_weight: float = 1.0, contrast_weight: float = 1.0,
) -> Tensor:  # fmt: skip
    """Class scores, the teacher's best classes, squared distance and contrast of unit features.

    topk: [B, K] of the teacher's class scores (`ps.topk(scores / temperature, K)`).
    """
    right = (topk.ids.gather(-1, topk.log_probs.argmax(-1, keepdim=True))[..., 0] == labels).to(unit(student).dtype)
    words: dict[str, Any] = dict(temperature=temperature, divergence="forward_kl", token_weights=right)
    loss = contrastive_loss(student, class_features.detach(), positives=labels, temperature=temperature)
    loss = loss + kl_weight * similarity_loss(student, class_features.detach(), topk, **words)
    s, t = unit(student), unit(teacher.detach())
    loss = loss + mse_weight * hidden_loss(s, t, features="sum")
    return loss + contrast_weight * contrastive_loss(s, t, temperature=temperature, two_way=True)


@row(
    33, "LinguGKD", "arXiv:2402.05894", family="B", knowledge=CODE,
    formula="per layer InfoNCE(h_S, h_T) / 0.07, candidates of the anchor's label left out; layers by softmax(a); "
    "softmax(b)-weighted sum with CE",
    note="A learned b can shrink the larger term; without it both count 1.",
)  # fmt: skip
def layer_contrasts(
    ce: Tensor, student_layers: Sequence[Tensor], teacher_layers: Sequence[Tensor], labels: Tensor, *,
    layer_logits: Tensor | None = None, total_logits: Tensor | None = None, temperature: float = 0.07,
) -> Tensor:  # fmt: skip
    """A task's cross-entropy and, for each layer's features [B, D], a contrast without others of the same label.

    layer_logits [L], total_logits [2]: learned, their softmax weighs the layers and (cross-entropy, contrasts).
    """
    each = torch.stack([
        contrastive_loss(s, t.detach(), labels=labels, temperature=temperature)
        for s, t in zip(student_layers, teacher_layers, strict=True)
    ])  # fmt: skip
    mapped = each.mean() if layer_logits is None else (layer_logits.softmax(0) * each).sum()
    return ce + mapped if total_logits is None else (total_logits.softmax(0) * torch.stack([ce, mapped])).sum()


@row(
    34, "LEADER", "arXiv:2402.02803", family="B", knowledge=CODE,
    formula="BCE + w (two-way contrast whose denominator has no positive) + alpha mean_d (W h_S - sg(h_LLM))^2",
    note="The language model's states may come from a cache.",
)  # fmt: skip
def labels_contrast_and_state(
    logits: Tensor, targets: Tensor, first: Tensor, second: Tensor, student: Tensor, teacher: Tensor,
    projector: Projector, *,
    contrast_weight: float = 0.1, state_weight: float = 0.1, temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    """Binary labels [B, C], two views of one example drawn together, and a language model's state.

    first, second: [B, D] the student's two views (profile and record).  student [B, D_s], teacher [B, D_t] states.
    """
    words: dict[str, Any] = dict(temperature=temperature, positive_in_denominator=False, two_way=True)
    contrast = contrastive_loss(first, second, **words)
    state = hidden_loss(student, teacher, student_projector=projector)
    return binary_loss(logits, targets) + contrast_weight * contrast + state_weight * state


@row(
    35, "DM-Codec", "arXiv:2410.15017", family="B", knowledge=CODE, status="part",
    formula="120 x mean over teachers of mean_d -log sigmoid(cos over time of feature d)",
    note="The codec's own losses are outside; the variant per time step is axis='features'.",
)  # fmt: skip
def features_over_time(
    student: Tensor, teachers: Sequence[Tensor], *, projectors: Sequence[Projector] | None = None, axis: str = "time",
    keep: Tensor | None = None, weight: float = 120.0,
) -> Tensor:  # fmt: skip
    """A speech tokenizer's states [B, T, D] along each teacher's, feature by feature over time."""
    words: dict[str, Any] = dict(distance="log_sigmoid_cosine", axis=axis, token_weights=keep)
    pairs = [(0, j) for j in range(len(teachers))]
    return weight * over_layers(hidden_loss, [student], teachers, pairs, student_projectors=projectors, **words)


@row(
    36, "DSCLoRA", "arXiv:2504.11271", family="B", status="part",
    knowledge=f"the sum of three terms {SECOND_HAND}; the form of the affinity {MEMORY}",
    formula="l1 rec + l2 |S - T|_1 + l3 sum over layers |A_S - A_T|_1, A = X X^T of pixels at unit length",
    note="The reconstruction loss is the task's.",
)  # fmt: skip
def pixel_affinities(
    reconstruction: Tensor, student: Tensor, teacher: Tensor, student_layers: Sequence[Tensor],
    teacher_layers: Sequence[Tensor], *, output_weight: float = 1.0, affinity_weight: float = 1.0,
) -> Tensor:  # fmt: skip
    """A task's reconstruction loss, the outputs' mean absolute distance, and that of affinities of pixels, tile by
    tile.

    student, teacher: outputs [B, ..., C].  layers: [B, pixels, D].
    """
    words: dict[str, Any] = dict(distance="l1", normalize=True, total="sum")
    affinity = over_layers(gram_loss, student_layers, teacher_layers, **words)
    return reconstruction + output_weight * hidden_loss(student, teacher, distance="l1") + affinity_weight * affinity


def both_modalities(images: Tensor, texts: Tensor, *, temperature: float | Tensor = 0.07) -> Tensor:
    """The symmetric contrast of images and texts, [B, D] each."""
    return contrastive_loss(images, texts, temperature=temperature, two_way=True)


@row(
    37, "DC-CLIP", "arXiv:2404.11249", family="B", knowledge=MEMORY,
    formula="stage 1: MSE(f_S, f_T) of images and texts; stage 2: contrast of images and texts",
    note="An overview names SmoothL1 for the first stage: distance='smooth_l1'.", also=(both_modalities,),
)  # fmt: skip
def both_features(
    images: Tensor, texts: Tensor, teacher_images: Tensor, teacher_texts: Tensor, *, distance: str = "mse"
) -> Tensor:
    """A distance of image features plus that of text features."""
    return sum(
        (hidden_loss(s, t, distance=distance) for s, t in ((images, teacher_images), (texts, teacher_texts))),
        start=torch.zeros((), device=images.device),
    )


@row(
    41, "OGEN", "arXiv:2401.15914", family="B", status="part",
    knowledge=f"the losses {CODE}; the window of past states {MEMORY}",
    formula="512 MSE(predicted feature, feature) + CE terms + consistency to the mean of a growing window of past "
    "states",
    note="The averaged teacher is `ema.WindowMean`; the generator of features is outside.",
)  # fmt: skip
def feature_and_consistency(
    ce: Tensor, predicted: Tensor, target: Tensor, features: Tensor, averaged: Tensor, *, feature_weight: float = 512.0,
    consistency_weight: float = 1.0,
) -> Tensor:  # fmt: skip
    """Task cross-entropy, a predicted feature's squared error, closeness to the averaged model's features [B, D]."""
    return ce + feature_weight * hidden_loss(predicted, target) + consistency_weight * hidden_loss(features, averaged)


@row(
    44, "PANDA", "arXiv:2208.10160", family="B", knowledge=CODE,
    formula="CE + 0.1 beta MSE(z_S, z_source) / B, beta a similarity of the two prompts",
)  # fmt: skip
def scaled_logit_mse(
    student_logits: Tensor, source_logits: Tensor, labels: Tensor, similarity: float | Tensor, *, weight: float = 0.1
) -> Tensor:
    """Cross-entropy, and the mean squared error of logits [B, C] times a similarity, over B once more."""
    teacher = LogitsTeacher(source_logits)
    ce: Tensor = distill_loss(student_logits, None, labels, distill_weight=0.0, ce_weight=1.0)
    mse: Tensor = distill_loss(student_logits, teacher, labels, divergence="mse_logits")
    return ce + weight * similarity * mse / len(student_logits)


@row(
    45, "Multi-aspect knowledge distillation", "arXiv:2501.13341", family="B", knowledge=CODE,
    formula="CE + 4 BCE(s_aspect, p), p = softmax([z_yes, z_no])_yes of the language model, 50 aspects",
    note="p of each question is `restricted.yes_probability`.",
)  # fmt: skip
def labels_and_aspects(
    class_logits: Tensor, labels: Tensor, aspect_logits: Tensor, yes: Tensor, *, weight: float = 4.0
) -> Tensor:
    """Cross-entropy of classes [B, C] and binary cross-entropy of aspects [B, A] with soft targets yes [B, A]."""
    ce: Tensor = distill_loss(class_logits, None, labels, distill_weight=0.0, ce_weight=1.0)
    return ce + weight * binary_loss(aspect_logits, yes)
