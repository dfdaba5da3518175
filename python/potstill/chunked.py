"""The chunk loop: logits of a few rows at a time, a row kernel, gradients straight from the same buffer.

Peak memory beyond inputs and outputs is one logit buffer a side, `chunk_rows x V`, whatever the number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from potstill import dispatch, gemm
from potstill.rows import RowSpec


@dataclass(frozen=True)
class TeacherRows:
    """A teacher's tensors, N rows; exactly one of hidden, logits and ids is given."""

    hidden: Tensor | None = None  # [N, Dt] with weight [Vt, Dt] and bias [Vt]
    weight: Tensor | None = None
    bias: Tensor | None = None
    logits: Tensor | None = None  # [N, Vt]
    ids: Tensor | None = None  # [N, K] with log_probs [N, K] and log_rest [N], at the loss's temperature
    log_probs: Tensor | None = None
    log_rest: Tensor | None = None


@dataclass(frozen=True)
class Wanted:
    """Which gradients to compute."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False

    @property
    def any(self) -> bool:
        return self.hidden or self.weight or self.bias


def pieces(coef: Tensor, rows: int) -> Iterator[Tensor | slice]:
    """Chunks of the rows with coef != 0 (on CPU, where looking costs nothing), or of all rows (elsewhere)."""
    if coef.device.type == "cpu" and not bool((coef != 0).all()):
        yield from coef.nonzero()[:, 0].split(rows) if bool((coef != 0).any()) else ()
    else:
        yield from (slice(i, min(i + rows, len(coef))) for i in range(0, len(coef), rows))


class RowRunner:
    """Runs the selected row kernel on chunks, with the teacher's side prepared for each chunk."""

    def __init__(self, teacher: TeacherRows, coef: Tensor, labels: Tensor | None, spec: RowSpec,
                 student: tuple[torch.device, torch.dtype, int], rows: int, precise: bool, backend: str):  # fmt: skip
        self.teacher, self.coef, self.labels, self.spec = teacher, coef, labels, spec
        device, dtype, columns = student
        op = "sparse_rows" if teacher.ids is not None else "dense_rows"
        self.kernel = dispatch.select(
            dispatch.Facts(op, device, dtype, columns, divergence=spec.divergence.name), backend
        )
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.parts = torch.zeros(2, len(coef), dtype=wide, device=device)
        if teacher.hidden is not None:
            assert teacher.weight is not None
            self.how = gemm.plan(device, teacher.hidden.dtype, precise)
            shape = (min(rows, len(coef)), len(teacher.weight))
            self.buffer = torch.empty(shape, dtype=self.how.logit_dtype, device=device)

    def __call__(self, piece: Tensor | slice, student: Tensor, grad: Tensor | None) -> None:
        """student [R, V]: raw logits of the rows in `piece`; grad [R, V] may be student itself."""
        t, labels = self.teacher, None if self.labels is None else self.labels[piece]
        if t.ids is not None:
            assert t.log_probs is not None
            rest = None if t.log_rest is None else t.log_rest[piece]
            result = self.kernel.run(
                student, t.ids[piece], t.log_probs[piece], rest, self.coef[piece], labels, self.spec, grad
            )
        else:
            if t.hidden is not None:
                assert t.weight is not None
                logits = self.buffer[: len(student)]
                gemm.logits_into(logits, t.hidden[piece], t.weight, t.bias, self.how)
            else:
                assert t.logits is not None
                logits = t.logits[piece]
            result = self.kernel.run(student, logits, self.coef[piece], labels, self.spec, grad)
        self.parts[:, piece] = result


def linear_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: TeacherRows, coef: Tensor, labels: Tensor | None,
    spec: RowSpec, want: Wanted, rows: int, precise: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """hidden [N, D], weight [V, D] -> (parts [2, N], d_hidden [N, D], d_weight [V, D], d_bias [V]).

    The gradients are those of `sum(coef * (distill_weight * parts[0] + ce_weight * parts[1]))`; one that is not wanted
    comes back empty.
    """
    with torch.autocast(hidden.device.type, enabled=False), torch.no_grad():
        how = gemm.plan(hidden.device, hidden.dtype, precise)
        rows = rows or gemm.chunk_rows(hidden.device, len(weight), how.logit_dtype)
        run = RowRunner(
            teacher, coef, labels, spec, (hidden.device, how.logit_dtype, len(weight)), rows, precise, backend
        )
        wide = run.parts.dtype
        buffer = torch.empty((min(rows, len(hidden)), len(weight)), dtype=how.logit_dtype, device=hidden.device)
        grads = buffer
        if want.any and how.grad_dtype != how.logit_dtype:
            grads = torch.empty_like(buffer, dtype=how.grad_dtype)
        d_hidden = torch.zeros_like(hidden) if want.hidden else hidden.new_empty(0)
        acc_weight = torch.empty(weight.shape if want.weight else 0, dtype=wide, device=hidden.device)
        acc_bias = torch.zeros(len(weight) if want.bias else 0, dtype=wide, device=hidden.device)
        first = True
        for piece in pieces(coef, rows):
            h = hidden[piece]
            student, grad = buffer[: len(h)], grads[: len(h)] if want.any else None
            gemm.logits_into(student, h, weight, bias, how)
            run(piece, student, grad)
            if grad is None:
                continue
            if want.hidden:
                if isinstance(piece, slice):
                    gemm.hidden_gradient_into(d_hidden[piece], grad, weight, how)
                else:
                    part = torch.empty_like(h)
                    gemm.hidden_gradient_into(part, grad, weight, how)
                    d_hidden[piece] = part
            if want.weight:
                gemm.weight_gradient_add(acc_weight, grad, h, first)
            if want.bias:
                acc_bias += grad.sum(0, dtype=wide)
            first = False
        if first:
            acc_weight.zero_()
        return run.parts, d_hidden, acc_weight.to(weight.dtype), acc_bias.to(weight.dtype)


def logits_rows(
    logits: Tensor, teacher: TeacherRows, coef: Tensor, labels: Tensor | None, spec: RowSpec, want: bool, rows: int,
    precise: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """logits [N, V] -> (parts [2, N], d_logits [N, V] or empty); the gradient as in linear_rows."""
    with torch.autocast(logits.device.type, enabled=False), torch.no_grad():
        rows = rows or gemm.chunk_rows(logits.device, logits.shape[1], logits.dtype)
        student = (logits.device, logits.dtype, logits.shape[1])
        run = RowRunner(teacher, coef, labels, spec, student, rows, precise, backend)
        d_logits = torch.empty(logits.shape if want else 0, dtype=logits.dtype, device=logits.device)
        for start in range(0, len(logits), rows):
            piece = slice(start, min(start + rows, len(logits)))
            run(piece, logits[piece], d_logits[piece] if want else None)
        return run.parts, d_logits
