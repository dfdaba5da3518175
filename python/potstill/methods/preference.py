"""Losses on preferred and rejected sequences, rankings and sets: no teacher distribution, only log-probabilities.

    scores = sequence_logprobs(hidden, head, labels)                  # [B] with gradient, no logits held
    loss = dpo_loss(scores[:n], scores[n:], reference[:n], reference[n:])

A reference is a tensor: of a live model (`sequence_logprobs` under no_grad) or of a cache (`scoring.sequence_scores`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from potstill.arguments import check_choice
from potstill.teachers import Head, HiddenTeacher
from potstill.tokens import token_logprobs

REDUCTIONS = ("mean", "sum", "none")


def reduce_logprobs(log_probs: Tensor, keep: Tensor | None = None, *, reduction: str = "sum") -> Tensor:
    """Sequence log-probabilities [...] from those of tokens [..., L].

    keep: bool [..., L], the tokens that count (the answer's, without the prompt's); None keeps all.
    reduction: "sum", log p(y | x), or "mean", which divides by the number of kept tokens (at least 1).
    Equals `(log_probs * keep).sum(-1) / (keep.sum(-1).clamp(min=1) if mean else 1)`.
    """
    check_choice("reduction", reduction, ("sum", "mean"))
    if keep is None:
        keep = torch.ones_like(log_probs, dtype=torch.bool)
    if keep.shape != log_probs.shape:
        raise ValueError(f"keep has shape {list(keep.shape)}; log_probs has {list(log_probs.shape)}")
    total = torch.where(keep, log_probs, 0.0).sum(-1)
    return total if reduction == "sum" else total / keep.sum(-1).clamp(min=1).to(total.dtype)


def sequence_logprobs(
    hidden: Tensor, head: Head | Tensor, labels: Tensor, *, reduction: str = "sum", chunk_rows: int | None = None,
    precise: bool = False,
) -> Tensor:  # fmt: skip
    """Log-probability [...] of each sequence, with gradient; no [tokens, vocabulary] matrix is held.

    hidden: [..., L, D], row i predicts labels[..., i]: nothing is shifted.  labels: [..., L] int64, or -100.
    reduction: "sum" or "mean" over the labelled tokens of a sequence.
    """
    found = token_logprobs(hidden, head, labels, chunk_rows=chunk_rows, precise=precise)
    assert isinstance(found, Tensor)
    return reduce_logprobs(found, labels != -100, reduction=reduction)


def _reduced(rows: Tensor, reduction: str) -> Tensor:
    check_choice("reduction", reduction, REDUCTIONS)
    return rows if reduction == "none" else rows.sum() if reduction == "sum" else rows.mean()


def _same(**given: Tensor | None) -> None:
    shapes = {name: list(x.shape) for name, x in given.items() if x is not None}
    if len({tuple(shape) for shape in shapes.values()}) > 1:
        raise ValueError(f"sequence log-probabilities differ in shape: {shapes}; give one number a pair in each")


def preference_margin(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor | None = None, reference_rejected: Tensor | None = None
) -> Tensor:
    """h = (log q(y_w) - log q(y_l)) - (log r(y_w) - log r(y_l)), [...]; without a reference r is constant.

    chosen, rejected: [...] sequence log-probabilities of the student q. The reference r gets no gradient.
    """
    _same(chosen=chosen, rejected=rejected, reference_chosen=reference_chosen, reference_rejected=reference_rejected)
    if (reference_chosen is None) != (reference_rejected is None):
        raise ValueError("one side of the reference is missing; give both reference_chosen and reference_rejected")
    margin = chosen - rejected
    if reference_chosen is None or reference_rejected is None:
        return margin
    return margin - (reference_chosen - reference_rejected).detach()


def dpo_loss(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor | None = None, reference_rejected: Tensor | None = None,
    *, beta: float = 0.1, label_smoothing: float = 0.0, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h), h of `preference_margin`, e the label smoothing.

    Arguments: sequence log-probabilities [...], sums (the usual form) or means over tokens.  beta > 0; 0 <= e < 1/2.
    DPO, arXiv:2305.18290 (read in the paper). With the teacher as the reference it is LLaVA-MoD's preference loss, with
    a larger model's sequences the multimodal preference alignment (both read in the authors' code).
    """
    if not beta > 0 or not 0 <= label_smoothing < 0.5:
        raise ValueError(f"beta={beta} must be above 0 and label_smoothing={label_smoothing} in [0, 0.5)")
    h = beta * preference_margin(chosen, rejected, reference_chosen, reference_rejected)
    return _reduced(-(1 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h), reduction)


def ipo_loss(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor | None = None, reference_rejected: Tensor | None = None,
    *, beta: float = 0.1, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """(h - 1 / (2 beta))^2: a margin to reach, not to grow without end. Usually of mean log-probabilities.

    IPO, arXiv:2310.12036 (from memory; beta is the paper's tau).
    """
    if not beta > 0:
        raise ValueError(f"beta={beta} must be above 0")
    h = preference_margin(chosen, rejected, reference_chosen, reference_rejected)
    return _reduced((h - 1 / (2 * beta)).square(), reduction)


def hinge_loss(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor | None = None, reference_rejected: Tensor | None = None,
    *, beta: float = 0.1, margin: float = 1.0, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """max(0, margin - beta h). The calibration loss of SLiC-HF, arXiv:2305.10425 (from memory)."""
    if not beta > 0:
        raise ValueError(f"beta={beta} must be above 0")
    h = preference_margin(chosen, rejected, reference_chosen, reference_rejected)
    return _reduced((margin - beta * h).clamp(min=0), reduction)


LOSSES: dict[str, Callable[..., Tensor]] = {"dpo": dpo_loss, "ipo": ipo_loss, "hinge": hinge_loss}


def linear_preference_loss(
    hidden: Tensor, head: Head | Tensor, labels: Tensor, reference: Tensor | HiddenTeacher | None, *, loss: str = "dpo",
    sequence: str = "sum", chunk_rows: int | None = None, precise: bool = False, **options: float | str,
) -> Tensor:  # fmt: skip
    """A preference loss of a batch whose first half is chosen and whose second half, in the same order, rejected.

    hidden: [2 B, L, D]; head; labels: [2 B, L], -100 for prompt and padding; nothing is shifted.
    reference: a live model as HiddenTeacher(hidden [2 B, L, D_r], head), its sequence log-probabilities [2 B] from a
        cache, reduced as `sequence` says, or None.
    loss: "dpo", "ipo" or "hinge", with its options.  sequence: "sum" or "mean" over the tokens of a sequence.
    """
    check_choice("loss", loss, tuple(LOSSES))
    if hidden.shape[0] % 2 or hidden.dim() != 3:
        raise ValueError(f"hidden has shape {list(hidden.shape)}; [2 B, L, D] is needed, the chosen sequences first")
    scores = sequence_logprobs(hidden, head, labels, reduction=sequence, chunk_rows=chunk_rows, precise=precise)
    if isinstance(reference, HiddenTeacher):
        with torch.no_grad():
            reference = sequence_logprobs(reference.hidden, reference.head, labels, reduction=sequence, precise=precise)
    pairs = scores.chunk(2)
    if reference is not None:
        _same(student=scores, reference=reference)
        pairs += reference.to(scores.dtype).chunk(2)
    return LOSSES[loss](*pairs, **options)


def pairwise_rank_loss(
    scores: Tensor, rewards: Tensor | None = None, *, margin: float = 0.0, keep: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """sum over pairs with i ranked above j of max(0, s_j - s_i + margin), one sum for each set of candidates.

    scores: [..., n], usually length-normalised sequence log-probabilities.
    rewards: [..., n], i is above j where its reward is larger; None: the candidates stand best first (all pairs i < j).
    keep: bool [..., n], the candidates there are.
    RRHF, arXiv:2304.05302 (from memory); CycleAlign's ranking term beside the cross-entropy of the best (from memory).
    """
    n = scores.shape[-1]
    if rewards is None:
        above = torch.ones(n, n, dtype=torch.bool, device=scores.device).triu(1).expand(*scores.shape, n)
    else:
        _same(scores=scores, rewards=rewards)
        above = rewards[..., :, None] > rewards[..., None, :]
    if keep is not None:
        _same(scores=scores, keep=keep)
        above = above & keep[..., :, None] & keep[..., None, :]
    gap = (scores[..., None, :] - scores[..., :, None] + margin).clamp(min=0)  # [..., i, j]
    return _reduced(torch.where(above, gap, 0.0).sum((-1, -2)), reduction)


def min_over_set(values: Tensor, weights: Tensor | None = None, *, keep: Tensor | None = None) -> Tensor:
    """min_j w_j v_j over the last dimension, [...]; the gradient goes to the (first) minimum alone. No candidate gives
    0.

    values: [..., n]; weights: [..., n], no gradient; keep: bool [..., n], the candidates there are.
    """
    weighted = values if weights is None else values * weights.detach()
    if keep is None:
        return weighted.min(-1).values
    _same(values=values, keep=keep)
    found = torch.where(keep, weighted, float("inf")).min(-1).values
    return torch.where(keep.any(-1), found, 0.0)


def contrast_over_sets(
    positive: Tensor, negative: Tensor, weights: Tensor | None = None, *, margin: float = 3.0,
    negative_weight: float = 0.2, keep_positive: Tensor | None = None, keep_negative: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """min_j w_j c+_j - negative_weight * min(min_j c-_j - margin, 0).

    positive: [..., n], cross-entropies of good rationales, weighted by their quality [..., n]; the cheapest is learned.
    negative: [..., m], cross-entropies of bad ones: the likeliest is pushed down until it passes `margin`.
    QCRD, arXiv:2405.13014 (second hand: minimum, weight, margin 3 and 0.2; the side of the clamp is our reading).
    """
    push = (min_over_set(negative, keep=keep_negative) - margin).clamp(max=0)
    if keep_negative is not None:
        push = torch.where(keep_negative.any(-1), push, 0.0)
    return _reduced(min_over_set(positive, weights, keep=keep_positive) - negative_weight * push, reduction)


def agreement_ranking(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """The longest common subsequence of two rankings of the same items (best first), in order.

    What two judges agree on, for CycleAlign (arXiv:2310.16271), whose own rule was not at hand. Of several longest ones
    the first in `first`'s order.
    """
    if len(set(first)) != len(first) or len(set(second)) != len(second):
        raise ValueError("a ranking names an item twice; give each item once, best first")
    place = {item: i for i, item in enumerate(second)}
    best: list[list[int]] = []  # the longest agreement that begins with each item of first, from the last item on
    for item in reversed([item for item in first if item in place]):
        after = [found for found in best if place[found[0]] > place[item]]
        best.append([item, *max(reversed(after), key=len, default=[])])
    return max(reversed(best), key=len, default=[])
