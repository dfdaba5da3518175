"""A sparse teacher where the vocabulary is in parts: a row's K entries, once every part has given the student's."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from potstill.parts_inputs import PartTeacher, Rows
from potstill.reference.rows import NEG_INF, apply_side
from potstill.rows import RowSpec, Side


def value_at(x: Tensor, columns: Tensor, here: Tensor, side: Side) -> Tensor:
    """Logits of x [R, C] at columns [R, K], 0 where not `here`."""
    raw = x.gather(1, torch.where(here, columns, 0))
    return torch.where(here, apply_side(raw, replace(side, vocab_size=raw.shape[1]))[0], 0.0)


def entries_of(
    teacher: PartTeacher, piece: Rows, found: Tensor, lse: Tensor, vocab_size: int, spec: RowSpec, scale: float
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """The rows of `piece`: (divergence [R], student's log-sum-exp [R], stats, gradient by their z [R, K]).

    found [R, K]: the student's logits at the ids. lse [R]: its log-sum-exp at T, for tail "bucket" of the columns
    outside the K. stats are lse_s, lse_rest, outside, rest of sparse_part_grad; scale is distill_weight / T.
    """
    d = spec.divergence
    assert teacher.ids is not None and teacher.log_probs is not None
    ids = teacher.ids[piece]
    given = ids >= 0
    z = torch.where(given, found.double() / spec.temperature, NEG_INF)
    z = torch.where(ids < vocab_size, z, float("nan"))
    lp = torch.where(given, teacher.log_probs[piece].double(), NEG_INF)
    lse_rest, norm = lse, lse
    if spec.tail == "renormalize":
        norm = z.logsumexp(-1)
        norm = torch.where(norm == NEG_INF, 0.0, norm)  # a row without entries stays empty
    elif spec.tail == "bucket":
        norm = lse = torch.logaddexp(lse_rest, z.logsumexp(-1))
    lq = z - norm[:, None]
    if spec.tail == "bucket":
        assert teacher.log_rest is not None
        lp = torch.cat([lp, teacher.log_rest[piece].double()[:, None]], -1)
        lq = torch.cat([lq, (lse_rest - lse)[:, None]], -1)
        given = torch.cat([given, torch.ones_like(given[:, :1])], -1)
    term, slope = d.formula(lp, lq, *d.values)
    q = lq.exp()
    term = term + spec.centre * (q - lp.exp())
    if spec.tail == "sampled":
        assert teacher.weights is not None
        weights = teacher.weights[piece].double()
        term, slope = weights * term, weights * slope
    term, slope = torch.where(given, term, 0.0), torch.where(given, slope, 0.0)
    value, total = term.sum(-1), slope.sum(-1)
    value, factor = d.outer(value, total, *d.values) if d.outer else (value, torch.ones_like(value))
    weight = scale * factor
    entries = torch.where(given, weight[:, None] * (slope - q * total[:, None]), 0.0)
    rest = weight * slope[:, -1] if spec.tail == "bucket" else torch.zeros_like(value)
    outside = weight * total if spec.tail != "renormalize" else torch.zeros_like(value)
    return value, lse, [lse, lse_rest, outside, rest], entries[:, : ids.shape[1]]
