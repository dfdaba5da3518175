"""Triton: sums of token log-probabilities over the chunks of an alignment, and their gradient.

sum c = sum of min(value, 0) over the tokens of starts[c]..ends[c] in chunk c. A program adds BLOCK chunks, a token of
each at a time, in the order of the tokens: no atomics, the same result every time. Backward gathers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from potstill.kernels.triton_rows import _on

LAUNCH = {"BLOCK": 128, "num_warps": 4, "maxnreg": 64}


@triton.jit
def sums_kernel(p_values, p_chunk, p_starts, p_ends, p_sums, count, BLOCK: tl.constexpr):
    o_chunk = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = o_chunk < count
    b_start = tl.load(p_starts + o_chunk, mask=inside, other=0)
    b_length = tl.load(p_ends + o_chunk, mask=inside, other=0) - b_start
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(tl.max(b_length, axis=0)):
        here = inside & (i < b_length)
        b_of = tl.load(p_chunk + b_start + i, mask=here, other=-1)
        b_value = tl.load(p_values + b_start + i, mask=here, other=0.0).to(tl.float32)
        b_sum += tl.where((b_of == o_chunk) & ~(b_value > 0), b_value, 0.0)
    tl.store(p_sums + o_chunk, b_sum, mask=inside)


@triton.jit
def gather_kernel(p_grad, p_values, p_chunk, p_out, tokens, BLOCK: tl.constexpr):
    o_token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = o_token < tokens
    b_chunk = tl.load(p_chunk + o_token, mask=inside, other=-1)
    b_value = tl.load(p_values + o_token, mask=inside, other=1.0).to(tl.float32)
    counted = (b_chunk >= 0) & (b_value <= 0)
    b_grad = tl.load(p_grad + b_chunk, mask=counted, other=0.0).to(tl.float32)
    tl.store(p_out + o_token, tl.where(counted, b_grad, 0.0), mask=inside)


def _grid(count: int) -> tuple[int]:
    return (triton.cdiv(count, LAUNCH["BLOCK"]),)


def chunk_sums(values: Tensor, chunk: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """See reference/chunks.py."""
    values, chunk, starts, ends = (x.contiguous() for x in (values, chunk, starts, ends))
    sums = torch.empty(len(starts), dtype=values.dtype, device=values.device)
    if len(sums):
        with _on(sums):
            sums_kernel[_grid(len(sums))](values, chunk, starts, ends, sums, len(sums), **LAUNCH)
    return sums


def chunk_sums_backward(grad: Tensor, values: Tensor, chunk: Tensor) -> Tensor:
    """See reference/chunks.py."""
    if not len(grad):
        return torch.zeros_like(values)
    grad, values, chunk = (x.contiguous() for x in (grad, values, chunk))
    out = torch.empty_like(values)
    with _on(out):
        gather_kernel[_grid(len(out))](grad, values, chunk, out, len(out), **LAUNCH)
    return out
