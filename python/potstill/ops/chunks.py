"""The op behind chunk likelihoods: sums of token log-probabilities over chunks, and its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from potstill import dispatch
from potstill.ops.library import Op, no_second_derivative, register


def _run(op: str, values: Tensor, backend: str) -> Any:
    return dispatch.select(dispatch.Facts(op, values.device, values.dtype), backend).run


def chunk_sums(values: Tensor, chunk: Tensor, starts: Tensor, ends: Tensor, backend: str) -> Tensor:
    return _run("chunk_sums", values, backend)(values, chunk, starts, ends)


def chunk_sums_backward(grad: Tensor, values: Tensor, chunk: Tensor, backend: str) -> Tensor:
    return _run("chunk_sums_backward", values, backend)(grad, values, chunk)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, chunk, _, _, ctx.backend = inputs
    ctx.save_for_backward(values, chunk)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.potstill.chunk_sums_backward(grad, *ctx.saved_tensors, ctx.backend), None, None, None, None


register(
    Op(
        "chunk_sums", "(Tensor values, Tensor chunk, Tensor starts, Tensor ends, str backend) -> Tensor", chunk_sums,
        lambda values, chunk, starts, ends, backend: values.new_empty(starts.shape), _backward, _save,
    )
)  # fmt: skip
register(
    Op(
        "chunk_sums_backward", "(Tensor grad, Tensor values, Tensor chunk, str backend) -> Tensor", chunk_sums_backward,
        lambda grad, values, chunk, backend: torch.empty_like(values, memory_format=torch.contiguous_format),
        no_second_derivative, None,
    )
)  # fmt: skip
