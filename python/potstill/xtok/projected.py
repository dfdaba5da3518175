"""The teacher's distribution in the student's vocabulary, through the sparse map between the two.

With it every loss that takes a TopK works across tokenizers: projected-vocabulary KL is `linear_distill_loss` on rows
that `first_rows` pairs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from potstill.teachers import TopK


def project_topk(teacher: TopK, projection: tuple[Any, Any, Any], *, k: int | None = None) -> TopK:
    """The teacher's rows [..., K] as rows [..., k] over the student's ids.

    projection: (row_ptr, columns, weights) of `teacher_vocab.projection(student_vocab)`: each teacher id spread over
        student ids. `decay=0` keeps the one to be predicted at that place.
    k: entries kept, default the teacher's K; the most probable ones.

    Entries that fall on the same id are added, and log_rest [...] holds all that is left: the teacher's own rest,
    entries whose ids have no map (special tokens) and what lies beyond the k-th. Ids are int32, -1 with -inf where a
    row has fewer. Raises ValueError where the teacher has no log_rest, or ids outside the map.
    """
    if teacher.log_rest is None:
        raise ValueError("projecting needs TopK.log_rest, the mass outside the K entries")
    device, dtype = teacher.log_probs.device, torch.promote_types(teacher.log_probs.dtype, torch.float32)
    row_ptr, columns = (torch.as_tensor(x, device=device).long() for x in projection[:2])
    weights = torch.as_tensor(projection[2], device=device).to(dtype)
    ids = teacher.ids.reshape(-1, teacher.k).long()
    if ids.numel() and int(ids.max()) >= len(row_ptr) - 1:
        raise ValueError(
            f"the teacher has id {int(ids.max())}, the map {len(row_ptr) - 1} rows; it is of another vocabulary"
        )
    lp = teacher.log_probs.reshape(ids.shape).to(dtype)
    spread, lost = _spread(ids, lp, row_ptr, columns, weights)
    merged_ids, merged = _added(*spread)
    keep = min(teacher.k if k is None else k, merged.shape[1])
    top = merged.topk(keep, dim=-1)
    beyond = merged.scatter(1, top.indices, -math.inf).logsumexp(1)
    rest = torch.stack([teacher.log_rest.reshape(-1).to(dtype), lost, beyond]).logsumexp(0)
    found = torch.where(top.values == -math.inf, -1, merged_ids.gather(1, top.indices)).int()
    lead = teacher.ids.shape[:-1]
    return TopK(found.reshape(*lead, keep), top.values.reshape(*lead, keep), log_rest=rest.reshape(lead))


def _spread(
    ids: Tensor, lp: Tensor, row_ptr: Tensor, columns: Tensor, weights: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Student ids and log-probabilities [N, K * width] of all entries, -1 and -inf where there is none; and the mass
    [N] of the entries without a map."""
    given = ids >= 0
    start = row_ptr[ids.clamp(min=0)]
    count = torch.where(given, row_ptr[ids.clamp(min=0) + 1] - start, 0)
    width = max(int(count.max()) if count.numel() else 0, 1)
    step = torch.arange(width, device=ids.device)
    inside = step < count[..., None]
    at = torch.where(inside, start[..., None] + step, 0)
    if len(columns):
        to = torch.where(inside, columns[at], -1)
        log_probs = torch.where(inside, lp[..., None] + weights[at].log(), -math.inf)
    else:
        to, log_probs = torch.full_like(at, -1), torch.full(at.shape, -math.inf, dtype=lp.dtype, device=lp.device)
    lost = torch.where(given & (count == 0), lp, -math.inf).logsumexp(1)
    return (to.reshape(len(ids), -1), log_probs.reshape(len(ids), -1)), lost


def _added(ids: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Entries of equal id within a row added up, in no particular order; -inf in the slots that are left over."""
    ids, order = ids.sort(dim=1)
    log_probs = log_probs.gather(1, order)
    new = torch.ones_like(ids, dtype=torch.bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    slot = new.cumsum(1) - 1
    highest = torch.full_like(log_probs, -math.inf).scatter_reduce(1, slot, log_probs, "amax")
    base = torch.where(highest == -math.inf, 0.0, highest)
    total = torch.zeros_like(log_probs).scatter_add(1, slot, (log_probs - base.gather(1, slot)).exp())
    merged_ids = torch.full_like(ids, -1).scatter(1, slot, ids)
    return merged_ids, torch.where(merged_ids < 0, -math.inf, base + total.log())
