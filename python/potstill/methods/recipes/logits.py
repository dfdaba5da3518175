"""Recipes on the student's distribution over the vocabulary (family A of the catalog).

student_hidden: [B, T, D].  student_head: Head, or its weight [V, D].  labels: [B, T] int64, -100 leaves a row out.
A teacher is a HiddenTeacher, LogitsTeacher or TopK with rows [B, T]. Every recipe returns a scalar unless it says more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from potstill.losses import linear_distill_loss
from potstill.methods.on_policy import distillspec
from potstill.methods.papers import CODE, MEMORY, PAPER, SECOND_HAND, row
from potstill.methods.preference import dpo_loss, sequence_logprobs
from potstill.methods.relation import span_product_loss
from potstill.mixtures import Masked, Mix, Student, Teacher
from potstill.teachers import Head, HiddenTeacher, LogitsTeacher, TopK
from potstill.tokens import token_logprobs
from potstill.xtok.alignment import Alignment
from potstill.xtok.alm import linear_alm_loss

Dense = HiddenTeacher | LogitsTeacher


@row(
    1, "TAID", "arXiv:2501.16937", family="A", knowledge=CODE,
    formula="-sum_v p log q, p = softmax((1 - t) sg(z_s) + t z_T), mean over tokens; t by a controller",
    note="t is `schedules.TAIDController`; what drives it, this loss or the KL divergence, is the caller's choice.",
)  # fmt: skip
def interpolated_target(
    student_hidden: Tensor, student_head: Head | Tensor, teacher: Dense, labels: Tensor | None = None, *,
    t: float | Tensor, divergence: str = "soft_cross_entropy", **options: Any,
) -> Any:  # fmt: skip
    """The student against a mixture, in logits, of itself (without gradient) and the teacher.

    t: 0..1, the teacher's share; a 0-dim tensor does not recompile.  divergence: "soft_cross_entropy" or "forward_kl":
    one gradient, two values.
    """
    target = Mix([(1 - t, Student()), (t, teacher)])
    return linear_distill_loss(student_hidden, student_head, target, labels, divergence=divergence, **options)


def worst_position(
    student_hidden: Tensor, student_head: Head | Tensor, teacher: Teacher, student_ids: Tensor, teacher_ids: Tensor,
    keep: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """int64 [B]: where KL(teacher || student) is largest among the rows whose tokens differ, -1 where none does.

    student_ids: [B, T], the student's own token of each row; teacher_ids: [B, T], the teacher's (most probable or
    drawn); keep: bool [B, T], rows that count. What to give the teacher's token at, and to write on from.
    """
    with torch.no_grad():
        kl: Tensor = linear_distill_loss(student_hidden, student_head, teacher, reduction="none")
    differ = student_ids != teacher_ids
    if keep is not None:
        differ = differ & keep
    best = torch.where(differ, kl, -1.0).argmax(-1)
    return torch.where(differ.any(-1), best, -1)


@row(
    2, "Multi-granularity semantic revision", "arXiv:2407.10068", family="A", status="part", knowledge=SECOND_HAND,
    formula="CE + KL(p || q) on the classes between two quantiles of p + sum over neighbours in a span of |p_i "
    "p_{i+1} - q_i q_{i+1}|",
    note="The inputs of the net that gives the bounds, the shape of the soft mask and the span's distance were not at "
    "hand. The position to correct is `worst_position`; finding spans is left out.",
    also=(worst_position,),
)  # fmt: skip
def class_range_and_spans(
    student_hidden: Tensor, student_head: Head | Tensor, teacher: HiddenTeacher, labels: Tensor, spans: Tensor, *,
    lower: float | Tensor, upper: float | Tensor, softness: float = 0.05, range_weight: float = 1.0,
    span_weight: float = 1.0, **options: Any,
) -> Tensor:  # fmt: skip
    """Cross-entropy, KL restricted to a range of the teacher's cumulative mass, and products of neighbours in spans.

    lower, upper: the range, numbers or [B, T] (a small net's output: its gradient comes through the soft mask).
    spans: int [B, T], see `relation.span_product_loss`.
    """
    masked = Masked(teacher, lower, upper, softness=softness)
    words: dict[str, Any] = dict(distill_weight=range_weight, ce_weight=1.0, **options)
    loss: Tensor = linear_distill_loss(student_hidden, student_head, masked, labels, **words)
    return loss + span_weight * span_product_loss(student_hidden, student_head, teacher, spans)


@row(
    3, "On teacher hacking", "arXiv:2502.02671", family="A",
    knowledge=f"{SECOND_HAND}; the estimator of the metrics {MEMORY}",
    formula="mean over tokens of KL(p_T || q), T = 1, on data that is fixed or drawn anew",
    note="Proxy and golden curves: `metrics.teacher_hacking` over `metrics.sequence_kl`; the source of data: "
    "`rollout.Rollouts`.",
)  # fmt: skip
def token_kl(
    student_hidden: Tensor, student_head: Head | Tensor, teacher: Teacher, labels: Tensor | None = None, **options: Any
) -> Any:
    """The mean over tokens of KL(teacher || student)."""
    return linear_distill_loss(student_hidden, student_head, teacher, labels, divergence="forward_kl", **options)


@row(
    4, "Law of capacity gap (MiniMA)", "arXiv:2311.07052", family="A", knowledge=CODE,
    formula="0.5 CE + 0.5 (-sum_v p log q), T = 1, mean over all B x T positions",
)  # fmt: skip
def half_hard_half_soft(
    student_hidden: Tensor, student_head: Head | Tensor, teacher: Teacher, labels: Tensor, *, soft: float = 0.5,
    **options: Any,
) -> Any:  # fmt: skip
    """(1 - soft) times the labels' cross-entropy plus soft times the teacher's, in one pass."""
    words: dict[str, Any] = dict(divergence="soft_cross_entropy", distill_weight=soft, ce_weight=1 - soft, **options)
    return linear_distill_loss(student_hidden, student_head, teacher, labels, **words)


def extrapolation_weights(preferred: HiddenTeacher, reverse: Dense, *, r: float = 20.0, offset: float = 1e-3) -> Tensor:
    """w = r * total variation(p_preferred, p_reverse) + offset for each row [...], without gradient.

    The total variation has its half here: the authors' code has none, so that its r = 10 (15 on-policy) is 20 (30).
    """
    with torch.no_grad():
        tv: Tensor = linear_distill_loss(
            preferred.hidden, preferred.head, reverse, divergence="total_variation", reduction="none"
        )
    return r * tv + offset


@row(
    5, "AlignDistil", "arXiv:2503.02832", family="A", knowledge=f"{CODE}; the paper's own equations {SECOND_HAND}",
    formula="mean_B (1/|y|) sum_t (beta / w_t) KL(q || softmax(z*/T)), z* = z_dpo + w_t (z_dpo - z_rev), w_t = r "
    "TV(p_dpo, p_rev) + 1e-3",
    also=(extrapolation_weights,),
)  # fmt: skip
def extrapolated_reverse_kl(
    student_hidden: Tensor, student_head: Head | Tensor, preferred: HiddenTeacher, reverse: Dense, keep: Tensor, *,
    beta: float = 0.1, r: float = 20.0, temperature: float = 1.0, teacher_temperature: float | None = None,
    **options: Any,
) -> Any:  # fmt: skip
    """Reverse KL to a target beyond a preferred model, away from a reverse one, by a weight of each token.

    preferred, reverse: the model after DPO, and after DPO on exchanged pairs.  keep: bool [B, T], the answer's tokens.
    teacher_temperature divides the target alone (off-policy), temperature both sides (on-policy).
    """
    w = extrapolation_weights(preferred, reverse, r=r)
    target = Mix([(1 + w, preferred), (-w, reverse)])
    weights = beta / w * keep / keep.sum(-1, keepdim=True).clamp(min=1)
    words: dict[str, Any] = dict(temperature=temperature, teacher_temperature=teacher_temperature, num_items=len(keep))
    return linear_distill_loss(
        student_hidden, student_head, target, divergence="reverse_kl", token_weights=weights, **words, **options
    )


@row(
    6, "FIRST", "arXiv:2408.12168", family="A", knowledge=f"{CODE}; the paper's temperature {MEMORY}",
    formula="(1/B) sum over tokens of KL(t || s) over the teacher's 5 best entries, both renormalised or with one "
    "more entry for the rest; logits / T or softmax(probabilities / T)",
    note="The code's other-token branch hands probabilities to a loss that expects their logs; here it is a KL "
    "divergence.",
)  # fmt: skip
def best_entries_kl(
    student_hidden: Tensor, student_head: Head | Tensor, topk: TopK, keep: Tensor, *, other_token: bool = False,
    over: str = "logits", temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    """KL over the K best entries of the teacher, summed over tokens and divided by the number of sequences.

    topk: [B, T, K], K = 5 in the paper.  keep: bool [B, T].  other_token: one more entry holds the rest of each side.
    over: "logits" divides logits by the temperature (with other_token topk.log_rest_at must know it); "probabilities"
    takes softmax(p / T) of the probabilities themselves, on both sides.
    """
    if over == "logits":
        loss: Tensor = linear_distill_loss(
            student_hidden, student_head, topk, tail="bucket" if other_token else "renormalize",
            temperature=temperature, token_weights=keep, num_items=len(keep),
        )  # fmt: skip
        return loss
    if over != "probabilities":
        raise ValueError(f"over={over!r} is not known; use 'logits' or 'probabilities'")
    missing = topk.ids < 0
    found = token_logprobs(student_hidden, student_head, torch.where(missing, -100, topk.ids))
    assert isinstance(found, Tensor)
    q = torch.where(missing, 0.0, found.double().exp())  # a few columns in fp64: the KL of near-even softmaxes cancels
    p = topk.log_probs.double().exp()
    if other_token:
        p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
        missing = torch.cat([missing, torch.zeros_like(missing[..., :1])], -1)
    t, s = ((x / temperature).masked_fill(missing, -torch.inf).log_softmax(-1) for x in (p, q))
    rows = torch.where(missing, 0.0, t.exp() * (t - s)).sum(-1)
    return (torch.where(keep, rows, 0.0).sum() / len(keep)).to(found.dtype)


@row(
    7, "DistillSpec", "arXiv:2310.08461", family="A", knowledge=MEMORY,
    formula="mean over tokens of D(p, q), D one of KL(p || q), KL(q || p), JSD, total variation; acceptance = sum "
    "min(p, q)",
    note="Data from the student, the teacher or fixed: `rollout.Rollouts`; tokens a block and speed-up: "
    "`speculative`.",
    also=(distillspec,),
)  # fmt: skip
def draft_loss(
    student_hidden: Tensor, student_head: Head | Tensor, teacher: Teacher, labels: Tensor | None = None, *,
    divergence: Any = "total_variation", **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss, acceptance): a draft model's divergence, and how often its tokens would be accepted (no gradient)."""
    words: dict[str, Any] = dict(divergence=divergence, return_metrics=("acceptance",), **options)
    loss, found = linear_distill_loss(student_hidden, student_head, teacher, labels, **words)
    return loss, found["acceptance"]


@row(
    8, "DDK", "arXiv:2407.16154", family="A", knowledge=PAPER,
    formula="CE + gamma KL(softmax(z_S / T), softmax(z_T / T)); domains drawn by r_i <- alpha psi_i / sum psi + (1 - "
    "alpha) / N, psi_i = r_i exp(perplexity_S / perplexity_T)",
    note="The order inside KL is printed student first; the direction is an option. The mixture is "
    "`samplers.DomainMixture`.",
)  # fmt: skip
def hard_and_soft(
    student_hidden: Tensor, student_head: Head | Tensor, teacher: Teacher, labels: Tensor, *, gamma: float = 0.2,
    divergence: Any = "forward_kl", temperature: float = 1.0, **options: Any,
) -> Any:  # fmt: skip
    """The labels' cross-entropy plus gamma times a divergence, in one pass."""
    words: dict[str, Any] = dict(divergence=divergence, temperature=temperature, distill_weight=gamma, ce_weight=1.0)
    return linear_distill_loss(student_hidden, student_head, teacher, labels, **words, **options)


def preference_to_teacher(
    student_hidden: Tensor, student_head: Head | Tensor, labels: Tensor, teacher_log_probs: Tensor, *, beta: float = 0.1
) -> Tensor:
    """DPO whose reference is the teacher: its sequences' log-probabilities, live or cached.

    student_hidden: [2 B, T, D], labels [2 B, T], teacher_log_probs [2 B]: the chosen half first, then the rejected.
    """
    scores = sequence_logprobs(student_hidden, student_head, labels)
    return dpo_loss(*scores.chunk(2), *teacher_log_probs.to(scores.dtype).chunk(2), beta=beta)


@row(
    11, "LLaVA-MoD", "arXiv:2408.15881", family="A", knowledge=CODE,
    formula="mimic: -sum_v p log q + CE on the answer's tokens, vocabulary cut to 151,936; preference: DPO with the "
    "teacher as reference",
    note="The code's mimic mask is one row off its labels; pass aligned rows. The balance loss of the experts is "
    "their own.",
    also=(preference_to_teacher,),
)  # fmt: skip
def mimic(student_hidden: Tensor, student_head: Head | Tensor, teacher: Teacher, labels: Tensor, **options: Any) -> Any:
    """Soft and hard cross-entropy, one to one, over the labelled rows; heads cut by their `vocab_size`."""
    words: dict[str, Any] = dict(divergence="soft_cross_entropy", distill_weight=1.0, ce_weight=1.0, **options)
    return linear_distill_loss(student_hidden, student_head, teacher, labels, **words)


@row(
    25, "MEND", "arXiv:2403.06914", family="A", knowledge=CODE,
    formula="KL(softmax(z_T / T) || softmax(z_S / T)), no T squared, mean over the query's tokens; + CE in "
    "fine-tuning",
)  # fmt: skip
def query_token_kl(
    student_hidden: Tensor, student_head: Head | Tensor, teacher: HiddenTeacher, student_rows: Tensor,
    teacher_rows: Tensor, labels: Tensor | None = None, *, temperature: float = 1.0, kl_weight: float = 1.0,
    **options: Any,
) -> Any:  # fmt: skip
    """KL between rows that stand at different places: the teacher read whole demonstrations, the student their vectors.

    student_hidden [B, L_s, D] and teacher.hidden [B, L_t, D_t]; student_rows, teacher_rows: bool, the query's rows on
    each side, equally many and in the same order.  labels: [n] for those rows, adds their cross-entropy.
    """
    own, other = student_hidden[student_rows], HiddenTeacher(teacher.hidden[teacher_rows], teacher.head)
    ce = 0.0 if labels is None else 1.0
    words: dict[str, Any] = dict(temperature=temperature, distill_weight=kl_weight, ce_weight=ce, **options)
    return linear_distill_loss(own, student_head, other, labels, **words)


@row(
    27, "ALM", "arXiv:2503.20083", family="A", knowledge=CODE,
    formula="-(e^a b + (1 - e^a) log(1 - e^b)), a, b = (chunk log-probability of teacher, student) / tau - 1e-6, mean "
    "over chunks of equal bytes",
    note="Hidden states of chunks: `encoders.pooled` and `hidden.hidden_loss`.",
)  # fmt: skip
def chunk_likelihoods(
    student_hidden: Tensor, student_head: Head | Tensor, student_ids: Tensor, teacher_log_probs: Tensor,
    alignment: Alignment, *, divergence: str = "soft_cross_entropy", tau: float = 100.0, **options: Any,
) -> Tensor:  # fmt: skip
    """How likely student and teacher find the same bytes, over two tokenizers: `xtok.linear_alm_loss`."""
    words: dict[str, Any] = dict(divergence=divergence, tau=tau, **options)
    return linear_alm_loss(student_hidden, student_head, student_ids, teacher_log_probs, alignment, **words)
