"""Contrastive losses: a fused linear loss whose head is the other side's features, scaled by 1 / temperature.

    loss = contrastive_loss(student_features, teacher_features, temperature=0.07)
    loss = contrastive_loss(image, text, targets=soft_targets(teacher_image, teacher_text, alpha=0.4), two_way=True)

No [anchors, candidates] matrix is held. Candidates may be the batch alone or the batch followed by a `Queue`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from potstill.divergences import Divergence
from potstill.losses import linear_distill_loss
from potstill.methods.hidden import reduced, unit, wide
from potstill.methods.lse import log_sum_exp
from potstill.mixtures import Mix, OneHot
from potstill.teachers import Head, HiddenTeacher, LogitsTeacher, TopK


def contrastive_loss(
    anchors: Tensor, candidates: Tensor, *, temperature: float | Tensor = 0.07, positives: Tensor | None = None,
    labels: Tensor | None = None, candidate_labels: Tensor | None = None, positive_in_denominator: bool = True,
    normalize: bool = True, two_way: bool = False, token_weights: Tensor | None = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """InfoNCE: minus the log of the positive's share among the candidates, with z_ij = a_i . c_j / temperature.

    anchors: [N, D] fp64, fp32, bf16 or fp16.  candidates: [M, D], M >= N; both get gradients where they want them
        (detach a teacher's features).
    temperature: > 0; a 0-dim tensor may learn (the features are then widened to fp32).
    positives: int [N], the candidate of each anchor; None: candidate i for anchor i. -100 leaves an anchor out.
    labels: int [N] with candidate_labels int [M] (None: labels, M = N): candidates of an anchor's own label other than
        its positive are left out of the denominator (LinguGKD, arXiv:2402.05894, read in the authors' code).
    positive_in_denominator: False leaves the positive out too: -z_ip + log sum over the others of exp(z_ij) (LEADER,
        arXiv:2402.02803, read in the authors' code); an anchor without any other candidate then counts 0.
    normalize: divide every feature vector by its length first.
    two_way: the mean of this loss and of that with the sides exchanged; then M = N and positives is None.
    token_weights: [N] by anchor.  reduction: "mean", "sum" or "none" ([N]).

    Equals, with the defaults, `F.cross_entropy(unit(a) @ unit(c).T / temperature, torch.arange(N))`. fp32 (fp64).
    """
    a, c, scale = _sides(anchors, candidates, temperature, normalize)
    n = len(a)
    if positives is None:
        if len(c) < n:
            raise ValueError(f"{len(c)} candidates for {n} anchors: candidate i is the positive of anchor i")
        at = torch.arange(n, device=a.device)
    else:
        at = positives
    if two_way and (positives is not None or len(c) != n):
        raise ValueError(
            "two_way exchanges the sides, so candidate i must belong to anchor i and there are no others; with a queue "
            "for each side, average two calls"
        )
    if labels is None and candidate_labels is not None:
        raise ValueError("candidate_labels were given without labels; give the anchors' labels too")
    theirs = labels if candidate_labels is None else candidate_labels
    ways = [(a, c, labels, theirs), *([(c, a, theirs, labels)] if two_way else [])]
    found: list[Any] = []
    for x, y, x_labels, y_labels in ways:
        if x_labels is None and positive_in_denominator:
            head = Head(y, logit_scale=scale)
            words: dict[str, Any] = dict(distill_weight=0.0, ce_weight=1.0, token_weights=token_weights)
            found.append(linear_distill_loss(x, head, None, at, reduction=reduction, **words))
            continue
        lse = log_sum_exp(x, y, scale, at, x_labels, y_labels, positive_in_denominator)
        z = (wide(x) * wide(y)[at.clamp(min=0)]).sum(-1) * scale
        alone = lse == float("-inf")
        rows = torch.where(alone, 0.0, torch.where(alone, 0.0, lse) - z)
        weights = torch.ones_like(rows) if token_weights is None else token_weights.to(rows.dtype)
        found.append(reduced(rows, torch.where(at >= 0, weights, 0.0), reduction, None))
    loss: Tensor = found[0] if len(found) == 1 else (found[0] + found[1]) / 2
    return loss


def similarity_loss(
    anchors: Tensor, candidates: Tensor, targets: HiddenTeacher | LogitsTeacher | TopK | Mix, *,
    temperature: float | Tensor = 0.07, divergence: str | Divergence = "soft_cross_entropy", normalize: bool = True,
    token_weights: Tensor | None = None, reduction: str = "mean", num_items: int | Tensor | None = None,
    tail: str = "renormalize",
) -> Tensor:  # fmt: skip
    """The divergence between a distribution over candidates and that of softmax(a_i . c_j / temperature).

    anchors: [..., D].  candidates: [M, D]; gradients as in `contrastive_loss`.
    targets: a teacher over the M candidates: `soft_targets(...)`, LogitsTeacher(similarities [..., M]), TopK of the
        candidates an anchor is compared on (tail="renormalize": over these alone).
    divergence: "soft_cross_entropy", -sum p log q, is what contrastive papers minimise; "forward_kl" differs by the
        targets' entropy, which no gradient reaches.
    Equals, for LogitsTeacher(t) and z = unit(a) @ unit(c).T / temperature,
    `-(t.softmax(-1) * z.log_softmax(-1)).sum(-1).mean()`.
    """
    a, c, scale = _sides(anchors, candidates, temperature, normalize)
    loss: Tensor = linear_distill_loss(
        a, Head(c, logit_scale=scale), targets, divergence=divergence, token_weights=token_weights,
        reduction=reduction, num_items=num_items, tail=tail,
    )  # fmt: skip
    return loss


def soft_targets(
    anchors: Tensor, candidates: Tensor, *, temperature: float | Tensor = 0.07, alpha: float | Tensor = 1.0,
    positives: Tensor | None = None, normalize: bool = True,
) -> HiddenTeacher | Mix:  # fmt: skip
    """alpha * softmax(a_i . c_j / temperature) + (1 - alpha) * one-hot(positive), a teacher that is never held whole.

    anchors: [..., D], candidates: [M, D], of the teacher (a momentum model's): no gradient.
    alpha: 0..1, a 0-dim tensor for a ramp; 1 gives the similarities alone.
    positives: int [...]; None: candidate i for anchor i.
    ALBEF's targets, arXiv:2107.07651 (read in the authors' code).
    """
    a, c, scale = _sides(anchors.detach(), candidates.detach(), temperature, normalize)
    teacher = HiddenTeacher(a, Head(c, logit_scale=scale))
    if not isinstance(alpha, Tensor) and alpha == 1:
        return teacher
    at = torch.arange(len(a), device=a.device) if positives is None else positives
    return Mix([(alpha, teacher), (1 - alpha, OneHot(at))], space="probabilities")


@dataclass(frozen=True)
class Bound:
    """A lower bound of the mutual information in nats, 0-dim, and its two terms: value = 1 + joint - marginal."""

    value: Tensor
    joint: Tensor
    marginal: Tensor


def mutual_information_bound(
    x: Tensor, y: Tensor, *, alpha: float = 0.5, temperature: float | Tensor = 1.0, log_baseline: Tensor | float = 0.0,
    normalize: bool = False,
) -> Bound:  # fmt: skip
    """The interpolated bound I_alpha of the mutual information of paired features; minimise `-bound.value`.

    x: [K, D], y: [K, D], row i of both drawn together.  f_ij = x_i . y_j / temperature.
    alpha: 0..1. 1 is InfoNCE, at most log K, of little variance; 0 the NWJ bound with log q = log_baseline, of much.
    log_baseline: log q(y_j), [K] or a number; may learn.
    With m_j = mean over i of exp f_ij and m'_j the same without i = j,
    `1 + mean_j [f_jj - log(alpha m_j + (1 - alpha) q_j)] - mean_j [m'_j / (alpha m'_j + (1 - alpha) q_j)]`:
    pairs from different rows stand for independent ones.
    Distiller's MI-alpha, arXiv:2109.11105 (from memory, after the bound of arXiv:1905.06922, from memory too).
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} is outside [0, 1]")
    if x.shape != y.shape or len(x) < 2:
        raise ValueError(f"x {list(x.shape)} and y {list(y.shape)} must be pairs [K, D], K >= 2")
    a, c, scale = _sides(y, x, temperature, normalize)
    k = len(x)
    at = torch.arange(k, device=x.device)
    positive = (wide(a) * wide(c)).sum(-1) * scale
    others = log_sum_exp(a, c, scale, at, None, None, False)
    log_m = torch.logaddexp(others, positive) - math.log(k)
    log_apart = others - math.log(k - 1)
    baseline = torch.as_tensor(log_baseline, dtype=log_m.dtype, device=x.device).expand(k)
    joint = (positive - _log_mix(log_m, baseline, alpha)).mean()
    marginal = (log_apart - _log_mix(log_apart, baseline, alpha)).exp().mean()
    return Bound(1 + joint - marginal, joint, marginal)


class Queue(nn.Module):
    """The last `size` feature vectors, oldest first out: negatives beyond the batch. Saved with the model's state.

    keys = torch.cat([batch_keys, queue.features]); after the step queue.push(batch_keys).
    """

    store: Tensor
    pushed: Tensor

    def __init__(self, size: int, width: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        if size < 1 or width < 1:
            raise ValueError(f"a queue of {size} vectors of {width} features; both must be at least 1")
        self.register_buffer("store", torch.zeros(size, width, dtype=dtype))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))

    @property
    def features(self) -> Tensor:
        """[n, D], the vectors pushed so far, at most `size`; no gradient."""
        return self.store[: int(self.pushed)].clone()

    @torch.no_grad()
    def push(self, features: Tensor) -> None:
        """Add [n, D]; the oldest n leave once the queue is full. Raises ValueError for other widths."""
        if features.dim() != 2 or features.shape[1] != self.store.shape[1]:
            raise ValueError(f"features have shape {list(features.shape)}; the queue holds [n, {self.store.shape[1]}]")
        size = len(self.store)
        last = features.detach()[-size:].to(self.store.dtype)
        start = int(self.pushed) + len(features) - len(last)
        at = torch.arange(start, start + len(last), device=self.store.device) % size
        self.store[at] = last
        self.pushed += len(features)


def _sides(
    anchors: Tensor, candidates: Tensor, temperature: float | Tensor, normalize: bool
) -> tuple[Tensor, Tensor, float]:
    """(anchors, candidates, scale): unit length where asked for; a learned temperature goes into the anchors."""
    if anchors.dim() < 1 or candidates.dim() != 2 or anchors.shape[-1] != candidates.shape[1]:
        raise ValueError(
            f"anchors {list(anchors.shape)} and candidates {list(candidates.shape)}; they must be [..., D] and [M, D]"
        )
    dtypes = anchors.dtype, candidates.dtype
    a, c = (unit(anchors), unit(candidates)) if normalize else (anchors, candidates)
    if isinstance(temperature, Tensor):
        return wide(a) / temperature, wide(c), 1.0
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
    return a.to(dtypes[0]), c.to(dtypes[1]), 1 / temperature


def _log_mix(log_m: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """log(alpha m + (1 - alpha) q)."""
    if alpha == 1:
        return log_m
    if alpha == 0:
        return log_q
    return torch.logaddexp(log_m + math.log(alpha), log_q + math.log1p(-alpha))
