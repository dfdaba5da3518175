"""The chunk loop: logits of a few rows at a time, a row kernel, gradients straight from the same buffer.

Peak memory beyond inputs and outputs is one logit buffer a side, `chunk_rows x V`, whatever the number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from potstill import dispatch, gemm, metrics, torch_rows
from potstill.divergences import Divergence
from potstill.rows import RowSpec
from potstill.targets import Target


@dataclass(frozen=True)
class Wanted:
    """Which gradients to compute."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    bounds: bool = False

    @property
    def any(self) -> bool:
        return self.hidden or self.weight or self.bias or self.bounds


@dataclass(frozen=True)
class Task:
    """One call's teacher (see targets.py), weights and objective, N rows."""

    teacher: list[Tensor]
    numbers: list[float]
    plan: str
    bounds: Tensor | None  # [2, N] of a masked teacher
    coef: Tensor  # [N]
    labels: Tensor | None  # [N]
    spec: RowSpec
    metrics: tuple[str, ...]
    rows: int
    precise: bool
    backend: str


def pieces(coef: Tensor, rows: int) -> Iterator[Tensor | slice]:
    """Chunks of the rows with coef != 0 (on CPU, where looking costs nothing), or of all rows (elsewhere)."""
    if coef.device.type == "cpu" and not bool((coef != 0).all()):
        yield from coef.nonzero()[:, 0].split(rows) if bool((coef != 0).any()) else ()
    else:
        yield from (slice(i, min(i + rows, len(coef))) for i in range(0, len(coef), rows))


class RowRunner:
    """Runs the selected row kernel on chunks, with the teacher's side prepared for each chunk.

    parts [2 + M, N]: divergence, cross-entropy, then the metrics asked for.  d_bounds [2, N] or empty.
    """

    def __init__(
        self, task: Task, device: torch.device, dtype: torch.dtype, columns: int, rows: int, want_bounds: bool
    ):
        self.task, self.spec = task, task.spec
        rows = min(rows, len(task.coef))
        self.target = Target(
            task.teacher, task.numbers, task.plan, task.spec.student, device, dtype, rows, task.precise
        )
        op = "sparse_rows" if self.target.sparse else "dense_rows"
        self.facts = dispatch.Facts(op, device, dtype, columns, divergence=task.spec.divergence.name)
        self.by_torch = not isinstance(task.spec.divergence, Divergence) or self.target.softness is not None
        if not self.by_torch:
            self.kernel = dispatch.select(self.facts, task.backend)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.parts = torch.zeros(2 + len(task.metrics), len(task.coef), dtype=wide, device=device)
        self.d_bounds = torch.zeros((2, len(task.coef)) if want_bounds else 0, dtype=wide, device=device)

    def __call__(self, piece: Tensor | slice, student: Tensor, grad: Tensor | None) -> None:
        """student [R, V]: raw logits of the rows in `piece`; grad [R, V] may be student itself."""
        task = self.task
        coef, labels = task.coef[piece], None if task.labels is None else task.labels[piece]
        if self.target.sparse:
            self._measure(piece, student, None, coef)
            self.parts[:2, piece] = self._sparse(piece, student, coef, labels, grad)
            return
        logits, spec = self.target.dense(piece, student, self.spec)
        if task.metrics:
            self._measure(piece, student, logits, coef)
        self.parts[:2, piece] = self._dense(piece, student, logits, coef, labels, spec, grad)

    def _sparse(
        self, piece: Tensor | slice, student: Tensor, coef: Tensor, labels: Tensor | None, grad: Tensor | None
    ) -> Tensor:
        ids, log_probs, log_rest, weights = self.target.entries(piece)
        if self.by_torch:
            return torch_rows.loss_entries(student, ids, log_probs, coef, labels, self.spec, grad)
        return self.kernel.run(student, ids, log_probs, log_rest, coef, labels, self.spec, grad, weights)

    def _dense(
        self, piece: Tensor | slice, student: Tensor, logits: Tensor, coef: Tensor, labels: Tensor | None,
        spec: RowSpec, grad: Tensor | None,
    ) -> Tensor:  # fmt: skip
        if self.target.softness is None:
            run = torch_rows.loss_rows if self.by_torch else self.kernel.run
            return run(student, logits, coef, labels, spec, grad)
        bounds = self.task.bounds
        assert bounds is not None
        d_bounds = torch.empty(2, len(coef), dtype=self.parts.dtype, device=coef.device) if len(self.d_bounds) else None
        found = torch_rows.masked_rows(
            student, logits, bounds[:, piece], self.target.softness, coef, labels, spec, grad, d_bounds
        )
        if d_bounds is not None:
            self.d_bounds[:, piece] = d_bounds
        return found

    def _measure(self, piece: Tensor | slice, student: Tensor, logits: Tensor | None, coef: Tensor) -> None:
        for i, name in enumerate(self.task.metrics):
            self.parts[2 + i, piece] = metrics.rows(name, self.target, piece, student, logits, coef, self.facts)


def linear_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, task: Task, want: Wanted
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden [N, D], weight [V, D] -> (parts [2 + M, N], d_hidden [N, D], d_weight [V, D], d_bias [V], d_bounds).

    The gradients are those of `sum(coef * (distill_weight * parts[0] + ce_weight * parts[1]))`; one that is not wanted
    comes back empty.
    """
    with torch.autocast(hidden.device.type, enabled=False), torch.no_grad():
        how = gemm.plan(hidden.device, hidden.dtype, task.precise)
        rows = task.rows or gemm.chunk_rows(hidden.device, len(weight), how.logit_dtype)
        run = RowRunner(task, hidden.device, how.logit_dtype, len(weight), rows, want.bounds)
        wide = run.parts.dtype
        buffer = torch.empty((min(rows, len(hidden)), len(weight)), dtype=how.logit_dtype, device=hidden.device)
        grads = buffer
        if want.any and how.grad_dtype != how.logit_dtype:
            grads = torch.empty_like(buffer, dtype=how.grad_dtype)
        d_hidden = torch.zeros_like(hidden) if want.hidden else hidden.new_empty(0)
        cut = list(pieces(task.coef, rows))
        once = len(cut) == 1 and gemm.is_rounded_once(how, weight)
        acc_dtype = weight.dtype if once else wide
        acc_weight = torch.empty(weight.shape if want.weight else 0, dtype=acc_dtype, device=hidden.device)
        acc_bias = torch.zeros(len(weight) if want.bias else 0, dtype=wide, device=hidden.device)
        first = True
        for piece in cut:
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
        return run.parts, d_hidden, acc_weight.to(weight.dtype), acc_bias.to(weight.dtype), run.d_bounds


def logits_rows(logits: Tensor, task: Task, want: Wanted) -> tuple[Tensor, Tensor, Tensor]:
    """logits [N, V] -> (parts [2 + M, N], d_logits [N, V] or empty, d_bounds); the gradient as in linear_rows."""
    with torch.autocast(logits.device.type, enabled=False), torch.no_grad():
        rows = task.rows or gemm.chunk_rows(logits.device, logits.shape[1], logits.dtype)
        run = RowRunner(task, logits.device, logits.dtype, logits.shape[1], rows, want.bounds)
        d_logits = torch.empty(logits.shape if want.hidden else 0, dtype=logits.dtype, device=logits.device)
        for start in range(0, len(logits), rows):
            piece = slice(start, min(start + rows, len(logits)))
            run(piece, logits[piece], d_logits[piece] if want.hidden else None)
        return run.parts, d_logits, run.d_bounds
