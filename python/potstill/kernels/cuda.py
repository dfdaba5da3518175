"""The CUDA C++ kernels: checks dtypes and strides, allocates results, passes addresses and the stream.

Ranked below Triton until measured beside it on a card.
"""

from __future__ import annotations

import torch
from torch import Tensor

from potstill import divergences
from potstill.dispatch import Facts, register
from potstill.rows import TAILS, RowSpec, Side

try:
    from potstill import _cuda
except ImportError as error:  # built without nvcc
    _cuda = None  # type: ignore[assignment]
    MISSING = f"potstill._cuda is not built ({error}); build where nvcc is (POTSTILL_CUDA=1 demands it)"

DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
COMPILED = _cuda.divergences() if _cuda else {}
ARCHITECTURES = _cuda.architectures() if _cuda else []


def refuses(facts: Facts) -> str | None:
    """None, or why these kernels do not serve the call."""
    if _cuda is None:
        return MISSING
    if facts.device.type != "cuda":
        return f"serves CUDA tensors, not {facts.device.type}"
    if facts.dtype not in DTYPES:
        return f"serves fp32, bf16 and fp16, not {facts.dtype}; torch serves fp64"
    if facts.divergence in divergences.names("estimator") + divergences.names("metric"):
        return f"{facts.divergence!r} is served by triton and torch"
    if facts.divergence is not None and facts.divergence not in COMPILED:
        remedy = "run `python -m potstill.spell > csrc/divergences.inc` and rebuild"
        return f"divergence {facts.divergence!r} is not compiled in; {remedy}"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(facts.device)
        if not any(major == a and minor >= b for a, b in ARCHITECTURES):
            built = ", ".join(f"{a}.{b}" for a, b in ARCHITECTURES)
            remedy = f"rebuild with POTSTILL_CUDA_ARCHS={major}{minor}"
            return f"is built for compute capability {built}, not {major}.{minor}; {remedy}"
    return None


def stream_of(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream


def _unit_columns(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _side(x: Tensor, side: Side) -> tuple[int, int, int, int, float, float]:
    return x.data_ptr(), x.stride(0), DTYPES[x.dtype], side.vocab_size, side.scale, side.softcap


def _objective(spec: RowSpec) -> tuple[str, list[float], float, float, float, float]:
    d = spec.divergence
    return d.name, list(d.values), spec.centre, spec.temperature, spec.distill_weight, spec.ce_weight


def _gradient(grad: Tensor | None) -> tuple[Tensor | None, tuple[int, int, int]]:
    """Where the kernel writes the gradient: grad itself where its layout allows; and as its argument."""
    if grad is None:
        return None, (0, 0, 0)
    written = grad if grad.dtype in DTYPES else torch.empty_like(grad, dtype=torch.float32)
    written = _unit_columns(written)
    return written, (written.data_ptr(), written.stride(0), DTYPES[written.dtype])


@register("dense_rows", "cuda", rank=40, refuses=refuses)
def dense_rows(
    student: Tensor, teacher: Tensor, coef: Tensor, labels: Tensor | None, spec: RowSpec, grad: Tensor | None
) -> Tensor:
    """See rows.py. student [R, Vs], teacher [R, Vt], coef [R], labels [R] -> [2, R] fp32."""
    assert spec.teacher is not None
    x, y = _unit_columns(student), _unit_columns(teacher if teacher.dtype in DTYPES else teacher.float())
    coef, labels = coef.float().contiguous(), None if labels is None else labels.long().contiguous()
    written, target = _gradient(grad)
    out = torch.empty(2, len(x), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _cuda.dense_rows(
            len(x), x.shape[1], _side(x, spec.student), _side(y, spec.teacher), _address(coef),
            _address(labels), _objective(spec), target, out.data_ptr(), stream_of(x),
        )  # fmt: skip
    if grad is not None and written is not None and written is not grad:
        grad.copy_(written)
    return out


@register("sparse_rows", "cuda", rank=40, refuses=refuses)
def sparse_rows(
    student: Tensor, ids: Tensor, log_probs: Tensor, log_rest: Tensor | None, coef: Tensor,
    labels: Tensor | None, spec: RowSpec, grad: Tensor | None,
    weights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See rows.py. student [R, Vs], ids, log_probs and weights [R, K], log_rest, coef, labels [R] -> [2, R] fp32."""
    x = _unit_columns(student)
    coef, labels = coef.float().contiguous(), None if labels is None else labels.long().contiguous()
    ids, log_probs = ids.long().contiguous(), log_probs.float().contiguous()
    log_rest = None if log_rest is None else log_rest.float().contiguous()
    weights = None if weights is None else weights.float().contiguous()
    written, target = _gradient(grad)
    out = torch.empty(2, len(x), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _cuda.sparse_rows(
            len(x), x.shape[1], _side(x, spec.student), _address(ids), _address(log_probs),
            _address(log_rest), _address(weights), ids.shape[1], TAILS.index(spec.tail), _address(coef),
            _address(labels),
            _objective(spec), target, out.data_ptr(), stream_of(x),
        )  # fmt: skip
    if grad is not None and written is not None and written is not grad:
        grad.copy_(written)
    return out
