"""The kernels over parts of the vocabulary in C++. CPU only; rows_parts.py is the contract."""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.dispatch import register
from potstill.kernels.cpp import _cpp, dense_columns, refuses, side_numbers
from potstill.rows import RowSpec, Side

LSE, DENSE_SUMS, DENSE_GRAD, SPARSE_GRAD = range(4)
NO_SIDE = (0, 0, 0, 0, 1.0, 0.0)


def _no_divergence(temperature: float, ce_weight: float) -> tuple[str, list[float], float, float, float, float]:
    """The objective of a step that knows no divergence: any that is compiled in will do."""
    return "forward_kl", [], 0.0, temperature, 0.0, ce_weight


def _objective(spec: RowSpec) -> tuple[str, list[float], float, float, float, float]:
    d = spec.divergence
    return d.name, list(d.values), spec.centre, spec.temperature, spec.distill_weight, spec.ce_weight


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _address(x: Tensor | None) -> int:
    return x.data_ptr() if x is not None and x.numel() else 0


def _teacher(teacher: Tensor, student: Tensor) -> Tensor:
    if (teacher.dtype == torch.float64) != (student.dtype == torch.float64):
        teacher = teacher.to(_wide(student))
    return dense_columns(teacher)


@register("part_lse", "cpp", rank=50, refuses=refuses)
def part_lse(x: Tensor, side: Side, temperature: float, ids: Tensor | None = None) -> Tensor:
    """See rows_parts.py. x [R, C], ids [R, K] -> [R] fp64."""
    x = dense_columns(x)
    ids = None if ids is None else ids.long().contiguous()
    out = torch.empty(len(x), dtype=torch.float64)
    _cpp.part(
        LSE, len(x), x.shape[1], side_numbers(x, side), NO_SIDE, _address(ids), 0, 0 if ids is None else ids.shape[1],
        (0,) * 5, 0, 0, _no_divergence(temperature, 0.0), 0, 0, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


@register("dense_part_sums", "cpp", rank=50, refuses=refuses)
def dense_part_sums(
    student: Tensor, teacher: Tensor, lse_s: Tensor, lse_t: Tensor, coef: Tensor, spec: RowSpec
) -> Tensor:
    """See rows_parts.py. student [R, C], teacher [R, C'], lse_s, lse_t and coef [R] -> [2, R] fp64."""
    assert spec.teacher is not None
    x, y = dense_columns(student), _teacher(teacher, student)
    coef, lse_s, lse_t = coef.to(_wide(x)).contiguous(), lse_s.contiguous(), lse_t.contiguous()
    out = torch.empty(2, len(x), dtype=torch.float64)
    _cpp.part(
        DENSE_SUMS, len(x), x.shape[1], side_numbers(x, spec.student), side_numbers(y, spec.teacher), 0, 0, 0,
        (lse_s.data_ptr(), lse_t.data_ptr(), 0, 0, 0), coef.data_ptr(), 0, _objective(spec), 0, 0, out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _gradient(
    step: int, student: Tensor, teacher: Tensor | None, ids: Tensor | None, entries: Tensor | None,
    stats: tuple[Tensor, ...], coef: Tensor, labels: Tensor | None, spec: RowSpec, grad: Tensor,
) -> None:  # fmt: skip
    x, target = dense_columns(student), grad
    if grad.dtype != x.dtype or grad.stride(-1) != 1:
        target = torch.empty_like(x, memory_format=torch.contiguous_format)
    coef = coef.to(_wide(x)).contiguous()
    y = NO_SIDE
    if teacher is not None:
        assert spec.teacher is not None
        teacher = _teacher(teacher, x)
        y = side_numbers(teacher, spec.teacher)
    ids = None if ids is None else ids.long().contiguous()
    entries = None if entries is None else entries.to(coef.dtype).contiguous()
    labels = None if labels is None else labels.contiguous()
    stats = tuple(s.contiguous() for s in stats)
    a, b, c, d, e = (s.data_ptr() for s in stats)
    objective = _objective(spec) if step == DENSE_GRAD else _no_divergence(spec.temperature, spec.ce_weight)
    _cpp.part(
        step, len(x), x.shape[1], side_numbers(x, spec.student), y, _address(ids), _address(entries),
        0 if ids is None else ids.shape[1], (a, b, c, d, e), coef.data_ptr(), _address(labels), objective,
        target.data_ptr(), target.stride(0), 0, torch.get_num_threads(),
    )  # fmt: skip
    if target is not grad:
        grad.copy_(target)


@register("dense_part_grad", "cpp", rank=50, refuses=refuses)
def dense_part_grad(
    student: Tensor, teacher: Tensor, lse_s: Tensor, lse_t: Tensor, total: Tensor, weight: Tensor, coef: Tensor,
    labels: Tensor | None, lse_1: Tensor, spec: RowSpec, grad: Tensor,
) -> None:  # fmt: skip
    """See rows_parts.py. student and grad [R, C], teacher [R, C'], the others [R]."""
    stats = (lse_s, lse_t, lse_1, total, weight)
    _gradient(DENSE_GRAD, student, teacher, None, None, stats, coef, labels, spec, grad)


@register("sparse_part_grad", "cpp", rank=50, refuses=refuses)
def sparse_part_grad(
    student: Tensor, ids: Tensor, entries: Tensor, lse_s: Tensor, lse_rest: Tensor, outside: Tensor, rest: Tensor,
    coef: Tensor, labels: Tensor | None, lse_1: Tensor, spec: RowSpec, grad: Tensor,
) -> None:  # fmt: skip
    """See rows_parts.py. student and grad [R, C], ids and entries [R, K], the others [R]."""
    stats = (lse_s, lse_rest, lse_1, outside, rest)
    _gradient(SPARSE_GRAD, student, None, ids, entries, stats, coef, labels, spec, grad)
