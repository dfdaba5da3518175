"""The log-probability of given tokens through a head, without the logits of all rows."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from potstill import ops  # noqa: F401  registers torch.ops.potstill
from potstill.arguments import promote, rows_or_budget
from potstill.extraction import flat_tokens
from potstill.teachers import Head, describe


class TokenLogprobs(NamedTuple):
    """log_probs [...] or [..., K]; entropy [...] and log_mass [...] in nats, or None where they were not asked for."""

    log_probs: Tensor
    entropy: Tensor | None
    log_mass: Tensor | None


def token_logprobs(
    hidden: Tensor, head: Head | Tensor, ids: Tensor, *, entropy: bool = False, subset: Tensor | None = None,
    chunk_rows: int | None = None, precise: bool = False, backend: str = "auto",
) -> Tensor | TokenLogprobs:  # fmt: skip
    """The log-probability of given tokens at T = 1, with gradient; no [rows, V] matrix is ever held.

    hidden: [..., D] fp64, fp32, bf16 or fp16.  head: Head, or its weight [V, D].
    ids: [...], or [..., K] for several a row, int64 or int32, 0..V-1; -100 gives 0 and no gradient, and rows that have
        nothing else are left out: every result 0, no gradient.
    entropy: also return the entropy of each row, in nats.
    subset: bool [V]: also return the log of the probability mass of these entries (-inf for none).
    chunk_rows, precise, backend: as in `linear_distill_loss`.

    Returns fp32 (fp64 for fp64) in the shape of ids, or TokenLogprobs where entropy or subset was asked for; every
    part has a gradient for hidden, weight and bias (a second derivative raises). Equals, with z the logits of the head
    in fp32, `z.log_softmax(-1).gather(-1, ids[..., None])[..., 0]`,
    `torch.distributions.Categorical(logits=z).entropy()` and
    `z.log_softmax(-1)[..., subset].logsumexp(-1)`. The backward computes the chunks again.
    Raises TypeError or ValueError naming the argument, what it was and what is accepted.
    """
    head = head if isinstance(head, Head) else Head(head)
    x, weight, bias = promote(hidden, head)
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden has shape {list(x.shape)}; its last size must be the head's D = {weight.shape[1]}")
    side, lead = head.side, x.shape[:-1]
    if subset is not None and (not isinstance(subset, Tensor) or subset.dtype != torch.bool):
        raise TypeError(f"subset must be a bool tensor [{side.vocab_size}], not {describe(subset)}")
    if subset is not None and (subset.shape != (side.vocab_size,) or subset.device != x.device):
        raise ValueError(
            f"subset has shape {list(subset.shape)} on {subset.device}; it must be [{side.vocab_size}], one flag an "
            f"entry of the vocabulary, on {x.device}"
        )
    grad = torch.is_grad_enabled()
    several = isinstance(ids, Tensor) and ids.shape[:-1] == lead and ids.dim() == x.dim()
    shape = ids.shape if several else lead
    tokens = flat_tokens("ids", ids, shape, x.device, side.vocab_size)
    found = torch.ops.potstill.token_logprobs(
        x.reshape(-1, x.shape[-1]), weight, bias, tokens.reshape(math.prod(lead), shape[-1] if several else 1), subset,
        entropy, [float(side.vocab_size), side.scale, side.softcap], rows_or_budget(chunk_rows), precise, backend,
        grad and x.requires_grad, grad and weight.requires_grad, grad and bias is not None and bias.requires_grad,
    )  # fmt: skip
    log_probs = found[0].reshape(shape)
    if not entropy and subset is None:
        return log_probs
    return TokenLogprobs(
        log_probs, found[1].reshape(lead) if entropy else None, None if subset is None else found[2].reshape(lead)
    )
