"""ULD (sorted probabilities), and the hybrid of it with KL on matched ids, over aligned chunks.

ULD: Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs", arXiv
2402.12030. The hybrid follows the General Online Logit Distillation of TRL's GOLD trainer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from potstill.extraction import linear_topk
from potstill.teachers import Head, TopK
from potstill.xtok.alignment import Alignment
from potstill.xtok.alm import next_token_log_probs, predicted_chunks
from potstill.xtok.at import log_probs_at


def uld_loss(
    student_hidden: Tensor, student_head: Head | Tensor, teacher: TopK, *, k: int | None = None,
    row_weights: Tensor | None = None, reduction: str = "mean", precise: bool = False,
) -> Tensor:  # fmt: skip
    """Distance of the sorted probabilities of row pairs, `(p.sort() - q.sort()).abs().sum(-1)`, with the
    entries beyond the k-th of each side taken together.

    student_hidden: [N, D], whose rows line up with the teacher's (row pairs of chunks: see `first_rows`).  teacher:
    TopK [N, K] of the other vocabulary.  k: student entries, default the teacher's K.  row_weights: [N].  reduction:
    "mean" (weighted), "sum", "none".

    The gradient is that of the student's k probabilities and of their sum. Taking the tails together bounds the loss
    from below; they seldom cross, and at k = 128 the difference on real logits is some thousandths of the loss.
    """
    x = student_hidden.reshape(-1, student_hidden.shape[-1])
    t_log_probs = teacher.log_probs.reshape(len(x), -1)
    count = t_log_probs.shape[1] if k is None else k
    ids = linear_topk(x.detach(), student_head, count, precise=precise).ids
    q = log_probs_at(x, student_head, ids, precise=precise).exp()
    width = min(count, t_log_probs.shape[1])
    q, p = (side.sort(-1, descending=True).values[:, :width] for side in (q, t_log_probs.to(q.dtype).exp()))
    loss = (q - p).abs().sum(-1) + (q.sum(-1) - p.sum(-1)).abs()  # the tails differ by as much as the heads
    return _reduced(loss, row_weights, reduction)


def uld_full(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """ULD of every row by full sorts, [N]: the reference. Vocabularies may differ; the shorter side is padded by 0."""
    q, p = (z.softmax(-1).sort(-1, descending=True).values for z in (student_logits, teacher_logits))
    width = max(q.shape[-1], p.shape[-1])
    q, p = (torch.nn.functional.pad(side, (0, width - side.shape[-1])) for side in (q, p))
    return (q - p).abs().sum(-1)


def sorted_distance(q: Tensor, p: Tensor) -> Tensor:
    """q, p [N, K] probabilities of some entries of each side -> [N], `(q.sort() - p.sort()).abs().sum(-1)`."""
    return (q.sort(-1, descending=True).values - p.sort(-1, descending=True).values).abs().sum(-1)


def first_rows(alignment: Alignment, *, last: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that predict the first token (or the last one) of each valid chunk: (student rows [M], teacher rows [M],
    chunks [M]), int64.

    Rows count flat, as in student_chunk; the row of a token is the one before it. Chunks at a row's beginning, which
    nothing predicts, are left out.
    """
    chunks = (alignment.valid & predicted_chunks(alignment)).nonzero()[:, 0]
    row = torch.searchsorted(alignment.row_ptr, chunks, right=True) - 1
    spans = alignment.spans[chunks].long()
    at = spans[:, :, 1] - 2 if last else spans[:, :, 0] - 1
    return at[:, 0] + alignment.student_ptr[row], at[:, 1] + alignment.teacher_ptr[row], chunks


def merged_scale(log_probs: Tensor, chunk: Tensor, kept: Tensor, count: int) -> Tensor:
    """Log-probability of each chunk's tokens but one, [C]: what merging multiplies that token's row by.

    log_probs, chunk: [n], of every token.  kept: [M], flat index of the token of each merged chunk that keeps its row.
    One sum over tokens, so linear in them.
    """
    others = log_probs.reshape(-1).index_fill(0, kept, 0.0)
    slot = torch.where(chunk < 0, count, chunk).long()
    return others.new_zeros(count + 1).index_add(0, slot, others)[:count]


def gold_loss(
    student_hidden: Tensor, student_head: Head | Tensor, student_ids: Tensor, teacher: TopK,
    alignment: Alignment, matched: tuple[Any, Any], *, matched_weight: float = 1.0, unmatched_weight: float = 1.0,
    merge: str | None = "observed", teacher_log_probs: Tensor | None = None, precise: bool = False,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """KL on ids that both vocabularies have, sorted distance on the rest, one row pair for each aligned chunk.

    student_hidden: [n, D], student_ids [n] flat as alignment.student_chunk; row i predicts token i + 1.  teacher: TopK
    [m, K], row j predicting token j + 1.  matched: (student ids, teacher ids) of
    `student_vocab.matched(teacher_vocab)`.
    merge: a chunk of several tokens is one prediction, on either side: "observed", the row of its first token times the
        probability of the tokens behind it; "bayesian", the row of its last token times that of the tokens before it;
        the teacher's come from teacher_log_probs [m], log-probability of every token given those before it. None
        compares first rows alone.

    For each chunk: `sum_v p_v (log p_v - log q_v)` over the teacher's matched entries and one entry for everything
    else, times matched_weight, and `sorted_distance` of the unmatched ones, times unmatched_weight. With equal
    vocabularies and chunks of one token it is forward KL with a tail bucket. Memory is chunks x K.
    """
    device = student_hidden.device
    if merge not in ("observed", "bayesian", None):
        raise ValueError(f"merge={merge!r} is none of 'observed', 'bayesian', None")
    s_rows, t_rows, chunks = first_rows(alignment, last=merge == "bayesian")
    x = student_hidden.reshape(-1, student_hidden.shape[-1])[s_rows]
    head = student_head if isinstance(student_head, Head) else Head(student_head)
    own, other = (torch.as_tensor(ids, device=device).long() for ids in matched)
    t_ids = teacher.ids.reshape(-1, teacher.ids.shape[-1])[t_rows].long()
    t_log_probs = teacher.log_probs.reshape(-1, teacher.log_probs.shape[-1])[t_rows]
    top = linear_topk(x.detach(), head, t_ids.shape[1], precise=precise).ids.long()
    seen = [int(ids.max()) for ids in (t_ids, other) if ids.numel()]
    to_student = own.new_full((max(seen, default=0) + 1,), -1)
    to_student[other] = own
    is_matched = torch.zeros(head.weight.shape[0], dtype=torch.bool, device=device)
    is_matched[own] = True
    at = to_student[t_ids]
    found = log_probs_at(x, head, torch.cat([at, top], 1), precise=precise)
    lq, lq_top = found[:, : at.shape[1]], found[:, at.shape[1] :]
    lp = t_log_probs.to(lq.dtype)
    if merge:
        if teacher_log_probs is None:
            raise ValueError(f"merge={merge!r} needs teacher_log_probs [m], or pass merge=None")
        flat = student_hidden.reshape(-1, student_hidden.shape[-1])
        tokens = next_token_log_probs(flat, head, student_ids.reshape(-1), alignment.student_ptr, precise=precise)
        s_scale = merged_scale(tokens, alignment.student_chunk, s_rows + 1, len(alignment))[chunks]
        t_scale = merged_scale(teacher_log_probs.detach(), alignment.teacher_chunk, t_rows + 1, len(alignment))[chunks]
        lq, lq_top = lq + s_scale[:, None], lq_top + s_scale[:, None]
        lp = lp + t_scale.to(lp.dtype)[:, None]
    on_both = at >= 0
    p, q = torch.where(on_both, lp.exp(), 0.0), torch.where(on_both, lq.exp(), 0.0)
    tiny = torch.finfo(q.dtype).tiny
    p_rest, q_rest = (1 - p.sum(1)).clamp(min=tiny), (1 - q.sum(1)).clamp(min=tiny)
    kl = (p * torch.where(on_both, lp - lq, 0.0)).sum(1) + p_rest * (p_rest.log() - q_rest.log())
    alone_q = torch.where(is_matched[top], 0.0, lq_top.exp())
    alone_p = torch.where(on_both, 0.0, lp.exp())
    loss = matched_weight * kl + unmatched_weight * sorted_distance(alone_q, alone_p)
    return _reduced(loss, None, reduction)


def _reduced(loss: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r} is none of mean, sum, none")
    if weights is not None:
        loss = loss * weights.reshape(-1)
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    items = loss.new_tensor(float(len(loss))) if weights is None else weights.sum()
    return total / items.clamp(min=torch.finfo(loss.dtype).tiny)
