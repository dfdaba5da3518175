"""An alignment in the shapes that other trainers take; nothing of potstill needs them.

`Alignment.groups` is the list form of TRL's GOLD trainer; `Alignment.dense` the padded form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.xtok.alignment import Alignment


def trl_byte_offsets(alignment: Alignment) -> tuple[list[Tensor], list[Tensor]]:
    """(start, end) int64 [T, 2] of every token, a tensor for each row and side: byte offsets for TRL's GOLD trainer.

    Its walk over them closes a group where both sides end at the same number, so with these it finds the chunks of the
    alignment. Ends grow through a chunk by steps that only its last tokens share; tokens in no chunk end a group on
    neither side, and lie in the one behind them.
    """
    sides = []
    longest = 2 * int(max(_longest(alignment.student_ptr), _longest(alignment.teacher_ptr))) + 4
    for chunk, ptr, odd in (
        (alignment.student_chunk, alignment.student_ptr, 0),
        (alignment.teacher_chunk, alignment.teacher_ptr, 1),
    ):
        rows = []
        for row in range(alignment.num_rows):
            own = chunk[int(ptr[row]) : int(ptr[row + 1])].long()
            first, last = alignment.row_ptr[row : row + 2].tolist()
            # the chunk a token lies in, or that comes behind it
            number = torch.where(own < 0, last, own).flip(0).cummin(0).values.flip(0) - first
            ends = number * longest + 2 * _place_within(number) + odd
            closing = torch.zeros_like(own, dtype=torch.bool)
            closing[alignment.spans[first:last, odd, 1].long() - 1] = True
            ends = torch.where(closing & (own >= 0), (number + 1) * longest - 1, ends)
            rows.append(torch.stack([torch.cat([ends.new_zeros(1), ends[:-1]])[: len(ends)], ends], -1))
        sides.append(rows)
    return sides[0], sides[1]


def _longest(ptr: Tensor) -> Tensor:
    lengths = ptr[1:] - ptr[:-1]
    return lengths.max() if len(lengths) else ptr.new_zeros(())


def _place_within(number: Tensor) -> Tensor:
    """How many tokens of the same number come before each."""
    at = torch.arange(len(number), device=number.device)
    new = torch.ones_like(number, dtype=torch.bool)
    new[1:] = number[1:] != number[:-1]
    return at - torch.where(new, at, 0).cummax(0).values


def matrices(alignment: Alignment) -> tuple[Tensor, Tensor]:
    """(student [B, Ts, C], teacher [B, Tt, C]) bool, C those of the longest row: token t belongs to chunk c of its row.

    tokenkit's alignment matrices a and b. Their size is what the maps of an Alignment avoid.
    """
    most = int(_longest(alignment.row_ptr))
    student, teacher = (side[..., None] == torch.arange(most, device=side.device) for side in alignment.dense())
    return student, teacher


def nemo_rl_fields(alignment: Alignment) -> dict[str, Tensor]:
    """The fields of NeMo-RL's AlignmentBatch, padded to the longest row: student_chunk_id [B, Ts], teacher_chunk_id
    [B, Tt] int64 (-1 for none), num_chunks [B], pair_valid and pair_is_correct [B, C] bool, and the two exact partition
    masks [B, T], true for tokens that are a valid chunk on their own on both sides."""
    student, teacher = alignment.dense()
    counts = alignment.row_ptr[1:] - alignment.row_ptr[:-1]
    most = max(int(_longest(alignment.row_ptr)), 1)
    inside = torch.arange(most, device=counts.device) < counts[:, None]
    correct = torch.zeros_like(inside)
    correct[inside] = alignment.valid
    lengths = alignment.spans[:, :, 1] - alignment.spans[:, :, 0]
    alone = torch.zeros_like(inside)
    alone[inside] = alignment.valid & (lengths == 1).all(1)
    masks = [(side >= 0) & alone.gather(1, side.clamp(min=0)) for side in (student, teacher)]
    return {
        "pair_valid": inside,
        "pair_is_correct": correct,
        "student_exact_partition_mask": masks[0],
        "teacher_exact_partition_mask": masks[1],
        "student_chunk_id": student,
        "teacher_chunk_id": teacher,
        "num_chunks": counts,
    }
