"""Measurements of a model or of a distillation: calibration, kept mass, AUROC, divergence meters, teacher hacking."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from potstill.extraction import linear_topk
from potstill.losses import linear_distill_loss
from potstill.mixtures import Teacher
from potstill.teachers import Head, TopK

BINS = 15


@dataclass(frozen=True)
class Calibration:
    """Confidence against accuracy in equal bins of confidence; counts, confidence, accuracy: [bins], 0 in an empty."""

    counts: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def ece(self) -> float:
        """Expected calibration error: sum_b n_b / n |accuracy_b - confidence_b|. Guo et al., arXiv:1706.04599."""
        gaps = (self.accuracy - self.confidence).abs()
        return float((self.counts * gaps).sum() / self.counts.sum().clamp(min=1))


def calibration(confidence: Tensor, correct: Tensor, *, bins: int = BINS) -> Calibration:
    """Bins (b / bins, (b + 1) / bins], the first with its 0.

    confidence: [...] probabilities of what was predicted; correct: [...] bool.
    """
    c, y = confidence.reshape(-1).double(), correct.reshape(-1).double()
    if c.shape != y.shape or bins < 1:
        raise ValueError(f"{len(c)} confidences, {len(y)} outcomes, bins={bins}: as many of each and a bin are needed")
    if len(c) and not bool(((c >= 0) & (c <= 1 + 1e-6)).all()):
        raise ValueError(f"confidences lie in [{float(c.min())}, {float(c.max())}]; probabilities are needed")
    place = ((c * bins).ceil().long() - 1).clamp(0, bins - 1)
    counts, sums, hits = (c.new_zeros(bins).index_add(0, place, x) for x in (torch.ones_like(c), c, y))
    n = counts.clamp(min=1)
    return Calibration(counts, sums / n, hits / n)


def token_calibration(hidden: Tensor, head: Head | Tensor, labels: Tensor, *, bins: int = BINS) -> Calibration:
    """`calibration` of next-token prediction: the most probable token's probability, and whether it is the label.

    hidden: [..., D], row i predicts labels[...]; labels of -100 are left out. No [rows, V] matrix is held.
    """
    best = linear_topk(hidden, head, 1)
    valid = labels != -100
    return calibration(best.log_probs[..., 0].exp()[valid], (best.ids[..., 0] == labels)[valid], bins=bins)


def topk_mass(top: TopK) -> Tensor:
    """[..., K]: the teacher's mass on its first 1, 2, ..., K entries. FIRST (arXiv:2408.12168) keeps five of them."""
    return top.log_probs.double().exp().cumsum(-1)


def auroc(scores: Tensor, positive: Tensor) -> float:
    """The chance that a positive example scores above a negative one, ties counting one half.

    scores: [n], positive: bool [n], at least one of each. For out-of-domain text scores are perplexities
    (`perplexity`) and positives the texts from outside.
    """
    s, y = scores.reshape(-1).double(), positive.reshape(-1).bool()
    ups, downs = int(y.sum()), int((~y).sum())
    if len(s) != len(y) or not ups or not downs or bool(s.isnan().any()):
        raise ValueError(f"{len(s)} scores, {ups} positive and {downs} negative examples: both are needed, and no NaN")
    _, place, counts = s.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[place]  # of equal scores the middle rank
    return (float(ranks[y].sum()) - ups * (ups + 1) / 2) / (ups * downs)


def perplexity(mean_log_probs: Tensor) -> Tensor:
    """exp(-mean log-probability a token), from `preference.sequence_logprobs(..., reduction="mean")`."""
    return (-mean_log_probs).exp()


class DivergenceMeter:
    """Token means of divergences and metrics over batches, without logits of all rows.

        meter = DivergenceMeter("forward_kl", "total_variation", "acceptance")
        for batch in batches: meter.add(hidden, head, teacher, labels)
        meter.means()                                            # {"forward_kl": ..., ...}

    names: divergences of `potstill.divergences` (or such objects) and metrics of `potstill.metrics`.
    """

    def __init__(self, *names: Any) -> None:
        from potstill import metrics

        self.metrics = tuple(n for n in names if n in metrics.NAMES)
        self.divergences = {str(n): n for n in names if n not in metrics.NAMES}
        self.totals: dict[str, float] = dict.fromkeys([*self.divergences, *self.metrics], 0.0)
        self.tokens = 0

    @torch.no_grad()
    def add(self, hidden: Tensor, head: Head | Tensor, teacher: Teacher, labels: Tensor, **options: Any) -> None:
        """One batch: labels [...] count where they are not -100; options as for `linear_distill_loss`."""
        words = {"reduction": "sum", **options}
        first = True
        for name, divergence in (self.divergences or {"": "forward_kl"}).items():
            asked = self.metrics if first else ()
            found = linear_distill_loss(
                hidden, head, teacher, labels, divergence=divergence, return_metrics=asked or False, **words
            )
            value, parts = found if asked else (found, {})
            first = False
            if name:
                self.totals[name] += float(value)
            for metric in asked:
                self.totals[metric] += float(parts[metric])
        self.tokens += int((labels != -100).sum())

    def means(self) -> dict[str, float]:
        return {name: total / max(1, self.tokens) for name, total in self.totals.items()}


def sequence_kl(log_p: Tensor, log_q: Tensor) -> tuple[float, float]:
    """KL(p || q) of whole sequences from n draws of p, and its standard error: the mean of log p(y) - log q(y).

    log_p, log_q: [n] sequence log-probabilities of the same n sequences, sampled from p at T = 1.
    """
    gap = (log_p - log_q).double()
    return float(gap.mean()), float(gap.std() / math.sqrt(len(gap))) if len(gap) > 1 else math.inf


def sequence_kl_exact_tokens(token_kl: Tensor, keep: Tensor) -> tuple[float, float]:
    """The same from the exact KL of each position along the n draws: their sum has the same mean and less variance.

    token_kl: [n, L], sum_v p log(p / q) at each position; keep: bool [n, L], positions up to the end of each sequence.
    """
    sums = torch.where(keep, token_kl, 0.0).double().sum(-1)
    return float(sums.mean()), float(sums.std() / math.sqrt(len(sums))) if len(sums) > 1 else math.inf


@dataclass(frozen=True)
class Hacking:
    """Proxy and golden curve read together. turn: the place of the smallest golden value; rise: how far golden ends
    above it; proxy_fall: how far the proxy fell from there to the end."""

    turn: int
    rise: float
    proxy_fall: float

    @property
    def hacked(self) -> bool:
        """The student came nearer to its teacher while it went away from the truth."""
        return self.rise > 0 and self.proxy_fall > 0


def teacher_hacking(proxy: Sequence[float], golden: Sequence[float]) -> Hacking:
    """proxy: the student's distance to its teacher at successive times; golden: its distance to the oracle.

    Teacher hacking, arXiv:2502.02671 (set-up second hand; which estimator the paper uses is from memory: give either of
    `sequence_kl` and `sequence_kl_exact_tokens`). No allowance for noise is made: compare `rise` with it.
    """
    if len(proxy) != len(golden) or len(golden) < 2:
        raise ValueError(
            f"{len(proxy)} proxy and {len(golden)} golden values; as many of each, at least two, are needed"
        )
    turn = min(range(len(golden)), key=lambda i: golden[i])
    return Hacking(turn, golden[-1] - golden[turn], proxy[turn] - proxy[-1])
