"""The op behind token_logprobs, and its backward: both run the same chunks of logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from potstill import dispatch, gemm
from potstill.extraction_chunks import linear_chunks
from potstill.ops.library import Op, no_second_derivative, register, side_of, wide

ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor tokens, Tensor? subset, bool entropy, float[] side, "
    "int chunk_rows, bool precise, str backend, bool want_hidden, bool want_weight, bool want_bias"
)
RESULTS = "(Tensor log_probs, Tensor entropy, Tensor log_mass)"
INCOMING = "Tensor d_log_probs, Tensor? d_entropy, Tensor? d_log_mass"
N_WANT = 3


def token_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, subset: Tensor | None, entropy: bool,
    side: list[float], chunk_rows: int, precise: bool, backend: str, *_: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    with torch.autocast(hidden.device.type, enabled=False), torch.no_grad():
        run = _kernel(hidden, weight, precise, backend)
        found = [
            run(logits, tokens[piece], subset, entropy, side_of(side))
            for piece, logits in linear_chunks(hidden, weight, bias, chunk_rows, precise)
        ]
        return tuple(torch.cat(x) for x in zip(*found, strict=True))


def token_logprobs_backward(
    d_log_probs: Tensor, d_entropy: Tensor | None, d_log_mass: Tensor | None, hidden: Tensor, weight: Tensor,
    bias: Tensor | None, tokens: Tensor, subset: Tensor | None, entropy: bool, side: list[float], chunk_rows: int,
    precise: bool, backend: str, want_hidden: bool, want_weight: bool, want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.autocast(hidden.device.type, enabled=False), torch.no_grad():
        run = _kernel(hidden, weight, precise, backend)
        how, dtype, numbers = gemm.plan(hidden.device, hidden.dtype, precise), wide(hidden), side_of(side)
        d_hidden = (
            torch.empty_like(hidden, memory_format=torch.contiguous_format) if want_hidden else hidden.new_empty(0)
        )
        acc_weight = torch.zeros(weight.shape if want_weight else 0, dtype=dtype, device=hidden.device)
        acc_bias = torch.zeros(len(weight) if want_bias else 0, dtype=dtype, device=hidden.device)
        for piece, logits in linear_chunks(hidden, weight, bias, chunk_rows, precise):
            coming = tuple(None if d is None else d[piece] for d in (d_log_probs, d_entropy, d_log_mass))
            grad = logits if how.grad_dtype == logits.dtype else torch.empty_like(logits, dtype=how.grad_dtype)
            run(logits, tokens[piece], subset, entropy, numbers, coming, grad)
            if want_hidden:
                gemm.hidden_gradient_into(d_hidden[piece], grad, weight, how)
            if want_weight:
                gemm.weight_gradient_add(acc_weight, grad, hidden[piece], False)
            if want_bias:
                acc_bias += grad.sum(0, dtype=dtype)
        return d_hidden, acc_weight.to(weight.dtype), acc_bias.to(weight.dtype)


def _kernel(hidden: Tensor, weight: Tensor, precise: bool, backend: str) -> Any:
    dtype = gemm.plan(hidden.device, hidden.dtype, precise).logit_dtype
    return dispatch.select(dispatch.Facts("token_rows", hidden.device, dtype, len(weight)), backend).run


def _fake(
    x: Tensor, weight: Tensor, bias: Any, tokens: Tensor, subset: Any, entropy: bool, *_: Any
) -> tuple[Tensor, ...]:
    n, dtype = x.shape[0], wide(x)
    rows = (x.new_empty(size, dtype=dtype) for size in (n if entropy else 0, 0 if subset is None else n))
    return x.new_empty(tokens.shape, dtype=dtype), *rows


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    hidden, weight = args[3:5]
    want_hidden, want_weight, want_bias = args[-N_WANT:]
    return (
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if want_hidden else hidden.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format) if want_weight else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if want_bias else 0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5])
    ctx.settings, ctx.shown = inputs[5:], [True, *(len(x) > 0 for x in output[1:])]


def _backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
    out: list[Tensor | None] = [None] * (5 + len(ctx.settings))
    if all(d is None for d in incoming):
        return tuple(out)
    d_log_probs, *more = (d if shown else None for d, shown in zip(incoming, ctx.shown, strict=True))
    hidden = ctx.saved_tensors[0]
    if d_log_probs is None:
        d_log_probs = hidden.new_zeros(ctx.saved_tensors[3].shape, dtype=wide(hidden))
    grads = torch.ops.potstill.token_logprobs_backward(d_log_probs, *more, *ctx.saved_tensors, *ctx.settings)
    for i, wanted in enumerate(ctx.settings[-N_WANT:]):
        out[i] = grads[i] if wanted else None
    return tuple(out)


register(Op("token_logprobs", f"({ARGUMENTS}) -> {RESULTS}", token_logprobs, _fake, _backward, _save))
register(
    Op(
        "token_logprobs_backward",
        f"({INCOMING}, {ARGUMENTS}) -> (Tensor d_hidden, Tensor d_weight, Tensor d_bias)",
        token_logprobs_backward, _fake_backward, no_second_derivative, None,
    )
)  # fmt: skip
