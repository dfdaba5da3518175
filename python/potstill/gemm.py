"""The matrix products around a row kernel, and the precision they run in.

What the row kernel reads (`logit_dtype`) and writes (`grad_dtype`) is planned once per call:
- fp32 and fp64 run as they are.
- 16-bit on a CPU without 16-bit matrix instructions, or with precise=True: the weight is widened tile by tile and the
  products run in fp32. There that is several times faster than the 16-bit product, and the logits are exact.
- 16-bit on other CPUs: the products run in 16 bits, and logits are rounded to it.
- 16-bit on CUDA: fp32 out of the GEMM where torch offers it, 16-bit gradients into the backward GEMMs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

TILE = 4096  # vocabulary rows widened or accumulated at a time
TILE_BYTES = 8 << 20  # of a widened tile: small enough for the cache
CPU_BUDGET = 160 << 20  # bytes of one chunk buffer
CPU_COLUMN_BYTES = 256 * 4  # of one of its columns: 256 rows of fp32, 512 of 16 bits
CUDA_BUDGET = 1280 << 20


@dataclass(frozen=True)
class Plan:
    """How one side's products run; `widen`: the weight is converted to fp32 tile by tile."""

    logit_dtype: torch.dtype
    grad_dtype: torch.dtype
    widen: bool = False


@cache
def cpu_has_native(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of a 16-bit dtype natively."""
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
    probe = getattr(torch.ops.mkldnn, name, None)
    return bool(probe is not None and probe())


@cache
def cuda_has_fp32_out() -> bool:
    """Whether torch.mm takes out_dtype, so that 16-bit products leave the GEMM in fp32."""
    return any("dtype" in overload for overload in torch.ops.aten.mm.overloads())


def plan(device: torch.device, dtype: torch.dtype, precise: bool) -> Plan:
    """The plan for operands of `dtype` on `device`."""
    if dtype in (torch.float32, torch.float64):
        return Plan(dtype, dtype)
    if device.type == "cpu":
        if precise or not cpu_has_native(dtype):
            return Plan(torch.float32, torch.float32, widen=True)
        return Plan(dtype, dtype)
    if cuda_has_fp32_out():
        return Plan(torch.float32, dtype)
    if precise:
        return Plan(torch.float32, torch.float32, widen=True)
    return Plan(dtype, dtype)


def chunk_rows(device: torch.device, columns: int, dtype: torch.dtype) -> int:
    """Rows of a chunk buffer from a byte budget; never from the hidden size."""
    row_bytes = columns * dtype.itemsize
    if device.type == "cpu":
        return max(128, min(CPU_COLUMN_BYTES // dtype.itemsize, CPU_BUDGET // row_bytes))
    return max(1024, min(4096, CUDA_BUDGET // row_bytes // 128 * 128))


def logits_into(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, how: Plan) -> None:
    """out [R, V] = hidden [R, D] @ weight [V, D].T + bias [V]."""
    if how.widen:
        wide = hidden.to(out.dtype)
        for v, tile in widened_tiles(weight, out.dtype):
            torch.mm(wide, tile.t(), out=out[:, v : v + len(tile)])
    elif out.dtype == hidden.dtype:
        torch.mm(hidden, weight.t(), out=out)
    else:
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    if bias is not None:
        out += bias


def hidden_gradient_into(out: Tensor, grad: Tensor, weight: Tensor, how: Plan) -> None:
    """out [R, D] = grad [R, V] @ weight [V, D]."""
    if not how.widen:
        torch.mm(grad, weight, out=out)
        return
    acc = torch.zeros(out.shape, dtype=grad.dtype, device=out.device)
    for v, tile in widened_tiles(weight, grad.dtype):
        acc.addmm_(grad[:, v : v + len(tile)], tile)
    out.copy_(acc)


def widened_tiles(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows as `dtype`) of weight [V, D], in one buffer of at most TILE_BYTES that each tile overwrites."""
    rows = max(1, min(TILE, TILE_BYTES // (weight.shape[1] * dtype.itemsize)))
    buffer = torch.empty((min(rows, len(weight)), weight.shape[1]), dtype=dtype, device=weight.device)
    for v in range(0, len(weight), rows):
        part = weight[v : v + rows]
        yield v, buffer[: len(part)].copy_(part)


def is_rounded_once(how: Plan, weight: Tensor) -> bool:
    """Whether a single chunk's gradient of the weight leaves its product as a sum in fp32 would be rounded.

    So it is where 16-bit products run natively on a CPU: no fp32 [V, D] is needed.
    """
    return weight.device.type == "cpu" and how.grad_dtype == weight.dtype and weight.dtype.itemsize == 2


def weight_gradient_add(acc: Tensor, grad: Tensor, hidden: Tensor, first: bool) -> None:
    """acc [V, D] (fp32, or fp64) += grad [R, V].T @ hidden [R, D]; the first call overwrites."""
    if grad.dtype == acc.dtype:
        acc.addmm_(grad.t(), hidden.to(acc.dtype), beta=0.0 if first else 1.0)
        return
    for v in range(0, len(acc), TILE):
        tile = grad[:, v : v + TILE].t()
        if grad.is_cuda and cuda_has_fp32_out():
            part = torch.mm(tile, hidden, out_dtype=acc.dtype)
        else:
            part = tile @ hidden
        if first:
            acc[v : v + TILE] = part
        else:
            acc[v : v + TILE] += part
