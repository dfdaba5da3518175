"""The hybrid: a divergence on ids that both vocabularies have, sorted distance on the rest, as in the General Online
Logit Distillation of TRL's GOLD trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from potstill import divergences
from potstill.divergences import Divergence
from potstill.extraction import linear_topk
from potstill.teachers import Head, TopK
from potstill.tokens import token_logprobs
from potstill.xtok.alignment import Alignment
from potstill.xtok.chunks import NO_TOKEN, next_token_log_probs
from potstill.xtok.rows import RowPairs, first_rows, merged_rows
from potstill.xtok.uld import reduced, sorted_distance


def gold_loss(
    student_hidden: Tensor, student_head: Head | Tensor, student_ids: Tensor, teacher: TopK,
    alignment: Alignment, matched: tuple[Any, Any], *, divergence: str | Divergence = "forward_kl",
    with_rest: bool = True, matched_weight: float = 1.0, unmatched_weight: float = 1.0,
    merge: str | None = "observed", teacher_log_probs: Tensor | None = None, precise: bool = False,
    chunk_rows: int | None = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """A divergence on ids that both vocabularies have, sorted distance on the rest, one row pair for each chunk.

    student_hidden: [n, D], student_ids [n] flat as alignment.student_chunk; row i predicts token i + 1.  teacher: TopK
    [m, K], row j predicting token j + 1.  matched: (student ids, teacher ids) of
    `student_vocab.matched(teacher_vocab)`.
    divergence: any that is a sum over the vocabulary.  with_rest: one entry more stands for everything that is not
        matched, so that both sides sum to one; without it the sum runs over matched entries alone.
    merge: a chunk of several tokens is one prediction, on either side: "observed" or "bayesian" (see `merged_rows`);
        the teacher's part comes from teacher_log_probs [m], log-probability of every token given those before it. None
        compares first rows alone.

    For each chunk: the divergence over the teacher's matched entries, times matched_weight, and `sorted_distance` of
    the unmatched ones, times unmatched_weight. With equal vocabularies and chunks of one token it is the divergence
    with a tail bucket. Memory is chunks x K, time linear in tokens.
    """
    d = divergences.get(divergence)
    if not isinstance(d, Divergence) or d.outer is not None or d.kind != "divergence":
        raise ValueError(f"divergence={d.name!r} is no sum over the vocabulary; take one that is, such as 'forward_kl'")
    head = student_head if isinstance(student_head, Head) else Head(student_head)
    flat = student_hidden.reshape(-1, student_hidden.shape[-1])
    pairs = RowPairs(*first_rows(alignment))
    if merge is not None:
        if teacher_log_probs is None:
            raise ValueError(f"merge={merge!r} needs teacher_log_probs [m], or pass merge=None")
        tokens = next_token_log_probs(
            flat, head, student_ids.reshape(-1), alignment.student_ptr, precise=precise, chunk_rows=chunk_rows
        )
        assert isinstance(tokens, Tensor)
        pairs = merged_rows(alignment, tokens, teacher_log_probs, merge)
    x = flat[pairs.student]
    t_ids, lp = (side.reshape(-1, side.shape[-1])[pairs.teacher] for side in (teacher.ids.long(), teacher.log_probs))
    to_student, is_matched = _maps(matched, t_ids, head)
    at = torch.where(t_ids < 0, -1, to_student[t_ids.clamp(min=0)])
    top = linear_topk(x.detach(), head, t_ids.shape[1], precise=precise, chunk_rows=chunk_rows).ids.long()
    wanted = torch.cat([torch.where(at < 0, NO_TOKEN, at), top], 1)
    found = token_logprobs(x, head, wanted, precise=precise, chunk_rows=chunk_rows)
    assert isinstance(found, Tensor)
    lp = lp.to(found.dtype)
    if pairs.student_scale is not None and pairs.teacher_scale is not None:
        found, lp = found + pairs.student_scale[:, None], lp + pairs.teacher_scale.to(lp.dtype)[:, None]
    lq, lq_top = found[:, : at.shape[1]], found[:, at.shape[1] :]
    on_both = at >= 0
    loss = matched_weight * _matched(lp, lq, on_both, d, with_rest)
    alone_q = torch.where(is_matched[top], 0.0, lq_top.exp())
    alone_p = torch.where(on_both, 0.0, lp.exp())
    return reduced(loss + unmatched_weight * sorted_distance(alone_q, alone_p), None, reduction)


def _maps(matched: tuple[Any, Any], t_ids: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """The student's id of each teacher id, -1 for none; and which of the student's ids have a partner."""
    own, other = (torch.as_tensor(ids, device=t_ids.device).long() for ids in matched)
    seen = [int(ids.max()) for ids in (t_ids, other) if ids.numel()]
    to_student = own.new_full((max(seen, default=0) + 1,), -1)
    to_student[other] = own
    is_matched = torch.zeros(head.weight.shape[0], dtype=torch.bool, device=t_ids.device)
    is_matched[own] = True
    return to_student, is_matched


def _matched(lp: Tensor, lq: Tensor, on_both: Tensor, d: Divergence, with_rest: bool) -> Tensor:
    """The divergence over matched entries [M, K], and one for everything else; [M]."""
    # what is left out must not meet the formula: its gradient need not be finite
    inside_p, inside_q = torch.where(on_both, lp, -1.0), torch.where(on_both, lq, -1.0)
    total = torch.where(on_both, d.formula(inside_p, inside_q, *d.values)[0], 0.0).sum(1)
    if not with_rest:
        return total
    tiny = torch.finfo(lq.dtype).tiny
    rests = [(1 - torch.where(on_both, side.exp(), 0.0).sum(1)).clamp(min=tiny).log() for side in (lp, lq)]
    return total + d.formula(*rests, *d.values)[0]
