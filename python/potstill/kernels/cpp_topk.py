"""Extraction by the C++ kernels. CPU only."""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.dispatch import register
from potstill.kernels.cpp import _cpp, dense_columns, refuses, side_numbers
from potstill.rows import Side


@register("topk", "cpp", rank=50, refuses=refuses)
def topk(logits: Tensor, k: int, side: Side) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits [R, V] -> (ids [R, k] int32, log_probs [R, k], log_rest [R], lse [R])."""
    x = dense_columns(logits)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    ids = torch.empty(len(x), k, dtype=torch.int32)
    log_probs, (log_rest, lse) = torch.empty(len(x), k, dtype=wide), torch.empty(2, len(x), dtype=wide)
    _cpp.topk(
        len(x), side_numbers(x, side), k, ids.data_ptr(), log_probs.data_ptr(), log_rest.data_ptr(), lse.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return ids, log_probs, log_rest.clone(), lse.clone()
