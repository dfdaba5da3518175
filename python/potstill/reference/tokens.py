"""What is asked about given tokens of each row, in plain torch, with the gradient by the raw logits."""

from __future__ import annotations

import torch
from torch import Tensor

from potstill.dispatch import register
from potstill.reference.rows import NEG_INF, apply_side, serves_all
from potstill.rows import Side


@register("token_rows", "torch", rank=0, refuses=serves_all)
def token_rows(
    logits: Tensor, tokens: Tensor, subset: Tensor | None, entropy: bool, side: Side,
    incoming: tuple[Tensor, Tensor | None, Tensor | None] | None = None, grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """logits [R, V], tokens [R, K], subset [V] bool -> (log_probs [R, K], entropy [R], log mass of the subset [R]).

    What was not asked for comes back empty. A negative token gives 0 and no gradient; a row that has only such is not
    looked at: results 0, gradient 0.
    grad [R, V], if given, receives sum(incoming * results) by the raw logits; it may be `logits` itself.
    """
    z, chain = apply_side(logits, side)
    given = tokens >= 0
    live, index = given.any(-1), torch.where(given, tokens, 0)
    lp = torch.log_softmax(z, -1)
    p, bounded = lp.exp(), lp.clamp(min=-1e4)  # 0 * bounded is 0
    h = -(p * bounded).sum(-1)
    inside = None if subset is None else z.masked_fill(~subset[: z.shape[1]], NEG_INF)
    mass = None if inside is None else inside.logsumexp(-1) - z.logsumexp(-1)
    if incoming is not None and grad is not None:
        g = torch.where(given, incoming[0], 0.0).to(z.dtype)
        g_entropy, g_mass = (z.new_zeros(len(z), 1) if x is None else x[:, None].to(z.dtype) for x in incoming[1:])
        dz = -p * (g.sum(-1, keepdim=True) + g_entropy * (bounded + h[:, None]) + g_mass)
        dz.scatter_add_(1, index, g)
        if inside is not None:
            dz += torch.where(inside == NEG_INF, 0.0, g_mass * (inside - inside.logsumexp(-1, keepdim=True)).exp())
        grad[:, : z.shape[1]] = torch.where(live[:, None], dz * chain, 0.0).to(grad.dtype)
        grad[:, z.shape[1] :] = 0
    empty = z.new_empty(0)
    return (
        torch.where(given, lp.gather(1, index), 0.0),
        torch.where(live, h, 0.0) if entropy else empty,
        empty.clone() if mass is None else torch.where(live, mass, 0.0),
    )
