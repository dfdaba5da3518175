"""Sums over chunks by every backend, chunks taken together, and alignments in other trainers' shapes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from potstill.dispatch import Facts, explain
from potstill.xtok import Aligner, VocabBytes, adapters, chunk_log_probs, merged_at_words
from potstill.xtok.alignment import INTERRUPTED, INVALID


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_sums_and_their_gradient(alignment, side, backend, dtype):
    chunk = alignment.student_chunk if side == "student" else alignment.teacher_chunk
    values = torch.randn(len(chunk), dtype=dtype, generator=torch.Generator().manual_seed(0)) - 0.5
    values[0] = 0.0
    values.requires_grad_()
    got = chunk_log_probs(values, alignment, side, backend=backend)
    negative = torch.where(values > 0, 0.0, values)  # clamp has no gradient at its bound from torch 2.15 on
    want = torch.stack([negative[chunk == c].sum() for c in range(len(alignment))])
    torch.testing.assert_close(got, want)
    up = torch.arange(1.0, len(want) + 1, dtype=dtype)
    for g, w in zip(torch.autograd.grad(got, values, up), torch.autograd.grad(want, values, up), strict=True):
        torch.testing.assert_close(g, w)
    if dtype == torch.float64:
        below = (-torch.rand(len(chunk), dtype=dtype) - 0.1).requires_grad_()
        torch.autograd.gradcheck(lambda x: chunk_log_probs(x, alignment, side, backend=backend), below)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_the_op_keeps_its_contract(alignment, backend):
    values = (-torch.rand(len(alignment.student_chunk))).requires_grad_()
    ranges = alignment.token_ranges()[0]
    arguments = values, alignment.student_chunk, ranges[:, 0].contiguous(), ranges[:, 1].contiguous(), backend
    torch.library.opcheck(torch.ops.potstill.chunk_sums, arguments)
    (grad,) = torch.autograd.grad(chunk_log_probs(values, alignment, backend=backend).sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_chunk_numbers_of_another_integer_type_are_the_same_chunks(alignment, backend):
    values = (-torch.rand(len(alignment.student_chunk))).requires_grad_()
    same = replace(alignment, student_chunk=alignment.student_chunk.long())
    got, want = (chunk_log_probs(values, a, backend=backend) for a in (same, alignment))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), values) for x in (got, want)))


def test_no_chunks_and_the_wrong_number_of_tokens(alignment):
    vocab = VocabBytes.from_callback(2, [b"a", b"b"].__getitem__)
    none = Aligner(vocab, vocab)([0, 0], [1])
    keep = none.merged(torch.zeros(len(none), dtype=torch.bool))
    assert len(keep) == len(none)
    empty = Aligner(vocab, vocab, on_mismatch="drop")([0, 0], [1])
    values = torch.zeros(2, requires_grad=True)
    for backend in ("torch", "cpp"):
        sums = chunk_log_probs(values, empty, backend=backend)
        assert sums.shape == (0,) and (torch.autograd.grad(sums.sum(), values)[0] == 0).all()
    assert len(empty.merged(torch.zeros(0, dtype=torch.bool))) == 0
    with pytest.raises(ValueError, match="student_log_probs has 3 values, the alignment 12 student tokens"):
        chunk_log_probs(torch.zeros(3), alignment)
    with pytest.raises(ValueError, match=r"it must be bool \[10\], one a chunk"):
        alignment.merged(torch.zeros(3, dtype=torch.bool))


def test_backends_of_sums():
    found = dict(explain(Facts("chunk_sums", torch.device("cpu"), torch.float32)))
    assert found["cpp"] is None and found["torch"] is None and "CUDA" in found["triton"]


def test_merged_chunks(alignment):
    """Only valid neighbours of one row are taken together; the maps, flags and bytes follow."""
    same = alignment.merged(torch.ones(len(alignment), dtype=torch.bool))
    for name in ("student_chunk", "teacher_chunk", "spans", "row_ptr", "flags", "num_bytes"):
        assert torch.equal(getattr(same, name), getattr(alignment, name)), name
    all_of_it = alignment.merged(torch.zeros(len(alignment), dtype=torch.bool))
    assert all_of_it.chunks(0) == [(0, 6, 0, 7), (6, 7, 7, 8), (7, 9, 8, 11)]
    # a special token between two chunks keeps them apart
    assert all_of_it.chunks(1) == [(0, 1, 0, 1), (1, 3, 2, 4)]
    assert all_of_it.flags.tolist() == [INTERRUPTED, INVALID, 0, 0, 0]
    assert all_of_it.num_bytes.sum() == alignment.num_bytes.sum()
    assert all_of_it.row_ptr.tolist() == [0, 3, 5]
    values = -torch.rand(len(alignment.student_chunk))
    torch.testing.assert_close(chunk_log_probs(values, all_of_it).sum(), chunk_log_probs(values, alignment).sum())
    student, teacher = torch.full((12,), -3.0), torch.full((16,), -0.1)
    student[3] = -0.2  # a word likely ends behind "de"
    merged = merged_at_words(alignment, (student, teacher), 0.5)
    assert merged.chunks(0) == [(0, 4, 0, 4), (4, 6, 4, 7), (6, 7, 7, 8), (7, 9, 8, 11)]
    with pytest.raises(ValueError, match="threshold=2"):
        merged_at_words(alignment, (student, teacher), 2)


def test_ids_that_begin_a_word():
    tokens = [b" a", b"a", b"\n", b"", "\u00e9".encode(), b"\tx" * 9, b"</s>", b" s"]
    vocab = VocabBytes.from_callback(8, tokens.__getitem__, specials=[6, 7], unknown=None)
    assert vocab.word_starts().tolist() == [True, False, True, False, False, True, True, True]
    assert vocab.word_starts(specials=False).tolist() == [True, False, True, False, False, True, False, False]
    assert vocab.word_starts().dtype == np.bool_


def test_matrices_and_nemo_rl_fields(alignment):
    student, teacher = adapters.matrices(alignment)
    assert student.shape == (2, 9, 7) and teacher.shape == (2, 11, 7)
    for side, chunk, ptr in (
        (student, alignment.student_chunk, alignment.student_ptr),
        (teacher, alignment.teacher_chunk, alignment.teacher_ptr),
    ):
        for row in range(2):
            own = chunk[ptr[row] : ptr[row + 1]]
            assert (
                side[row, : len(own)].sum(1).tolist() == (own >= 0).int().tolist() and not side[row, len(own) :].any()
            )
            assert (side[row, : len(own)].int().argmax(1)[own >= 0] + alignment.row_ptr[row] == own[own >= 0]).all()
    fields = adapters.nemo_rl_fields(alignment)
    assert torch.equal(fields["student_chunk_id"], alignment.dense()[0]) and fields["num_chunks"].tolist() == [7, 3]
    assert fields["pair_valid"].sum(1).tolist() == [7, 3]
    assert fields["pair_is_correct"][0].tolist() == [True, True, True, True, False, True, True]
    assert fields["student_exact_partition_mask"][0].nonzero()[:, 0].tolist() == [5, 7]
    assert fields["teacher_exact_partition_mask"][0].nonzero()[:, 0].tolist() == [6, 8]
    assert fields["teacher_exact_partition_mask"][1].nonzero()[:, 0].tolist() == [0, 2, 3]
