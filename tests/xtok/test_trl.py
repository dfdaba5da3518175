"""Merged ULD and the hybrid beside the installed TRL's, in value and gradient, and where its rows are other ones."""

from types import SimpleNamespace

import potstill as ps
import pytest
import torch
from potstill.xtok import (
    Aligner,
    VocabBytes,
    adapters,
    gold_loss,
    merged_rows,
    next_token_log_probs,
    uld_loss,
)

pytest.importorskip("trl.experimental.gold", reason="held against TRL's own")
STUDENT, TEACHER = ["a", "aa", "ab", "b", "bb", "c", "bc"], ["a", "b", "c", "d", "ab", "bb", "cc"]
ROWS = [[0, 1, 4, 2, 6, 5, 5], [3, 6, 1, 0, 4]]  # the first token is a prompt
CUTS = [["a", "a", "ab", "b", "ab", "b", "cc", "c"], ["b", "b", "c", "a", "a", "a", "bb"]]


@pytest.fixture(scope="module")
def rows():
    """Alignment, ids of both sides, hidden states and head of the student, logits of the teacher; fp64."""
    sides = [VocabBytes.from_callback(7, lambda n, names=names: names[n].encode()) for names in (STUDENT, TEACHER)]
    teachers = [[TEACHER.index(token) for token in row] for row in CUTS]
    assert ["".join(STUDENT[n] for n in row) for row in ROWS] == ["".join(row) for row in CUTS]
    alignment = Aligner(*sides)(ROWS, teachers)
    assert max(s1 - s0 for n in range(2) for s0, s1, *_ in alignment.chunks(n)) > 1
    ids = [torch.tensor(sum(rows, [])) for rows in (ROWS, teachers)]
    g = torch.Generator().manual_seed(0)
    hidden, head, logits = (
        torch.randn(*s, dtype=torch.float64, generator=g) for s in ((len(ids[0]), 4), (7, 4), (len(ids[1]), 7))
    )
    return alignment, sides, ids, hidden, head, logits


def by_row(flat, ptr):
    """[n, ...] -> one zero-padded batch."""
    return torch.nn.utils.rnn.pad_sequence([flat[a:b] for a, b in zip(ptr, ptr[1:], strict=False)], batch_first=True)


def trl_loss(rows, hidden, merge, *, hybrid=False, beta=0.0, shifted=False):
    from tokenizers import Tokenizer, models
    from trl.experimental.gold.gold_trainer import ULDLoss

    alignment, _, ids, _, head, teacher = rows
    ptrs = alignment.student_ptr, alignment.teacher_ptr
    config = SimpleNamespace(
        uld_crossentropy_weight=0.0, uld_distillation_weight=1.0, uld_student_temperature=1.0,
        uld_teacher_temperature=1.0, uld_skip_student_eos=False, uld_skip_teacher_eos=False, use_extended_uld=True,
        uld_token_merge_strategy=merge, uld_use_hybrid_loss=hybrid, uld_hybrid_matched_weight=0.7,
        uld_hybrid_unmatched_weight=0.3, beta=beta,
    )  # fmt: skip
    named = [
        Tokenizer(models.BPE(vocab={name: n for n, name in enumerate(side)}, merges=[])) for side in (STUDENT, TEACHER)
    ]
    labels, logits = [], []
    for own, ptr, z in zip(ids, ptrs, (hidden @ head.T, teacher), strict=True):
        batch = by_row(own + 1, ptr) - 1
        batch[:, 0] = -1
        labels.append(torch.where(batch < 0, -100, batch))
        padded = by_row(z, ptr)
        logits.append(torch.cat([padded[:, :1], padded[:, :-1]], 1) if shifted else padded)
    offsets = [torch.nn.utils.rnn.pad_sequence(side, batch_first=True) for side in adapters.trl_byte_offsets(alignment)]
    inputs = [by_row(own, ptr) for own, ptr in zip(ids, ptrs, strict=True)]
    return ULDLoss(config, *named)(*logits, *labels, *inputs, *offsets)


def our_loss(rows, hidden, merge, *, hybrid=False, divergence="forward_kl"):
    """The mean over rows of the mean over chunks, as TRL takes it."""
    alignment, sides, ids, _, weight, logits = rows
    head, table = ps.Head(weight), logits.log_softmax(-1)
    teacher_tokens = torch.cat([table.new_zeros(1), table[:-1].gather(1, ids[1][1:, None])[:, 0]])
    teacher_tokens[alignment.teacher_ptr[:-1]] = 0.0
    tokens = next_token_log_probs(hidden, head, ids[0], alignment.student_ptr)
    pairs = merged_rows(alignment, tokens, teacher_tokens, merge)
    if hybrid:
        each = gold_loss(
            hidden, head, ids[0], ps.topk(logits, 7), alignment, sides[0].matched(sides[1]), divergence=divergence,
            with_rest=False, matched_weight=0.7, unmatched_weight=0.3, merge=merge, teacher_log_probs=teacher_tokens,
            reduction="none",
        )  # fmt: skip
    else:
        scales = (pairs.student_scale, pairs.teacher_scale)
        each = uld_loss(hidden[pairs.student], head, ps.topk(logits[pairs.teacher], 7), scales=scales, reduction="none")
    second = pairs.chunks >= alignment.row_ptr[1]
    return (each[~second].mean() + each[second].mean()) / 2


def agree(rows, ours, theirs):
    hidden = rows[3].clone().requires_grad_()
    values = [loss(rows, hidden) for loss in (ours, theirs)]
    torch.testing.assert_close(*values, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(*(torch.autograd.grad(v, hidden)[0] for v in values), rtol=1e-6, atol=1e-9)


def test_uld_with_merged_groups_is_trls(rows):
    agree(rows, lambda r, h: our_loss(r, h, "bayesian"), lambda r, h: trl_loss(r, h, "bayesian"))


@pytest.mark.parametrize(
    "beta, divergence",
    [(0.0, "forward_kl"), (1.0, "reverse_kl"), (0.3, ps.divergences.jsd(teacher_weight=0.3))],
    ids=["0", "1", "0.3"],
)
def test_the_hybrid_is_trls(rows, beta, divergence):
    agree(
        rows,
        lambda r, h: our_loss(r, h, "bayesian", hybrid=True, divergence=divergence),
        lambda r, h: trl_loss(r, h, "bayesian", hybrid=True, beta=beta),
    )


@pytest.mark.parametrize("hybrid", [False, True])
def test_trls_observed_rows_are_one_late(rows, hybrid):
    """TRL's "observed" reads each token's own row, which predicts the next; on rows moved by one it is ours."""
    agree(
        rows,
        lambda r, h: our_loss(r, h, "observed", hybrid=hybrid),
        lambda r, h: trl_loss(r, h, "observed", hybrid=hybrid, shifted=True),
    )
    as_it_is = trl_loss(rows, rows[3], "observed", hybrid=hybrid)
    assert abs(as_it_is / our_loss(rows, rows[3], "observed", hybrid=hybrid) - 1) > 0.05


def test_trl_finds_our_chunks(alignment):
    """TRL's walk over the byte offsets that the adapter gives closes a group at every one of our chunks."""
    from trl.experimental.gold.gold_trainer import ULDLoss

    student, teacher = adapters.trl_byte_offsets(alignment)
    for row in range(2):
        groups = ULDLoss._align_by_byte_offsets(student[row].tolist(), teacher[row].tolist())
        ours = alignment.groups(row)
        closed = [[group[-1] for group in side[: len(ours[0])]] for side in groups]  # what is left over is a group too
        assert closed == [[group[-1] for group in side] for side in ours]
        assert (student[row][:, 1].diff() > 0).all() and (student[row][1:, 0] == student[row][:-1, 1]).all()
