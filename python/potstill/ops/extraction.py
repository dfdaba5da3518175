"""The ops of extraction: topk and linear_topk; no gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from potstill.extraction_chunks import linear_topk_rows, topk_rows
from potstill.ops.library import Op, no_second_derivative, register, side_of, wide

RESULT = "(Tensor ids, Tensor log_probs, Tensor log_rest, Tensor lse)"


def topk(logits: Tensor, k: int, side: list[float], backend: str) -> tuple[Tensor, ...]:
    return topk_rows(logits, k, side_of(side), backend)


def linear_topk(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int, side: list[float], *how: Any
) -> tuple[Tensor, ...]:
    return linear_topk_rows(hidden, weight, bias, k, side_of(side), *how)


def _fake(x: Tensor, k: int) -> tuple[Tensor, ...]:
    n, dtype = x.shape[0], wide(x)
    ids, log_probs = x.new_empty(n, k, dtype=torch.int32), x.new_empty(n, k, dtype=dtype)
    return ids, log_probs, x.new_empty(n, dtype=dtype), x.new_empty(n, dtype=dtype)


register(
    Op(
        "topk", f"(Tensor logits, int k, float[] side, str backend) -> {RESULT}", topk,
        lambda logits, k, *_: _fake(logits, k), no_second_derivative, None,
    )
)  # fmt: skip
register(
    Op(
        "linear_topk",
        "(Tensor hidden, Tensor weight, Tensor? bias, int k, float[] side, int chunk_rows, bool precise, str backend)"
        f" -> {RESULT}",
        linear_topk, lambda hidden, weight, bias, k, *_: _fake(hidden, k), no_second_derivative, None,
    )
)  # fmt: skip
