"""Recipes on preferences, rankings, rationales and the choice of data (family C, and data selection of family A).

student_hidden: [B, T, D].  labels: [B, T] int64, -100 leaves a token out; row i predicts labels[:, i].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from potstill.losses import linear_distill_loss
from potstill.methods.papers import CODE, MEMORY, SECOND_HAND, row
from potstill.methods.preference import (
    contrast_over_sets,
    linear_preference_loss,
    pairwise_rank_loss,
    sequence_logprobs,
)
from potstill.methods.recipes.text import weighted_text
from potstill.methods.restricted import binary_logits, binary_loss
from potstill.methods.samplers import Best, percentile_keep, quota_sample, top_ratio
from potstill.mixtures import Teacher
from potstill.teachers import Head, HiddenTeacher


def hard_or_soft(
    student_hidden: Tensor, student_head: Head | Tensor, teacher: Teacher, labels: Tensor, *, soft: float = 0.5,
    **options: Any,
) -> Any:  # fmt: skip
    """(1 - soft) CE + soft (-sum p log q) over labelled rows: plain distillation, which selection is compared with."""
    words: dict[str, Any] = dict(divergence="soft_cross_entropy", distill_weight=soft, ce_weight=1 - soft, **options)
    return linear_distill_loss(student_hidden, student_head, teacher, labels, **words)


@row(
    26, "MiniPLM", "arXiv:2410.17215", family="A", knowledge=CODE,
    formula="keep the best half by r(x) = log p_T(x) - log p_reference(x), token mean; then CE; plain distillation "
    "beside it: (1 - l) CE + l soft CE",
    note="The README prints a ratio of logs; code and text have the log-ratio. Over caches: "
    "`scoring.ScoreDifference`.",
    also=(hard_or_soft,),
)  # fmt: skip
def best_by_log_ratio(
    teacher: Callable[[], Iterable[ArrayLike]], reference: Callable[[], Iterable[ArrayLike]], *, ratio: float = 0.5
) -> Best:
    """The best `ratio` of all sequences by log p_teacher - log p_reference, over any number of shards.

    teacher, reference: give the sequences' mean log-probabilities anew, shard by shard, in the same order.
    """

    def blocks() -> Iterable[ArrayLike]:
        for a, b in zip(teacher(), reference(), strict=True):
            yield np.asarray(a, np.float64) - np.asarray(b, np.float64)

    return top_ratio(blocks, ratio)


@row(
    47, "Multimodal preference alignment", "arXiv:2402.10884", family="C", knowledge=CODE,
    formula="-log sigmoid(beta [(log q_w - log q_l) - (log ref_w - log ref_l)]), beta = 0.1, sums of "
    "log-probabilities",
    note="SteerLM and rejection sampling, its baselines, are CE on chosen text: `recipes.text.weighted_text`.",
)  # fmt: skip
def preferred_answers(
    student_hidden: Tensor, student_head: Head | Tensor, labels: Tensor, reference: Tensor | HiddenTeacher | None, *,
    beta: float = 0.1, **options: Any,
) -> Tensor:  # fmt: skip
    """DPO on [2 B] sequences, the preferred ones first, with a live reference model or its cached sequence sums."""
    return linear_preference_loss(student_hidden, student_head, labels, reference, beta=beta, **options)


@row(
    48, "CycleAlign", "arXiv:2310.16271", family="C", knowledge=MEMORY,
    formula="sum_{i<j} max(0, s_j - s_i) of length-normalised log-probabilities in the agreed order + CE of the best",
    note="The order that two judges agree on: `preference.agreement_ranking`.",
)  # fmt: skip
def ranked_answers(
    student_hidden: Tensor, student_head: Head | Tensor, labels: Tensor, *, ce_weight: float = 1.0
) -> Tensor:
    """n answers [n, T, D] to one question, the best first: every pair in order, and the cross-entropy of the best."""
    scores = sequence_logprobs(student_hidden, student_head, labels, reduction="mean")
    return pairwise_rank_loss(scores) + ce_weight * weighted_text(student_hidden[:1], student_head, labels[:1])


@row(
    49, "QCRD", "arXiv:2405.13014", family="C", knowledge=SECOND_HAND, status="part",
    formula="a1 CE(answer) + a2 [min_j w_j CE(rationale+_j) - 0.2 min(min_j CE(rationale-_j) - 3, 0)] + a3 "
    "L_discriminator, a3 x 0.9 an iteration",
    note="The discriminator and its loss are outside: it gives the weights. The decay is a `schedules.Ramp`.",
)  # fmt: skip
def answer_and_rationales(
    student_hidden: Tensor, student_head: Head | Tensor, labels: Tensor, positive: Tensor, negative: Tensor,
    quality: Tensor | None = None, *, answer_weight: float = 1.0, rationale_weight: float = 1.0, margin: float = 3.0,
    negative_weight: float = 0.2,
) -> Tensor:  # fmt: skip
    """The answer's cross-entropy, the cheapest good rationale, and the likeliest bad one pushed away up to a margin.

    positive [B, n], negative [B, m]: mean cross-entropies of rationales, `-sequence_logprobs(..., reduction="mean")`.
    quality: [B, n], a discriminator's weights.
    """
    answer: Tensor = weighted_text(student_hidden, student_head, labels)
    words: dict[str, Any] = dict(margin=margin, negative_weight=negative_weight)
    return answer_weight * answer + rationale_weight * contrast_over_sets(positive, negative, quality, **words)


@row(
    50, "Competitive multimodal distillation (CoMD)", "arXiv:2311.08213", family="C", knowledge=f"{MEMORY}, unsure",
    status="part",
    formula="CE on instructions chosen by competition (a term on logits is claimed in places)",
    note="Augmentation and judging are outside; `recipes.logits.hard_and_soft` has the logits' term.",
)  # fmt: skip
def competed_instructions(
    student_hidden: Tensor, student_head: Head | Tensor, labels: Tensor, weights: Tensor | None = None
) -> Any:
    """Cross-entropy on instructions, weighted by example [B]."""
    return weighted_text(student_hidden, student_head, labels, weights)


@row(
    51, "BOLT", "arXiv:2502.03860", family="C", knowledge=MEMORY, status="part",
    formula="CE on filtered long chains of thought, then a preference loss online; no teacher",
    note="Its own drafts are filtered and judged outside.",
    also=(preferred_answers,),
)  # fmt: skip
def filtered_thoughts(
    student_hidden: Tensor, student_head: Head | Tensor, labels: Tensor, keep: Tensor | None = None
) -> Any:
    """Cross-entropy on the chains of thought that passed a filter: keep, bool [B]."""
    return weighted_text(student_hidden, student_head, labels, None if keep is None else keep.float())


@row(
    52, "TAPIR", "arXiv:2405.13448", family="C", knowledge=MEMORY, status="part",
    formula="difficulty = judge(teacher) - judge(student) an instruction; drawn by task shares; CE",
    note="The judge is outside; the loss is `recipes.text.weighted_text`.",
    also=(weighted_text,),
)  # fmt: skip
def hard_and_balanced(
    teacher_scores: ArrayLike, student_scores: ArrayLike, tasks: ArrayLike, shares: dict[Any, float], n: int, *,
    seed: int = 0,
) -> NDArray[np.int64]:  # fmt: skip
    """Indices [n] of instructions, each task by its share, within a task by max(0, difficulty).

    scores: [N], a judge's of both models' answers.  tasks: [N].  shares: task -> share.
    """
    difficulty = np.maximum(np.asarray(teacher_scores, np.float64) - np.asarray(student_scores, np.float64), 0)
    return quota_sample(tasks, shares, n, weights=difficulty, seed=seed)


@row(
    53, "LLMLingua-2", "arXiv:2403.12968", family="C", knowledge=CODE,
    formula="binary CE on keep or drop labels; samples above the 90th percentile of the variation rate, then of the "
    "alignment gap, are dropped",
    also=(percentile_keep,),
)  # fmt: skip
def kept_tokens(
    student_hidden: Tensor, student_head: Head | Tensor, keep: Tensor, weights: Tensor | None = None, *, yes: int = 1,
    no: int = 0,
) -> Tensor:  # fmt: skip
    """Binary cross-entropy of each token's label: keep, bool or 0..1 [B, T], through a head whose rows yes and no
    count.

    weights: [B, T], 0 leaves a token out. Which samples stay: `samplers.percentile_keep(variation, gap)`.
    """
    logits = binary_logits(student_hidden, student_head, yes, no)
    return binary_loss(logits, keep.to(logits.dtype), token_weights=weights)
