"""Top-k extraction with the log-sum-exp: logits, or hidden states through a head, to TopK."""

from __future__ import annotations

import torch
from torch import Tensor

from potstill import ops  # noqa: F401  registers torch.ops.potstill
from potstill.arguments import promote, rows_or_budget
from potstill.rows import Side
from potstill.teachers import Head, TopK, describe

MAX_K = 1024


def topk(logits: Tensor, k: int, *, vocab_size: int | None = None, backend: str = "auto") -> TopK:
    """The k most probable entries of each row, with the truth about the rest, in one read of the logits.

    logits: [..., V] fp64, fp32, bf16 or fp16; columns from `vocab_size` on are padding.  k: 1..min(V, 1024).

    Returns TopK(ids int32 [..., k], log_probs [..., k], log_rest [...], lse [...]), fp32 (fp64 for fp64 logits):
    `ids` as `torch.sort(logits.float(), stable=True, descending=True)` gives them (ties to the lowest id; NaN sorts
    first and makes its row's log_probs, log_rest and lse NaN; -inf last), `log_probs = logits[ids] - lse`,
    `lse = logits.float().logsumexp(-1)` and log_rest = log-sum-exp of the other entries - lse, summed directly.
    No gradient. Raises TypeError or ValueError naming the argument and what is accepted.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() < 1:
        raise TypeError(f"logits must be a floating-point tensor [..., V], not {describe(logits)}")
    columns = logits.shape[-1]
    if vocab_size is not None and not 1 <= vocab_size <= columns:
        raise ValueError(f"vocab_size={vocab_size} is outside 1..{columns}, the columns of logits")
    side = Side(columns if vocab_size is None else vocab_size)
    _check_k(k, side)
    found = torch.ops.potstill.topk(logits.detach().reshape(-1, columns), k, _numbers(side), backend)
    return _shaped(found, logits.shape[:-1], k)


def linear_topk(
    hidden: Tensor, head: Head | Tensor, k: int, *, chunk_rows: int | None = None, precise: bool = False,
    backend: str = "auto",
) -> TopK:  # fmt: skip
    """topk(hidden @ weight.T, k) through a Head, holding at most `chunk_rows` rows of logits.

    hidden: [..., D].  head: Head (bias, scale, softcap and padding apply), or its weight [V, D].  Other arguments and
    the result as in `topk` and `linear_distill_loss`.
    """
    head = head if isinstance(head, Head) else Head(head)
    x, weight, bias = promote(hidden, head)
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden has shape {list(x.shape)}; its last size must be the head's D = {weight.shape[1]}")
    _check_k(k, head.side)
    found = torch.ops.potstill.linear_topk(
        x.detach().reshape(-1, x.shape[-1]), weight.detach(), None if bias is None else bias.detach(), k,
        _numbers(head.side), rows_or_budget(chunk_rows), precise, backend,
    )  # fmt: skip
    return _shaped(found, x.shape[:-1], k)


def _numbers(side: Side) -> list[float]:
    return [float(side.vocab_size), side.scale, side.softcap]


def _check_k(k: int, side: Side) -> None:
    if not isinstance(k, int) or not 1 <= k <= min(MAX_K, side.vocab_size):
        raise ValueError(f"k={k!r} is outside 1..{min(MAX_K, side.vocab_size)} (the vocabulary has {side.vocab_size})")


def _shaped(found: tuple[Tensor, Tensor, Tensor, Tensor], lead: torch.Size, k: int) -> TopK:
    ids, log_probs, log_rest, lse = found
    return TopK(ids.reshape(*lead, k), log_probs.reshape(*lead, k), log_rest.reshape(lead), lse.reshape(lead))
