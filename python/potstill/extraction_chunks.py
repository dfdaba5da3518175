"""Extraction, chunk by chunk: no more than `rows` rows of logits at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from potstill import dispatch, gemm
from potstill.rows import Side


def topk_rows(logits: Tensor, k: int, side: Side, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits [N, V] -> (ids [N, k] int32, log_probs [N, k], log_rest [N], lse [N])."""
    facts = dispatch.Facts("topk", logits.device, logits.dtype, logits.shape[1], k)
    with torch.autocast(logits.device.type, enabled=False), torch.no_grad():
        return dispatch.select(facts, backend).run(logits, k, side)


def linear_topk_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int, side: Side, rows: int, precise: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [N, D], weight [V, D] -> as topk_rows, one chunk of logits at a time."""
    with torch.autocast(hidden.device.type, enabled=False), torch.no_grad():
        how = gemm.plan(hidden.device, hidden.dtype, precise)
        rows = rows or gemm.chunk_rows(hidden.device, len(weight), how.logit_dtype)
        buffer = torch.empty((min(rows, len(hidden)), len(weight)), dtype=how.logit_dtype, device=hidden.device)
        found = []
        for start in range(0, max(1, len(hidden)), rows):
            h = hidden[start : start + rows]
            gemm.logits_into(buffer[: len(h)], h, weight, bias, how)
            found.append(topk_rows(buffer[: len(h)], k, side, backend))
        ids, log_probs, log_rest, lse = (torch.cat(x) for x in zip(*found, strict=True))
        return ids, log_probs, log_rest, lse
