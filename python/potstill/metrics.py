"""Per-row measurements beside a loss, at T = 1 whatever the loss's temperature, on the device, without a gradient.

    kl, reverse_kl     KL(p || q), KL(q || p) in nats
    student_entropy    -sum q log q over the vocabulary; teacher_entropy likewise
    acceptance         sum min(p, q): how often speculative decoding would accept the student's draft token
    agreement          1 where both sides' most probable entry is the same, else 0
    teacher_mass, student_mass   each side's mass on the K entries of a TopK
Over a TopK with log_rest, kl, reverse_kl, teacher_entropy and acceptance take the rest as one entry: bounds of the true
ones (the first three from below, acceptance from above), exact when the rest is 0.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from potstill import dispatch
from potstill.divergences import TABLE
from potstill.rows import RowSpec
from potstill.targets import Target

FORMULAS = {
    "kl": "forward_kl", "reverse_kl": "reverse_kl", "student_entropy": "student_entropy",
    "teacher_entropy": "teacher_entropy", "acceptance": "acceptance", "teacher_mass": "teacher_mass",
    "student_mass": "student_mass",
}  # fmt: skip
NAMES = (*FORMULAS, "agreement")
SPARSE_ONLY = ("teacher_mass", "student_mass")


def rows(
    name: str, target: Target, piece: Tensor | slice, student: Tensor, teacher: Tensor | None, coef: Tensor,
    facts: dispatch.Facts,
) -> Tensor:  # fmt: skip
    """One metric of a chunk's rows, 0 where coef is 0: student [R, V] and (dense) teacher [R, V'] raw logits -> [R]."""
    live = (coef != 0).to(coef.dtype)
    if name == "agreement":
        return torch.where(coef != 0, _agreement(target, piece, student, teacher), 0.0)
    formula = TABLE[FORMULAS[name]]
    if name == "student_entropy" or teacher is not None:
        run = dispatch.select(replace(facts, op="dense_rows", divergence=formula.name)).run
        if name == "student_entropy":
            spec = RowSpec(formula, target.student, target.student)
            return run(student, student, live, None, spec, None)[0]
        return run(student, teacher, live, None, RowSpec(formula, target.student, target.teacher_side), None)[0]
    ids, log_probs, log_rest = target.entries_at_one(piece)
    tail = "drop" if log_rest is None or name in SPARSE_ONLY else "bucket"
    run = dispatch.select(replace(facts, op="sparse_rows", divergence=formula.name)).run
    rest = log_rest if tail == "bucket" else None
    return run(student, ids, log_probs, rest, live, None, RowSpec(formula, target.student, None, tail), None)[0]


def _best(x: Tensor, vocab_size: int, scale: float) -> Tensor:
    z = x[:, :vocab_size]
    return z.argmax(-1) if scale > 0 else z.argmin(-1)  # a softcap keeps the order


def _agreement(target: Target, piece: Tensor | slice, student: Tensor, teacher: Tensor | None) -> Tensor:
    best = _best(student, target.student.vocab_size, target.student.scale)
    if teacher is not None:
        side = target.teacher_side
        return (best == _best(teacher, side.vocab_size, side.scale)).to(target.wide)
    ids, log_probs, _ = target.entries_at_one(piece)
    if not ids.shape[1]:
        return torch.zeros_like(best, dtype=target.wide)
    return (best == ids.gather(1, log_probs.argmax(-1, keepdim=True))[:, 0]).to(target.wide)
