"""The C++ kernels: checks dtypes and strides once, allocates results, passes addresses. CPU only."""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.dispatch import Facts, register
from potstill.rows import TAILS, RowSpec, Side

try:
    from potstill import _cpp
except ImportError as error:  # a source tree that was not built
    _cpp = None  # type: ignore[assignment]
    MISSING = f"potstill._cpp is not built ({error}); install with `pip install .`"

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
COMPILED = _cpp.divergences() if _cpp else {}


def refuses(facts: Facts) -> str | None:
    """None, or why these kernels do not serve the call."""
    if _cpp is None:
        return MISSING
    if facts.device.type != "cpu":
        return f"serves CPU tensors, not {facts.device.type}"
    if facts.dtype not in DTYPES:
        return f"serves fp32, fp64, bf16 and fp16, not {facts.dtype}"
    if facts.divergence is not None and facts.divergence not in COMPILED:
        return (
            f"divergence {facts.divergence!r} is not compiled in; run "
            "`python -m potstill.spell > csrc/divergences.inc` and rebuild"
        )
    return None


def dense_columns(x: Tensor) -> Tensor:
    """x [R, C] with unit column stride."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def side_numbers(x: Tensor, side: Side) -> tuple[int, int, int, int, float, float]:
    return x.data_ptr(), x.stride(0), DTYPES[x.dtype], side.vocab_size, side.scale, side.softcap


def _objective(spec: RowSpec) -> tuple[str, list[float], float, float, float, float]:
    d = spec.divergence
    return d.name, list(d.values), spec.centre, spec.temperature, spec.distill_weight, spec.ce_weight


def _prepare(student: Tensor, coef: Tensor, labels: Tensor | None, grad: Tensor | None) -> tuple[Tensor, ...]:
    """(student, coef, labels or empty, where to write the gradient or empty, out [2, R])."""
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    target = torch.empty(0) if grad is None else grad
    if grad is not None and (grad.dtype != student.dtype or grad.stride(-1) != 1):
        target = torch.empty_like(student, memory_format=torch.contiguous_format)
    out = torch.empty(2, len(student), dtype=wide)
    labels = torch.empty(0, dtype=torch.int64) if labels is None else labels.contiguous()
    return dense_columns(student), coef.to(wide).contiguous(), labels, target, out


def _address(x: Tensor) -> int:
    return x.data_ptr() if x.numel() else 0


@register("dense_rows", "cpp", rank=50, refuses=refuses)
def dense_rows(
    student: Tensor, teacher: Tensor, coef: Tensor, labels: Tensor | None, spec: RowSpec, grad: Tensor | None
) -> Tensor:
    """See rows.py. student [R, Vs], teacher [R, Vt], coef [R], labels [R] -> [2, R]."""
    assert spec.teacher is not None
    x, c, lab, target, out = _prepare(student, coef, labels, grad)
    if (teacher.dtype == torch.float64) != (x.dtype == torch.float64):
        teacher = teacher.to(out.dtype)
    y = dense_columns(teacher)
    _cpp.dense_rows(
        len(x), x.shape[1], side_numbers(x, spec.student), side_numbers(y, spec.teacher), c.data_ptr(), _address(lab),
        _objective(spec), _address(target), target.stride(0), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if grad is not None and target is not grad:
        grad.copy_(target)
    return out


@register("sparse_rows", "cpp", rank=50, refuses=refuses)
def sparse_rows(
    student: Tensor, ids: Tensor, log_probs: Tensor, log_rest: Tensor | None, coef: Tensor, labels: Tensor | None,
    spec: RowSpec, grad: Tensor | None,
    weights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See rows.py. student [R, Vs], ids, log_probs and weights [R, K], log_rest and coef [R], labels [R] -> [2, R]."""
    x, c, lab, target, out = _prepare(student, coef, labels, grad)
    ids, log_probs = ids.long().contiguous(), log_probs.to(out.dtype).contiguous()
    rest = torch.empty(0) if log_rest is None else log_rest.to(out.dtype).contiguous()
    w = torch.empty(0) if weights is None else weights.to(out.dtype).contiguous()
    _cpp.sparse_rows(
        len(x), x.shape[1], side_numbers(x, spec.student), ids.data_ptr(), log_probs.data_ptr(), _address(rest),
        _address(w), ids.shape[1], TAILS.index(spec.tail), c.data_ptr(), _address(lab), _objective(spec),
        _address(target), target.stride(0), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if grad is not None and target is not grad:
        grad.copy_(target)
    return out
