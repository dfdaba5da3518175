"""Speculative decoding: how often a draft is accepted, what that is worth, and the sampling itself to check it by."""

from __future__ import annotations

import torch
from torch import Tensor


def acceptance(draft_logits: Tensor, target_logits: Tensor) -> Tensor:
    """sum_v min(p, q) = 1 - TVD(p, q) at each position, [...]: the chance that the target accepts the draft's token.

    logits: [..., V] both. The metric "acceptance" of `linear_distill_loss` is this without the logits of all rows.
    arXiv:2211.17192, arXiv:2310.08461 (DistillSpec; the identity is checked by sampling).
    """
    p, q = target_logits.softmax(-1), draft_logits.softmax(-1)
    return torch.minimum(p, q).sum(-1)


def block_tokens(alpha: float, gamma: int) -> float:
    """Expected tokens of a round of gamma drafted, alpha the chance of each: (1 - alpha^(gamma+1)) / (1 - alpha)."""
    if not 0 <= alpha <= 1 or gamma < 0:
        raise ValueError(f"alpha={alpha} must lie in [0, 1] and gamma={gamma} be at least 0")
    return gamma + 1.0 if alpha == 1 else (1 - alpha ** (gamma + 1)) / (1 - alpha)


def speed_up(alpha: float, gamma: int, cost: float) -> float:
    """block_tokens / (gamma * cost + 1): time without drafting over time with. cost: a draft step / a target step."""
    return block_tokens(alpha, gamma) / (gamma * cost + 1)


def verify_draft(
    drafted: Tensor, draft_probs: Tensor, target_probs: Tensor, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """One round of speculative sampling for B sequences: the tokens then have the target's distribution.

    drafted: [B, G] int64, drawn from draft_probs [B, G, V]; target_probs: [B, G + 1, V], one position more.
    Returns (accepted [B], how many drafted tokens are kept; token [B], the one that follows them: from the normalised
    max(0, p - q) where a draft was rejected, from p behind the last where none was).
    """
    b, g = drafted.shape
    if draft_probs.shape[:2] != (b, g) or target_probs.shape[:2] != (b, g + 1):
        raise ValueError(
            f"drafted {list(drafted.shape)} needs draft_probs [B, G, V] and target_probs [B, G + 1, V], not "
            f"{list(draft_probs.shape)} and {list(target_probs.shape)}"
        )
    at = drafted[..., None]
    p, q = target_probs[:, :g].gather(-1, at)[..., 0], draft_probs.gather(-1, at)[..., 0]
    uniform = torch.rand(p.shape, generator=generator, device=p.device, dtype=p.dtype)
    kept = (uniform * q < p).long().cumprod(1)
    accepted = kept.sum(1)
    row = torch.arange(b, device=drafted.device)
    behind = target_probs[row, accepted]
    padded = torch.cat([draft_probs, torch.zeros_like(target_probs[:, :1])], 1)  # nothing was drafted behind the last
    left = (behind - padded[row, accepted]).clamp(min=0)
    left = torch.where(left.sum(-1, keepdim=True) > 0, left, behind)  # p = q but for rounding
    return accepted, torch.multinomial(left, 1, generator=generator)[:, 0]
