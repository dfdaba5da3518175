"""Aligner: token ids of two tokenizers to chunks of equal bytes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill import _rust
from potstill.xtok.alignment import Alignment
from potstill.xtok.vocab import VocabBytes

Rows = Any  # ids of one row, a list of rows, or a tensor or array [T] or [B, T]
Spans = Sequence[Sequence[tuple[int, int]]]


class Aligner:
    """`aligner(student_ids, teacher_ids)` -> Alignment.

    student, teacher: VocabBytes, or anything `VocabBytes.from_tokenizer` takes.
    pairs: special tokens (student id, teacher id) that belong together, such as turn ends. Those of the same role (bos,
        eos, ...) and those of the same name pair by themselves, where they stand at the same place of the text; all
        other special tokens, and padding, are in no chunk.
    granularity: where chunks may end: "byte" (wherever both sides end a token), "char" (not inside a character), "word"
        (only before whitespace that follows a word), or a number: not before that many bytes.
    on_mismatch: where the sides' bytes part: "resync" (one invalid chunk until they agree again, counted), "error"
        (ValueError), "drop" (the row has no chunks).
    threads: default one for each processor; small batches use one.

    A space that a tokenizer puts before a text is dropped where the other side has none. Tokenizers that change text
    (NFKC, lower case, WordPiece) are aligned on the original, which the other side's bytes give; where both change it,
    each in its own way, `text=` is needed.
    """

    def __init__(
        self, student: Any, teacher: Any, *, pairs: Iterable[tuple[int, int]] = (), granularity: str | int = "byte",
        on_mismatch: str = "resync", threads: int | None = None,
    ):  # fmt: skip
        self.student = VocabBytes.from_tokenizer(student)
        self.teacher = VocabBytes.from_tokenizer(teacher)
        if isinstance(granularity, int) and (granularity < 1 or isinstance(granularity, bool)):
            raise ValueError(f"granularity={granularity} must be at least 1 byte")
        self.threads = threads or os.cpu_count() or 1
        name, min_bytes = ("min_bytes", granularity) if isinstance(granularity, int) else (granularity, 0)
        self._arguments = (list(pairs), name, min_bytes, on_mismatch)
        self._native = _rust.Aligner(self.student._native, self.teacher._native, *self._arguments)

    def __call__(
        self, student_ids: Rows, teacher_ids: Rows, *, student_mask: Any = None, teacher_mask: Any = None,
        student_ptr: Any = None, teacher_ptr: Any = None, student_spans: Spans | None = None,
        teacher_spans: Spans | None = None,
        text: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
    ) -> Alignment:  # fmt: skip
        """Aligns one row or B of them.

        student_ids, teacher_ids: a row of ids, a list of B rows, or a tensor or array [T] or [B, T]; with a mask of the
            same shape, padding (0) before and behind a row's ids is left out.
        student_ptr, teacher_ptr: int64 [B+1], where each of B rows begins in flat ids [n], and n; nothing is copied.
        student_spans, teacher_spans: for each row the stretches (start, end) of its tokens that hold the same messages;
            the n-th of both sides are aligned with each other, chunks never cross them, tokens outside have none.
        text: the original text of each row, or with spans that of each message of each row; needed where both
            tokenizers change text.

        Raises ValueError: an id outside its vocabulary, rows that do not fit together, a mismatch under "error".
        """
        student, s_ptr, s_range = _flat(student_ids, student_mask, student_ptr, "student")
        teacher, t_ptr, t_range = _flat(teacher_ids, teacher_mask, teacher_ptr, "teacher")
        if len(s_ptr) != len(t_ptr):
            raise ValueError(f"{len(s_ptr) - 1} student rows were given, but {len(t_ptr) - 1} teacher rows")
        if (student_spans is None) != (teacher_spans is None):
            raise ValueError("student_spans and teacher_spans go together: the same messages on both sides")
        if student_spans is None or teacher_spans is None:
            segments = np.stack([*s_range, *t_range], axis=1)
            segment_ptr = np.arange(len(s_ptr), dtype=np.int64)
        else:
            segments, segment_ptr = _segments(student_spans, teacher_spans, s_range, t_range)
        texts = None if text is None else _texts(text, np.diff(segment_ptr), student_spans is not None)
        student_chunk, teacher_chunk = _maps(int(s_ptr[-1]), int(t_ptr[-1]))
        found = self._native.align(
            student, s_ptr, teacher, t_ptr, np.ascontiguousarray(segments, np.int64).reshape(-1), segment_ptr, texts,
            student_chunk, teacher_chunk, self.threads,
        )  # fmt: skip
        return _alignment(student_chunk, teacher_chunk, s_ptr, t_ptr, found)

    def stream(self) -> Stream:
        """A row that grows, token by token."""
        return Stream(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.student, self.teacher, self.threads, self._arguments)


def _rebuild(student: VocabBytes, teacher: VocabBytes, threads: int, arguments: tuple[Any, ...]) -> Aligner:
    pairs, granularity, min_bytes, on_mismatch = arguments
    return Aligner(student, teacher, pairs=pairs, granularity=min_bytes or granularity, on_mismatch=on_mismatch,
                   threads=threads)  # fmt: skip


class Stream:
    """One row whose ids arrive in pieces: `push` as they come, `finish` at the end.

    Chunks come out as soon as no later token can change them; all of them together are those of the whole row.
    """

    def __init__(self, aligner: Aligner):
        self._push = aligner._native.push()
        self._all = (np.zeros(0, np.int32), np.zeros(0, np.uint8), np.zeros(0, np.int32))

    def push(self, student_ids: Sequence[int] = (), teacher_ids: Sequence[int] = ()) -> Tensor:
        """Takes more ids; spans int32 [C, 2, 2] of the new chunks."""
        return self._take(student_ids, teacher_ids, False)

    def finish(self, student_ids: Sequence[int] = (), teacher_ids: Sequence[int] = ()) -> Alignment:
        """Takes the last ids; the Alignment of the whole row."""
        self._take(student_ids, teacher_ids, True)
        spans, flags, num_bytes = self._all
        (student, teacher), mismatches, truncated = self._push.state()
        row_flags = np.array([(mismatches > 0) + 2 * truncated[0] + 4 * truncated[1]], np.uint8)
        s_ptr, t_ptr = (np.array([0, len(side)], np.int64) for side in (student, teacher))
        found = (
            spans,
            flags,
            num_bytes,
            np.array([0, len(flags)], np.int64),
            row_flags,
            np.array([mismatches], np.int32),
        )
        return _alignment(student, teacher, s_ptr, t_ptr, found)

    def _take(self, student_ids: Sequence[int], teacher_ids: Sequence[int], ended: bool) -> Tensor:
        new = self._push.push(np.asarray(student_ids, np.int32), np.asarray(teacher_ids, np.int32), ended)
        spans, flags, num_bytes = self._all
        self._all = (
            np.concatenate([spans, new[0]]), np.concatenate([flags, new[1]]), np.concatenate([num_bytes, new[2]])
        )  # fmt: skip
        return torch.from_numpy(new[0]).reshape(-1, 2, 2)


Ranges = tuple[NDArray[np.int64], NDArray[np.int64]]


Ids = NDArray[np.int32] | list[NDArray[np.int32]]


def _flat(ids: Rows, mask: Any, ptr: Any, side: str) -> tuple[Ids, NDArray[np.int64], Ranges]:
    """Flat ids, or arrays of rows, row pointers [B+1], and the range of each row that is no padding."""
    flat: Ids
    array = ids.detach().cpu().numpy() if isinstance(ids, Tensor) else ids if isinstance(ids, np.ndarray) else None
    if array is not None and (array.ndim > 2 or array.dtype.kind not in "iu"):
        raise ValueError(
            f"{side}_ids have shape {list(array.shape)} of {array.dtype}; they must be integers [T] or [B, T]"
        )
    if array is None:
        flat, pointers = _of_lists(ids, side)
    else:
        flat = np.ascontiguousarray(array.reshape(-1))
        if array.dtype != np.int32:
            flat = _rust.flat_ids([flat.astype(np.int64, copy=False)], side)[0]
        width = array.shape[-1]
        pointers = np.arange(len(array) + 1, dtype=np.int64) * width if array.ndim == 2 else np.array([0, width])
    if ptr is not None:
        pointers = _pointers(ptr, pointers, side)
        flat = flat[0] if isinstance(flat, list) else flat
    lengths = np.diff(pointers)
    if mask is None:
        return flat, pointers, (np.zeros_like(lengths), lengths)
    if array is None or ptr is not None:
        raise ValueError(f"{side}_mask goes with ids [B, T]; rows in a list, and rows by {side}_ptr, have no padding")
    return flat, pointers, _kept(np.atleast_2d(array).shape, mask, side)


def _of_lists(ids: Any, side: str) -> tuple[Ids, NDArray[np.int64]]:
    """A row of ids, or a list of rows; arrays of int32 stay where they are."""
    several = len(ids) > 0 and not isinstance(ids[0], (int, np.integer))
    rows: list[Any] = list(ids) if several else [ids if isinstance(ids, list) else list(ids)]
    if all(type(row) is np.ndarray and row.dtype == np.int32 and row.ndim == 1 and row.flags.c_contiguous
           for row in rows):  # fmt: skip
        return rows, np.cumsum([0, *map(len, rows)], dtype=np.int64)
    for number, row in enumerate(rows):
        if isinstance(row, Tensor):
            rows[number] = row = row.detach().cpu().numpy()
        elif not isinstance(row, (list, np.ndarray)):
            rows[number] = row = list(row)
        if isinstance(row, np.ndarray):
            if row.ndim != 1 or (len(row) and row.dtype.kind not in "iu"):
                raise ValueError(f"row {number}: {side} ids have shape {list(row.shape)} of {row.dtype}; they must be "
                                 "integers [T]")  # fmt: skip
            rows[number] = row.astype(_width(row), copy=False)
    return _rust.flat_ids(rows, side)


def _width(array: NDArray[Any]) -> type:
    return np.int32 if array.dtype.kind != "u" and array.dtype.itemsize <= 4 else np.int64


def _pointers(ptr: Any, given: NDArray[np.int64], side: str) -> NDArray[np.int64]:
    """ptr [B+1] of flat ids, of which there is one row."""
    found = np.ascontiguousarray(ptr.detach().cpu().numpy() if isinstance(ptr, Tensor) else ptr, np.int64)
    if len(given) != 2 or found.ndim != 1 or not len(found) or found[0] != 0 or found[-1] != given[-1]:
        raise ValueError(
            f"{side}_ptr is {list(found.shape)} with ends {found.ravel()[[0, -1]].tolist() if found.size else []}; it "
            f"goes with flat ids [n], here {int(given[-1])} in {len(given) - 1} rows, and runs from 0 to n"
        )
    if (np.diff(found) < 0).any():
        raise ValueError(f"{side}_ptr falls at row {int((np.diff(found) < 0).argmax())}; it must not")
    return found


def _kept(shape: tuple[int, ...], mask: Any, side: str) -> Ranges:
    """The range of each row of [B, T] that is no padding."""
    kept = np.atleast_2d(mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)) != 0
    if kept.shape != shape:
        raise ValueError(f"{side}_mask has shape {list(kept.shape)}, {side}_ids {list(shape)}; they must agree")
    any_kept = kept.any(axis=1)
    begin = np.where(any_kept, kept.argmax(axis=1), 0)
    end = np.where(any_kept, kept.shape[1] - kept[:, ::-1].argmax(axis=1), 0)
    if (kept.sum(axis=1) != end - begin).any():
        row = int((kept.sum(axis=1) != end - begin).argmax())
        raise ValueError(f"{side}_mask of row {row} has holes; it may leave out padding before and behind a row only")
    return begin.astype(np.int64), end.astype(np.int64)


def _maps(students: int, teachers: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    if not students or not teachers:
        return np.empty(students, np.int32), np.empty(teachers, np.int32)
    both = np.empty(students + teachers, np.int32)  # numpy asks for large pages for arrays of 4 MiB
    return both[:students], both[students:]


def _segments(
    student: Spans, teacher: Spans, s_range: Ranges, t_range: Ranges
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    rows = len(s_range[0])
    if len(student) != rows or len(teacher) != rows:
        raise ValueError(f"spans of {len(student)} student and {len(teacher)} teacher rows were given for {rows} rows")
    out, ptr = [], [0]
    for row, (s_spans, t_spans) in enumerate(zip(student, teacher, strict=True)):
        if len(s_spans) != len(t_spans):
            raise ValueError(f"row {row} has {len(s_spans)} student spans, but {len(t_spans)} teacher spans")
        last = [int(s_range[0][row]), int(t_range[0][row])]
        for spans in zip(s_spans, t_spans, strict=True):
            for side, (start, end), limit in zip((0, 1), spans, (s_range[1][row], t_range[1][row]), strict=True):
                if not last[side] <= start <= end <= limit:
                    raise ValueError(
                        f"row {row}: span ({start}, {end}) must lie in {last[side]}..{limit}: in order and apart"
                    )
                last[side] = end
            out.append([*spans[0], *spans[1]])
        ptr.append(len(out))
    return np.array(out, np.int64).reshape(-1, 4), np.array(ptr, np.int64)


def _texts(text: Any, segments: NDArray[np.int64], by_message: bool) -> list[str]:
    """The original text of every segment; `segments` of each row."""
    rows = [text] if isinstance(text, str) else list(text)
    if len(rows) != len(segments):
        raise ValueError(f"{len(rows)} texts were given for {len(segments)} rows")
    if not by_message:
        rows = [[row] for row in rows]
    for number, (row, count) in enumerate(zip(rows, segments.tolist(), strict=True)):
        if isinstance(row, str) or len(row) != count or not all(isinstance(part, str) for part in row):
            raise ValueError(
                f"row {number}: text must be {f'a list of {count} strings, one a span' if by_message else 'a string'}"
            )
    return [part for row in rows for part in row]


def _alignment(
    student_chunk: NDArray[Any], teacher_chunk: NDArray[Any], s_ptr: NDArray[Any], t_ptr: NDArray[Any], found: Any
) -> Alignment:
    spans, flags, num_bytes, row_ptr, row_flags, mismatches = map(torch.from_numpy, found)
    student, teacher, s_rows, t_rows = map(torch.from_numpy, (student_chunk, teacher_chunk, s_ptr, t_ptr))
    return Alignment(
        student, teacher, s_rows, t_rows, spans.reshape(-1, 2, 2), row_ptr, flags, num_bytes, row_flags, mismatches
    )
