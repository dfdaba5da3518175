"""Extraction, chunk by chunk: no more than `rows` rows of logits at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from potstill import dispatch, gemm
from potstill.rows import Side

Found = tuple[Tensor, ...]


def topk_rows(
    logits: Tensor, k: int, side: Side, tokens: Tensor | None, temperatures: Sequence[float], backend: str
) -> Found:
    """logits [N, V], tokens [N] -> (ids [N, k] int32, log_probs [N, k], log_rest [N], lse [N], token_log_probs [N],
    token_ranks [N] int32, log_rest_at [N, temperatures]); the last three are empty where they were not asked for.
    """
    more = tokens is not None or len(temperatures) > 0
    facts = dispatch.Facts("topk_with" if more else "topk", logits.device, logits.dtype, logits.shape[1], k)
    with torch.autocast(logits.device.type, enabled=False), torch.no_grad():
        kernel = dispatch.select(facts, backend)
        if more:
            return kernel.run(logits, k, side, tokens, temperatures)
        found = kernel.run(logits, k, side)
        none = found[1].new_empty(0)
        return *found, none, none.to(torch.int32), none.reshape(0, 0).clone()


def sample_rows(
    logits: Tensor, n: int, side: Side, temperature: float, seed: int, first_row: int, backend: str
) -> Found:
    """logits [N, V] -> (ids [N, n] int32, counts [N, n] int32, log_probs [N, n], lse [N])."""
    facts = dispatch.Facts("sample", logits.device, logits.dtype, logits.shape[1])
    with torch.autocast(logits.device.type, enabled=False), torch.no_grad():
        return dispatch.select(facts, backend).run(logits, n, side, temperature, seed, first_row)


def linear_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: int, precise: bool
) -> Iterator[tuple[slice, Tensor]]:
    """(rows of the chunk, logits [R, V]) for hidden [N, D], weight [V, D]: one buffer, at least one chunk."""
    how = gemm.plan(hidden.device, hidden.dtype, precise)
    rows = rows or gemm.chunk_rows(hidden.device, len(weight), how.logit_dtype)
    buffer = torch.empty((min(rows, len(hidden)), len(weight)), dtype=how.logit_dtype, device=hidden.device)
    for start in range(0, max(1, len(hidden)), rows):
        h = hidden[start : start + rows]
        gemm.logits_into(buffer[: len(h)], h, weight, bias, how)
        yield slice(start, start + len(h)), buffer[: len(h)]


def linear_extract(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: int, precise: bool,
    extract: Callable[[slice, Tensor], Found],
) -> Found:  # fmt: skip
    """The results of `extract(rows of the chunk, logits)`, joined."""
    with torch.autocast(hidden.device.type, enabled=False), torch.no_grad():
        found = [extract(piece, logits) for piece, logits in linear_chunks(hidden, weight, bias, rows, precise)]
        return tuple(torch.cat(x) for x in zip(*found, strict=True))
