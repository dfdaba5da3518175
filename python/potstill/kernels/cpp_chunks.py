"""Sums over the chunks of an alignment by the C++ kernels. CPU only."""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.dispatch import Facts, register
from potstill.kernels.cpp import _cpp, refuses


def refuses_chunks(facts: Facts) -> str | None:
    """None, or why these kernels do not serve the call."""
    if facts.dtype not in (torch.float32, torch.float64):
        return f"serves fp32 and fp64, not {facts.dtype}"
    return refuses(facts)


@register("chunk_sums", "cpp", rank=50, refuses=refuses_chunks)
def chunk_sums(values: Tensor, chunk: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """See reference/chunks.py. Summed in fp64."""
    values, chunk = values.contiguous(), chunk.to(torch.int32).contiguous()
    starts, ends = (x.to(torch.int64).contiguous() for x in (starts, ends))
    sums = torch.empty(len(starts), dtype=values.dtype)
    _cpp.chunk_sums(
        values.dtype == torch.float64, values.data_ptr(), chunk.data_ptr(), starts.data_ptr(), ends.data_ptr(),
        len(starts), sums.data_ptr(),
    )  # fmt: skip
    return sums


@register("chunk_sums_backward", "cpp", rank=50, refuses=refuses_chunks)
def chunk_sums_backward(grad: Tensor, values: Tensor, chunk: Tensor) -> Tensor:
    """See reference/chunks.py."""
    grad, values, chunk = grad.contiguous(), values.contiguous(), chunk.to(torch.int32).contiguous()
    out = torch.empty_like(values)
    _cpp.chunk_gradient(
        values.dtype == torch.float64, grad.data_ptr(), values.data_ptr(), chunk.data_ptr(), len(values), out.data_ptr()
    )
    return out
