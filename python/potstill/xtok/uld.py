"""ULD, sorted probabilities: Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation
Loss for LLMs", arXiv 2402.12030."""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.extraction import linear_topk
from potstill.teachers import Head, TopK
from potstill.tokens import token_logprobs


def uld_loss(
    student_hidden: Tensor, student_head: Head | Tensor, teacher: TopK, *, k: int | None = None,
    scales: tuple[Tensor, Tensor] | None = None, row_weights: Tensor | None = None, reduction: str = "mean",
    precise: bool = False, chunk_rows: int | None = None,
) -> Tensor:  # fmt: skip
    """Distance of the sorted probabilities of row pairs, `(p.sort() - q.sort()).abs().sum(-1)`, with the
    entries beyond the k-th of each side taken together.

    student_hidden: [N, D], whose rows line up with the teacher's (row pairs of chunks: `first_rows`, `merged_rows`).
    teacher: TopK [N, K] of the other vocabulary.  k: student entries, default the teacher's K.
    scales: (student [N], teacher [N]), added to the rows' log-probabilities (`merged_rows`).
    row_weights: [N].  reduction: "mean" (weighted), "sum", "none".

    The gradient is that of the student's k probabilities and of their sum. Taking the tails together bounds the loss
    from below; they seldom cross, and at k = 128 the difference on real logits is some thousandths of the loss.
    """
    x = student_hidden.reshape(-1, student_hidden.shape[-1])
    lp = teacher.log_probs.reshape(len(x), -1)
    count = lp.shape[1] if k is None else k
    ids = linear_topk(x.detach(), student_head, count, precise=precise, chunk_rows=chunk_rows).ids
    lq = token_logprobs(x, student_head, ids, precise=precise, chunk_rows=chunk_rows)
    assert isinstance(lq, Tensor)
    lp = lp.to(lq.dtype)
    whole = lq.new_zeros(len(x)), lp.new_zeros(len(x))
    if scales is not None:
        whole = scales[0].to(lq.dtype), scales[1].detach().to(lq.dtype)
        lq, lp = lq + whole[0][:, None], lp + whole[1][:, None]
    width = min(count, lp.shape[1])
    q, p = (side.exp().sort(-1, descending=True).values[:, :width] for side in (lq, lp))
    tails = (whole[0].exp() - q.sum(-1)) - (whole[1].exp() - p.sum(-1))
    return reduced((q - p).abs().sum(-1) + tails.abs(), row_weights, reduction)


def uld_full(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """ULD of every row by full sorts, [N]: the reference. Vocabularies may differ; the shorter side is padded by 0."""
    q, p = (z.softmax(-1).sort(-1, descending=True).values for z in (student_logits, teacher_logits))
    width = max(q.shape[-1], p.shape[-1])
    q, p = (torch.nn.functional.pad(side, (0, width - side.shape[-1])) for side in (q, p))
    return (q - p).abs().sum(-1)


def sorted_distance(q: Tensor, p: Tensor) -> Tensor:
    """q, p [N, K] probabilities of some entries of each side -> [N], `(q.sort() - p.sort()).abs().sum(-1)`."""
    return (q.sort(-1, descending=True).values - p.sort(-1, descending=True).values).abs().sum(-1)


def reduced(loss: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
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
