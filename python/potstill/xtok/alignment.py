"""Alignment: which tokens of two sides spell the same bytes."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

INVALID, SPECIAL, UNKNOWN, REPLACED, INTERRUPTED, NORMALISED = 1, 2, 4, 8, 16, 32
MISMATCHED, STUDENT_TRUNCATED, TEACHER_TRUNCATED, DROPPED = 1, 2, 4, 8


@dataclass(frozen=True, eq=False)
class Alignment:
    """Chunks of B rows: the smallest stretches of tokens that spell the same bytes on both sides.

    student_chunk: int32 [n], the chunk of each student token (numbered through the batch), -1 for none; rows one after
        another, row b at student_ptr[b]..student_ptr[b+1] (int64 [B+1]).  teacher_chunk, teacher_ptr: the same.
    spans: int32 [C, 2, 2], half-open token ranges, student then teacher, counted from the row's beginning; row b has
        chunks row_ptr[b]..row_ptr[b+1] (int64 [B+1]).
    flags: uint8 [C], a sum of INVALID = 1 (the bytes differ), SPECIAL = 2 (a pair of special tokens), UNKNOWN = 4
        (holds an unknown token), REPLACED = 8 (U+FFFD stands for the other side's invalid bytes), INTERRUPTED = 16
        (special tokens lie inside, which are in no chunk), NORMALISED = 32 (a tokenizer changed the text here).
    num_bytes: int32 [C], bytes of text.
    row_flags: uint8 [B], a sum of MISMATCHED = 1, STUDENT_TRUNCATED = 2, TEACHER_TRUNCATED = 4 (that side ends before
        the other's text), DROPPED = 8.  mismatches: int32 [B], places where the sides' bytes part.
    """

    student_chunk: Tensor
    teacher_chunk: Tensor
    student_ptr: Tensor
    teacher_ptr: Tensor
    spans: Tensor
    row_ptr: Tensor
    flags: Tensor
    num_bytes: Tensor
    row_flags: Tensor
    mismatches: Tensor

    def __len__(self) -> int:
        """Number of chunks."""
        return len(self.spans)

    @property
    def num_rows(self) -> int:
        return len(self.row_ptr) - 1

    @property
    def valid(self) -> Tensor:
        """bool [C]: text of equal bytes, without unknown tokens."""
        return (self.flags & (INVALID | SPECIAL | UNKNOWN)) == 0

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Alignment:
        """The same on another device."""
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)}
        return replace(self, **moved)

    def chunks(self, row: int) -> list[tuple[int, int, int, int]]:
        """Chunks (s0, s1, t0, t1) of a row, half open."""
        first, last = self.row_ptr[row : row + 2].tolist()
        return [(s0, s1, t0, t1) for (s0, s1), (t0, t1) in self.spans[first:last].tolist()]

    def token_ranges(self) -> tuple[Tensor, Tensor]:
        """Half-open token ranges of the chunks, (student [C, 2], teacher [C, 2]) int64, counted as in student_chunk."""
        rows = torch.arange(self.num_rows, device=self.spans.device)
        row = torch.repeat_interleave(rows, self.row_ptr[1:] - self.row_ptr[:-1])
        spans = self.spans.long()
        return spans[:, 0] + self.student_ptr[row, None], spans[:, 1] + self.teacher_ptr[row, None]

    def merged(self, keep: Tensor) -> Alignment:
        """Coarser chunks: one whose `keep` (bool [C]) is False is taken together with the one behind it, where both are
        valid, of one row, and nothing lies between. Flags are those of all parts."""
        if keep.shape != self.flags.shape or keep.dtype != torch.bool:
            raise ValueError(f"keep is {keep.dtype} {list(keep.shape)}; it must be bool [{len(self)}], one a chunk")
        joins = torch.zeros_like(keep)
        if len(keep) > 1:
            ranges = torch.stack(self.token_ranges(), 1)
            touch = (ranges[:-1, :, 1] == ranges[1:, :, 0]).all(1)
            touch[self.row_ptr[1:-1][(self.row_ptr[1:-1] > 0) & (self.row_ptr[1:-1] < len(keep))] - 1] = False
            joins[1:] = ~keep[:-1] & touch & self.valid[:-1] & self.valid[1:]
        group = (~joins).cumsum(0) - 1  # the new number of each chunk
        first = (~joins).nonzero()[:, 0]
        last = torch.cat([first[1:], first.new_full((len(first[:1]),), len(keep))]) - 1
        flags = torch.zeros(len(first), dtype=self.flags.dtype, device=self.flags.device)
        for bit in (1 << n for n in range(8)):
            flags |= torch.zeros_like(flags).scatter_reduce(0, group, self.flags & bit, "amax")
        return replace(
            self,
            student_chunk=_renumbered(self.student_chunk, group),
            teacher_chunk=_renumbered(self.teacher_chunk, group),
            spans=torch.stack([self.spans[first][:, :, 0], self.spans[last][:, :, 1]], -1),
            row_ptr=torch.cat([group, group.new_full((1,), len(first))])[self.row_ptr],
            flags=flags,
            num_bytes=torch.zeros_like(self.num_bytes[first]).index_add(0, group, self.num_bytes),
        )

    def groups(self, row: int) -> tuple[list[list[int]], list[list[int]]]:
        """Token positions of each chunk of a row, student then teacher: the form of TRL's GOLD trainer."""
        chunks = self.chunks(row)
        return [list(range(c[0], c[1])) for c in chunks], [list(range(c[2], c[3])) for c in chunks]

    def dense(self, student_length: int | None = None, teacher_length: int | None = None) -> tuple[Tensor, Tensor]:
        """(student [B, Ts], teacher [B, Tt]) int64: the chunk of each token, counted within its row, -1 for none.

        Lengths default to the longest row's. NeMo-RL's form of an alignment, with `adapters.nemo_rl_fields`.
        """
        return (
            self._padded(self.student_chunk, self.student_ptr, student_length),
            self._padded(self.teacher_chunk, self.teacher_ptr, teacher_length),
        )

    def _padded(self, chunk: Tensor, ptr: Tensor, length: int | None) -> Tensor:
        lengths = ptr[1:] - ptr[:-1]
        width = int(lengths.max()) if len(lengths) else 0
        if length is not None and length < width:
            raise ValueError(f"length={length} is shorter than the longest row, {width}")
        row = torch.repeat_interleave(torch.arange(len(lengths), device=ptr.device), lengths)
        column = torch.arange(len(chunk), device=ptr.device) - ptr[:-1][row]
        out = chunk.new_full((len(lengths), width if length is None else length), -1, dtype=torch.int64)
        out[row, column] = torch.where(chunk < 0, -1, chunk - self.row_ptr[:-1][row])
        return out

    def summary(self) -> dict[str, Any]:
        """Counts, for a log: rows, chunks, valid chunks, mismatches, truncated and dropped rows."""
        flags = self.row_flags
        return {
            "rows": self.num_rows,
            "chunks": len(self),
            "valid": int(self.valid.sum()),
            "mismatches": int(self.mismatches.sum()),
            "truncated": int(((flags & (STUDENT_TRUNCATED | TEACHER_TRUNCATED)) != 0).sum()),
            "dropped": int(((flags & DROPPED) != 0).sum()),
        }


def _renumbered(chunk: Tensor, group: Tensor) -> Tensor:
    if not len(group):
        return chunk
    return torch.where(chunk < 0, -1, group[chunk.clamp(min=0).long()]).to(chunk.dtype)
