"""Registers the Triton kernels; imports Triton only when one of them runs.

Under TRITON_INTERPRET=1 they serve CPU tensors too, for tests, with a rank below every other backend.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from potstill.dispatch import Facts, register
from potstill.rows import RowSpec, Side

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
RANK = -1 if INTERPRETED else 60
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


TRITON = importlib.util.find_spec("triton") is not None


def refuses(facts: Facts) -> str | None:
    if not TRITON:
        return "Triton is not installed; `pip install triton` adds it on Linux (x86-64 or aarch64)"
    if facts.dtype not in DTYPES:
        return f"its arithmetic is fp32, for fp32, bf16 and fp16 logits, not {facts.dtype}; torch serves fp64"
    if INTERPRETED:
        return None
    if facts.device.type != "cuda":
        return f"it serves CUDA devices, not {facts.device.type}; TRITON_INTERPRET=1 interprets it on a CPU"
    if torch.version.hip:
        return "it is built and checked for NVIDIA devices"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(facts.device) < (8, 0):
        return "it is built and checked for compute capability 8.0 and later"
    return None


@register("dense_rows", "triton", rank=RANK, refuses=refuses)
def dense_rows(
    student: Tensor, teacher: Tensor, coef: Tensor, labels: Tensor | None, spec: RowSpec, grad: Tensor | None
) -> Tensor:
    """See rows.py and triton_rows.py."""
    from potstill.kernels import triton_rows

    return triton_rows.dense_rows(student, teacher, coef, labels, spec, grad)


@register("sparse_rows", "triton", rank=RANK, refuses=refuses)
def sparse_rows(
    student: Tensor, ids: Tensor, log_probs: Tensor, log_rest: Tensor | None, coef: Tensor,
    labels: Tensor | None, spec: RowSpec, grad: Tensor | None,
    weights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See rows.py and triton_rows.py."""
    from potstill.kernels import triton_rows

    return triton_rows.sparse_rows(student, ids, log_probs, log_rest, coef, labels, spec, grad, weights)


@register("topk", "triton", rank=RANK, refuses=refuses)
def topk(logits: Tensor, k: int, side: Side) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See reference/topk.py and triton_topk.py."""
    from potstill.kernels import triton_topk

    return triton_topk.topk(logits, k, side)


@register("topk_with", "triton", rank=RANK, refuses=refuses)
def topk_with(
    logits: Tensor, k: int, side: Side, tokens: Tensor | None, temperatures: Sequence[float]
) -> tuple[Tensor, ...]:
    """See reference/topk.py and triton_topk.py."""
    from potstill.kernels import triton_topk

    return triton_topk.topk_with(logits, k, side, tokens, temperatures)


def refuses_chunks(facts: Facts) -> str | None:
    if facts.dtype != torch.float32:
        return f"its arithmetic is fp32, not {facts.dtype}; torch serves fp64"
    return refuses(facts)


@register("chunk_sums", "triton", rank=RANK, refuses=refuses_chunks)
def chunk_sums(values: Tensor, chunk: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """See reference/chunks.py and triton_chunks.py."""
    from potstill.kernels import triton_chunks

    return triton_chunks.chunk_sums(values, chunk, starts, ends)


@register("chunk_sums_backward", "triton", rank=RANK, refuses=refuses_chunks)
def chunk_sums_backward(grad: Tensor, values: Tensor, chunk: Tensor) -> Tensor:
    """See reference/chunks.py and triton_chunks.py."""
    from potstill.kernels import triton_chunks

    return triton_chunks.chunk_sums_backward(grad, values, chunk)
