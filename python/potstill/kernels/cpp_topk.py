"""Extraction by the C++ kernels: top-k, draws, and what is asked about given tokens. CPU only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from potstill.dispatch import register
from potstill.kernels.cpp import _address, _cpp, dense_columns, refuses, side_numbers
from potstill.rows import Side


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@register("topk", "cpp", rank=50, refuses=refuses)
def topk(logits: Tensor, k: int, side: Side) -> tuple[Tensor, ...]:
    """logits [R, V] -> (ids [R, k] int32, log_probs [R, k], log_rest [R], lse [R])."""
    return topk_with(logits, k, side, None, ())[:4]


@register("topk_with", "cpp", rank=50, refuses=refuses)
def topk_with(
    logits: Tensor, k: int, side: Side, tokens: Tensor | None, temperatures: Sequence[float]
) -> tuple[Tensor, ...]:
    """The same with tokens [R] (negative: none) -> log-probability [R] and rank [R] int32; and log_rest_at [R, T]."""
    x, dtype = dense_columns(logits), _wide(logits)
    rows, given = len(x), 0 if tokens is None else len(x)
    tokens = torch.empty(0, dtype=torch.int64) if tokens is None else tokens.long().contiguous()
    ids, log_probs = torch.empty(rows, k, dtype=torch.int32), torch.empty(rows, k, dtype=dtype)
    log_rest, lse = torch.empty(rows, dtype=dtype), torch.empty(rows, dtype=dtype)
    token_log_probs, ranks = torch.empty(given, dtype=dtype), torch.empty(given, dtype=torch.int32)
    at = torch.empty(len(temperatures), rows if temperatures else 0, dtype=dtype)
    _cpp.topk(
        rows, side_numbers(x, side), k, ids.data_ptr(), log_probs.data_ptr(), log_rest.data_ptr(), lse.data_ptr(),
        _address(tokens), _address(token_log_probs), _address(ranks), list(temperatures), _address(at),
        torch.get_num_threads(),
    )  # fmt: skip
    return ids, log_probs, log_rest, lse, token_log_probs, ranks, at.t().contiguous()


@register("sample", "cpp", rank=50, refuses=refuses)
def sample(
    logits: Tensor, n: int, side: Side, temperature: float, seed: int, first_row: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits [R, V] -> (ids [R, n] int32, counts [R, n] int32, log_probs [R, n], lse [R])."""
    x, dtype = dense_columns(logits), _wide(logits)
    ids, counts = torch.empty(len(x), n, dtype=torch.int32), torch.empty(len(x), n, dtype=torch.int32)
    log_probs, lse = torch.empty(len(x), n, dtype=dtype), torch.empty(len(x), dtype=dtype)
    _cpp.sample_rows(
        len(x), side_numbers(x, side), n, temperature, seed, first_row, ids.data_ptr(), counts.data_ptr(),
        log_probs.data_ptr(), lse.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return ids, counts, log_probs, lse


@register("token_rows", "cpp", rank=50, refuses=refuses)
def token_rows(
    logits: Tensor, tokens: Tensor, subset: Tensor | None, entropy: bool, side: Side,
    incoming: tuple[Tensor, Tensor | None, Tensor | None] | None = None, grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See reference/tokens.py. logits [R, V], tokens [R, K], subset [V] -> log_probs [R, K], entropy, mass [R]."""
    x, dtype, rows = dense_columns(logits), _wide(logits), len(logits)
    none, tokens = torch.empty(0, dtype=dtype), tokens.long().contiguous()
    log_probs, h = torch.empty(tokens.shape, dtype=dtype), torch.empty(rows if entropy else 0, dtype=dtype)
    mass = torch.empty(0 if subset is None else rows, dtype=dtype)
    chosen = torch.empty(0, dtype=torch.bool) if subset is None else subset.contiguous()
    coming = [none if c is None else c.to(dtype).contiguous() for c in incoming or (None, None, None)]
    target = none if grad is None else grad
    if grad is not None and (grad.dtype != x.dtype or grad.stride(-1) != 1):
        target = torch.empty_like(x, memory_format=torch.contiguous_format)
    _cpp.token_rows(
        rows, x.shape[1], side_numbers(x, side), tokens.data_ptr(), tokens.shape[1], _address(chosen),
        (log_probs.data_ptr(), _address(h), _address(mass), 0),
        (_address(coming[0]), _address(coming[1]), _address(coming[2])),
        _address(target), target.stride(0), torch.get_num_threads(),
    )  # fmt: skip
    if grad is not None and target is not grad:
        grad.copy_(target)
    return log_probs, h, mass


def log_sum_exp(logits: Tensor, side: Side) -> Tensor:
    """logits [R, V] -> their log-sum-exp [R] (benchmarks and tests)."""
    x = dense_columns(logits)
    lse = torch.empty(len(x), dtype=_wide(x))
    _cpp.token_rows(
        len(x), x.shape[1], side_numbers(x, side), 0, 0, 0, (0, 0, 0, lse.data_ptr()), (0, 0, 0), 0, 0,
        torch.get_num_threads(),
    )  # fmt: skip
    return lse
