"""Extraction by the CUDA C++ kernel (csrc/topk.cu): one read of the logits. Not yet timed on a card."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from potstill.dispatch import Facts, register
from potstill.kernels import cuda
from potstill.rows import Side

COLUMNS, K = 2**30, 1024
TEMPERATURES = 4  # of one launch


def refuses(facts: Facts) -> str | None:
    """None, or why the kernel does not serve the call."""
    if facts.columns > COLUMNS:
        return f"serves at most {COLUMNS} columns, not {facts.columns}"
    if facts.k > K:
        return f"serves k up to {K}, not {facts.k}"
    return cuda.refuses(facts)


@register("topk", "cuda", rank=80, refuses=refuses)
def topk(logits: Tensor, k: int, side: Side) -> tuple[Tensor, ...]:
    """logits [R, V] -> (ids [R, k] int32, log_probs [R, k], log_rest [R], lse [R]), fp32."""
    return topk_with(logits, k, side, None, ())[:4]


@register("topk_with", "cuda", rank=80, refuses=refuses)
def topk_with(
    logits: Tensor, k: int, side: Side, tokens: Tensor | None, temperatures: Sequence[float]
) -> tuple[Tensor, ...]:
    """The same with tokens [R] (negative: none) -> log-probability [R] and rank [R] int32; and log_rest_at [R, T].

    One read of the logits for every 4 temperatures.
    """
    x = cuda._unit_columns(logits)
    rows, given = len(x), 0 if tokens is None else len(x)
    tokens = None if tokens is None else tokens.long().contiguous()
    ids = torch.empty(rows, k, dtype=torch.int32, device=x.device)
    log_probs = torch.empty(rows, k, dtype=torch.float32, device=x.device)
    log_rest, lse = log_probs.new_empty(rows), log_probs.new_empty(rows)
    token_log_probs, ranks = lse.new_empty(given), ids.new_empty(given)
    at = lse.new_empty(len(temperatures), rows if len(temperatures) else 0)
    with torch.cuda.device_of(x):
        for start in range(0, max(1, len(temperatures)), TEMPERATURES):
            some = [float(t) for t in temperatures[start : start + TEMPERATURES]]
            cuda._cuda.topk(
                rows, cuda._side(x, side), k, ids.data_ptr(), log_probs.data_ptr(), log_rest.data_ptr(), lse.data_ptr(),
                cuda._address(tokens), token_log_probs.data_ptr(), ranks.data_ptr(),
                some, at[start].data_ptr() if some else 0, cuda.stream_of(x),
            )  # fmt: skip
    return ids, log_probs, log_rest, lse, token_log_probs, ranks, at.t().contiguous()
