"""Which rows of two models belong together, and what makes one prediction of a chunk of several tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from potstill.xtok.alignment import Alignment
from potstill.xtok.chunks import predicted_chunks

MERGES = ("observed", "bayesian")


class RowPairs(NamedTuple):
    """student, teacher [M] int64: flat rows, as student_chunk counts tokens; chunks [M] int64.  student_scale,
    teacher_scale [M]: what is added to a row's log-probabilities to make it the prediction of the whole chunk, or None.
    """

    student: Tensor
    teacher: Tensor
    chunks: Tensor
    student_scale: Tensor | None = None
    teacher_scale: Tensor | None = None


def first_rows(alignment: Alignment, *, last: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that predict the first token (or the last one) of each valid chunk: (student rows [M], teacher rows [M],
    chunks [M]), int64.

    Rows count flat, as in student_chunk; the row of a token is the one before it. Chunks at a row's beginning, which
    nothing predicts, are left out.
    """
    chunks = (alignment.valid & predicted_chunks(alignment)).nonzero()[:, 0]
    student, teacher = (side[chunks] for side in alignment.token_ranges())
    at = (lambda side: side[:, 1] - 2) if last else (lambda side: side[:, 0] - 1)
    return at(student), at(teacher), chunks


def merged_rows(
    alignment: Alignment, student_log_probs: Tensor, teacher_log_probs: Tensor, merge: str = "observed"
) -> RowPairs:
    """One row pair for each valid chunk, with what makes it the prediction of all its tokens, on either side.

    student_log_probs [n], teacher_log_probs [m]: of every token given those before it.
    merge: "observed", the row of the chunk's first token times the probability of the tokens behind it; "bayesian", the
    row of its last token times that of the tokens before it. One sum over tokens, so linear in them.
    """
    if merge not in MERGES:
        raise ValueError(f"merge={merge!r} is none of {MERGES}")
    s_rows, t_rows, chunks = first_rows(alignment, last=merge == "bayesian")
    scales = [
        _others(log_probs.reshape(-1), chunk, rows + 1, len(alignment))[chunks]
        for log_probs, chunk, rows in (
            (student_log_probs, alignment.student_chunk, s_rows),
            (teacher_log_probs.detach(), alignment.teacher_chunk, t_rows),
        )
    ]
    return RowPairs(s_rows, t_rows, chunks, *scales)


def _others(log_probs: Tensor, chunk: Tensor, kept: Tensor, count: int) -> Tensor:
    """Log-probability of each chunk's tokens but the one at `kept`, [C]."""
    others = log_probs.index_fill(0, kept, 0.0)
    slot = torch.where(chunk < 0, count, chunk).long()
    return others.new_zeros(count + 1).index_add(0, slot, others)[:count]
