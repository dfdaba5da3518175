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
from potstill.xtok.alm import predicted_chunks
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


def first_rows(alignment: Alignment) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that predict the first token of each valid chunk: (student rows [M], teacher rows [M], chunks [M]), int64.

    Rows count flat, as in student_chunk; the row of a token is the one before it. Chunks at a row's beginning, which
    nothing predicts, are left out.
    """
    chunks = (alignment.valid & predicted_chunks(alignment)).nonzero()[:, 0]
    row = torch.searchsorted(alignment.row_ptr, chunks, right=True) - 1
    first = alignment.spans[chunks][:, :, 0].long() - 1
    return first[:, 0] + alignment.student_ptr[row], first[:, 1] + alignment.teacher_ptr[row], chunks


def merged_scale(log_probs: Tensor, chunk: Tensor, spans_first: Tensor, count: int) -> Tensor:
    """Log-probability of a chunk's tokens behind its first, [C]: what merging multiplies the first row by.

    log_probs: [n] of every token.  chunk: [n].  spans_first: flat index of each chunk's first token [C]. One sum over
    tokens, so linear in them.
    """
    flat = log_probs.reshape(-1)
    behind = flat.index_fill(0, spans_first.long(), 0.0)
    slot = torch.where(chunk < 0, count, chunk).long()
    return flat.new_zeros(count + 1).index_add(0, slot, behind)[:count]


def gold_loss(
    student_hidden: Tensor, student_head: Head | Tensor, student_ids: Tensor, teacher: TopK,
    alignment: Alignment, matched: tuple[Any, Any], *, matched_weight: float = 1.0, unmatched_weight: float = 1.0,
    merge: bool = True, teacher_log_probs: Tensor | None = None, precise: bool = False, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """KL on ids that both vocabularies have, sorted distance on the rest, one row pair for each aligned chunk.

    student_hidden: [n, D], student_ids [n] flat as alignment.student_chunk; row i predicts token i + 1.  teacher: TopK
    [m, K], row j predicting token j + 1.  matched: (student ids, teacher ids) of
    `student_vocab.matched(teacher_vocab)`.
    merge: a chunk of several tokens is one prediction: the row of its first token times the probability of the tokens
        behind it, on either side ("observed" merging); the teacher's comes from teacher_log_probs [m], log-probability
        of every token given those before it. merge=False compares first rows alone.

    For each chunk: `sum_v p_v (log p_v - log q_v)` over the teacher's matched entries and one entry for everything
    else, times matched_weight, and `sorted_distance` of the unmatched ones, times unmatched_weight. With equal
    vocabularies and chunks of one token it is forward KL with a tail bucket. Memory is chunks x K.
    """
    device = student_hidden.device
    s_rows, t_rows, chunks = first_rows(alignment)
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
            raise ValueError("merge=True needs teacher_log_probs [m], or pass merge=False")
        s_scale, t_scale = _scales(x, head, student_ids, teacher_log_probs, alignment, student_hidden, chunks, precise)
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


def _scales(
    x: Tensor, head: Head, student_ids: Tensor, teacher_log_probs: Tensor, alignment: Alignment, hidden: Tensor,
    chunks: Tensor, precise: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What merging multiplies the first rows of `chunks` by, in logs: student (with gradient) and teacher."""
    from potstill.xtok.alm import next_token_log_probs

    flat = hidden.reshape(-1, hidden.shape[-1])
    tokens = next_token_log_probs(flat, head, student_ids.reshape(-1), alignment.student_ptr, precise=precise)
    row = torch.repeat_interleave(
        torch.arange(alignment.num_rows, device=x.device), alignment.row_ptr[1:] - alignment.row_ptr[:-1]
    )
    out = []
    for side, (log_probs, chunk, ptr) in enumerate(
        (
            (tokens, alignment.student_chunk, alignment.student_ptr),
            (teacher_log_probs.detach().reshape(-1), alignment.teacher_chunk, alignment.teacher_ptr),
        )
    ):
        first = alignment.spans[:, side, 0] + ptr[row]
        out.append(merged_scale(log_probs, chunk, first.clamp(max=len(log_probs) - 1), len(alignment))[chunks])
    return out[0], out[1]


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
