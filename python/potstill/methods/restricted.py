"""Distillation over a few entries of the vocabulary: a head of some rows, and yes/no probabilities as soft targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from potstill.arguments import promote
from potstill.methods.hidden import reduced, wide
from potstill.teachers import Head


def restrict(head: Head | Tensor, ids: Tensor | Sequence[int]) -> Head:
    """The head of some entries of the vocabulary alone, in the order of `ids`: softmax over it renormalises.

    head: Head, or its weight [V, D].  ids: int [C], each below the vocabulary size and given once.
    The rows are copies ([C, D]) and pass their gradient on to the whole weight and bias. Give both sides of a loss
    heads restricted to the same ids, and labels as places in `ids`.
    Logits equal `logits[..., ids]` of the whole head. Raises ValueError for ids out of range or given twice.
    """
    head = head if isinstance(head, Head) else Head(head)
    if head.group is not None:
        raise ValueError("the head is a shard of the vocabulary; restrict takes a whole head")
    at = torch.as_tensor(ids, dtype=torch.int64)
    size = head.side.vocab_size
    if at.dim() != 1 or not len(at) or int(at.min()) < 0 or int(at.max()) >= size:
        raise ValueError(f"ids must be a list of ids in 0..{size - 1}, not {at.tolist()}")
    if len(at.unique()) != len(at):
        raise ValueError(f"ids {at.tolist()} name an entry twice; give each once")
    at = at.to(head.weight.device)
    bias = None if head.bias is None else head.bias.index_select(0, at)
    return replace(head, weight=head.weight.index_select(0, at), bias=bias, vocab_size=len(at))


def binary_logits(hidden: Tensor, head: Head | Tensor, yes: int, no: int) -> Tensor:
    """z_yes - z_no [...], with gradient: sigmoid of it is the probability of yes among the two.

    hidden: [..., D].  head: Head, or its weight [V, D]; only its two rows are read. fp32 (fp64 for fp64).
    Equals `logits[..., yes] - logits[..., no]`, and its sigmoid `logits[..., [yes, no]].softmax(-1)[..., 0]`.
    """
    two = restrict(head, [yes, no])
    x, weight, bias = promote(hidden, two)
    z = F.linear(wide(x), wide(weight), None if bias is None else wide(bias)) * two.logit_scale
    if two.softcap is not None:
        z = two.softcap * torch.tanh(z / two.softcap)
    return z[..., 0] - z[..., 1]


def binary_loss(
    logits: Tensor, targets: Tensor, *, entropy: bool = True, token_weights: Tensor | None = None,
    reduction: str = "mean", num_items: int | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """-(p log q + (1 - p) log(1 - q)), q = sigmoid(logits): binary cross-entropy with soft targets.

    logits: [...], of one entry against another (`binary_logits`) or of a classifier.  targets: [...] in 0..1.
    entropy: True is the cross-entropy, `F.binary_cross_entropy_with_logits(logits, targets)`; False takes the targets'
        entropy off, which gives KL(p || q): 0 where both agree, and the same gradient.
    token_weights, reduction, num_items: as in `linear_distill_loss`.
    """
    if targets.shape != logits.shape:
        raise ValueError(f"targets has shape {list(targets.shape)}; logits has {list(logits.shape)}")
    z, p = wide(logits), wide(targets.detach()).to(wide(logits).dtype)
    weights = torch.ones_like(z) if token_weights is None else token_weights.to(z.dtype)
    if weights.shape != z.shape:
        raise ValueError(f"token_weights has shape {list(weights.shape)}; logits has {list(z.shape)}")
    z, p = torch.where(weights != 0, z, 0.0), torch.where(weights != 0, p, 0.5)
    rows = F.softplus(-z) * p + F.softplus(z) * (1 - p)
    if not entropy:
        rows = rows + torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)
    return reduced(rows, weights, reduction, num_items)


def yes_probability(hidden: Tensor, head: Head | Tensor, yes: int, no: int) -> Tensor:
    """softmax([z_yes, z_no])_yes [...] without gradient: a teacher's answer, to keep or to distil."""
    with torch.no_grad():
        return binary_logits(hidden, head, yes, no).sigmoid()
