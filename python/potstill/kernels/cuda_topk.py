"""Extraction by the CUDA C++ kernel (csrc/topk.cu): one read of the logits. Not yet timed on a card."""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.dispatch import Facts, register
from potstill.kernels import cuda
from potstill.rows import Side

COLUMNS = 2**30


def refuses(facts: Facts) -> str | None:
    """None, or why the kernel does not serve the call."""
    if facts.columns > COLUMNS:
        return f"serves at most {COLUMNS} columns, not {facts.columns}"
    if facts.k > 1024:
        return f"serves k up to 1024, not {facts.k}"
    return cuda.refuses(facts)


@register("topk", "cuda", rank=80, refuses=refuses)
def topk(logits: Tensor, k: int, side: Side) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits [R, V] -> (ids [R, k] int32, log_probs [R, k], log_rest [R], lse [R]), fp32."""
    x = cuda._unit_columns(logits)
    ids = torch.empty(len(x), k, dtype=torch.int32, device=x.device)
    log_probs = torch.empty(len(x), k, dtype=torch.float32, device=x.device)
    log_rest, lse = log_probs.new_empty(len(x)), log_probs.new_empty(len(x))
    with torch.cuda.device_of(x):
        cuda._cuda.topk(
            len(x), cuda._side(x, side), k, ids.data_ptr(), log_probs.data_ptr(), log_rest.data_ptr(), lse.data_ptr(),
            0, 0, 0, [], 0, cuda.stream_of(x),
        )  # fmt: skip
    return ids, log_probs, log_rest, lse
