"""ALM: the likelihoods of aligned chunks, compared as coins (Minixhofer et al., "Universal Cross-Tokenizer Distillation
via Approximate Likelihood Matching", arXiv 2503.20083)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from potstill.teachers import Head
from potstill.xtok.alignment import Alignment
from potstill.xtok.at import log_probs_at

DIVERGENCES = ("forward_kl", "soft_cross_entropy", "reverse_kl", "total_variation", "renyi", "squared")
WEIGHTS = ("chunk", "token", "log")
EPS = 1e-6  # nats that keep a certain chunk a little below certain


def alm_loss(
    student_log_probs: Tensor, teacher_log_probs: Tensor, alignment: Alignment, *, divergence: str = "forward_kl",
    tau: float = 100.0, alpha: float = 2.0, weights: str = "chunk", chunk_mask: Tensor | None = None,
    boundary_log_probs: tuple[Tensor, Tensor] | None = None, num_items: float | Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Divergence between student and teacher on whether each chunk is written.

    student_log_probs: [n], log-probability of every student token given those before it (`next_token_log_probs`), rows
        one after another as in alignment.student_chunk; carries the gradient.  teacher_log_probs: [m].
    divergence: between the coins p = exp(sum of teacher log-probs / tau) and q of the student: "forward_kl",
        "soft_cross_entropy" (forward KL and the teacher's entropy), "reverse_kl", "total_variation" (|p - q|), "renyi"
        of order alpha, "squared" (half the squared difference of the logs).
    tau: in nats; math.inf is the limit of tau times the divergence, finite where all chunks are unlikely.
    weights: "chunk" (1 each), "token" (student tokens), "log" (1 + log of them).
    chunk_mask: bool [C], chunks to keep beside `alignment.valid`.
    boundary_log_probs: (student [n], teacher [m]), log-probability that a word ends behind each token; that of a
        chunk's last token is added to the chunk, which takes out what the two tokenizers know of its end.
    reduction: "mean" (sum(w * l) / sum(w), or / num_items), "sum", or "none" ([C], 0 where a chunk is left out).

    Log-probs above 0 count as 0. Without chunks the loss is 0 with zero gradients.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence={divergence!r} is none of {', '.join(DIVERGENCES)}")
    if weights not in WEIGHTS or reduction not in ("mean", "sum", "none"):
        raise ValueError(f"weights={weights!r} must be one of {WEIGHTS}, reduction={reduction!r} mean, sum or none")
    if not tau > 0 or (divergence == "renyi" and (alpha <= 0 or alpha == 1)):
        raise ValueError(f"tau={tau} must be positive, alpha={alpha} positive and not 1")
    student = _chunk_sums(student_log_probs, alignment.student_chunk, len(alignment), "student")
    teacher = _chunk_sums(teacher_log_probs.detach(), alignment.teacher_chunk, len(alignment), "teacher")
    if boundary_log_probs is not None:
        last = alignment.spans[:, :, 1] - 1
        row = torch.repeat_interleave(
            torch.arange(alignment.num_rows, device=last.device), alignment.row_ptr[1:] - alignment.row_ptr[:-1]
        )
        s_last = (last[:, 0] + alignment.student_ptr[row]).clamp(min=0)
        t_last = (last[:, 1] + alignment.teacher_ptr[row]).clamp(min=0)
        student = student + boundary_log_probs[0][s_last].clamp(max=0)
        teacher = teacher + boundary_log_probs[1].detach()[t_last].clamp(max=0)
    keep = alignment.valid if chunk_mask is None else alignment.valid & chunk_mask
    tokens = (alignment.spans[:, 0, 1] - alignment.spans[:, 0, 0]).to(student.dtype)
    weight = {"chunk": torch.ones_like, "token": lambda n: n, "log": lambda n: 1 + n.clamp(min=1).log()}[weights](
        tokens
    )
    weight = torch.where(keep, weight, 0.0)
    # what is left out must not meet the formula: its bytes differ, and 0 * inf is no zero
    x, y = torch.where(keep, student, -1.0), torch.where(keep, teacher.to(student.dtype), -1.0)
    loss = weight * (
        _limit(x, y, divergence, alpha) if math.isinf(tau) else _coins(x / tau, y / tau, divergence, alpha)
    )
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (weight.sum().clamp(min=torch.finfo(weight.dtype).tiny) if num_items is None else num_items)


def linear_alm_loss(
    student_hidden: Tensor, student_head: Head | Tensor, student_ids: Tensor, teacher_log_probs: Tensor,
    alignment: Alignment, *, precise: bool = False, **options: Any,
) -> Tensor:  # fmt: skip
    """`alm_loss` from the student's last hidden states through its head; no [tokens, vocabulary] matrix is held.

    student_hidden: [n, D] or [B, T, D] and student_ids [n] or [B, T], laid out as alignment.student_chunk: row i is the
    state at token i, which predicts token i + 1. Chunks that hold a row's first token on either side, which nothing
    predicts, are left out. Options as in `alm_loss`.
    """
    found = next_token_log_probs(student_hidden, student_head, student_ids, alignment.student_ptr, precise=precise)
    mask = predicted_chunks(alignment)
    if options.get("chunk_mask") is not None:
        mask = mask & options.pop("chunk_mask")
    options.pop("chunk_mask", None)
    return alm_loss(found, teacher_log_probs, alignment, chunk_mask=mask, **options)


def next_token_log_probs(
    hidden: Tensor, head: Head | Tensor, ids: Tensor, ptr: Tensor | None = None, *, precise: bool = False
) -> Tensor:
    """Log-probability [n] of every token given those before it; 0 for the first token of each row.

    hidden: [n, D] with ids [n] and ptr [B+1], or [B, T, D] with ids [B, T]. The state before a token predicts it.
    """
    if hidden.dim() == 3:
        ptr = torch.arange(0, ids.numel() + 1, ids.shape[1], device=ids.device)
    if ptr is None:
        raise ValueError("flat hidden states [n, D] need ptr [B+1], where each row begins")
    flat, ids = hidden.reshape(-1, hidden.shape[-1]), ids.reshape(-1)
    if len(flat) != len(ids):
        raise ValueError(f"{len(flat)} hidden states were given for {len(ids)} ids; they must be as many")
    target = torch.cat([ids[1:], ids.new_full((1,), -1)]).long() if len(ids) else ids.long()
    ends = (ptr[1:] - 1)[ptr[1:] > ptr[:-1]]
    target[ends] = -1  # the last state of a row predicts nothing of it
    found = log_probs_at(flat, head, target, precise=precise)
    return torch.cat([found.new_zeros(1), found[:-1]]) if len(ids) else found


def predicted_chunks(alignment: Alignment) -> Tensor:
    """bool [C]: the chunk holds no first token of its row, which nothing predicts."""
    return (alignment.spans[:, :, 0] > 0).all(1)


def _chunk_sums(log_probs: Tensor, chunk: Tensor, count: int, side: str) -> Tensor:
    """Sums over the tokens of each chunk, [C]."""
    flat = log_probs.reshape(-1)
    if len(flat) != len(chunk):
        raise ValueError(f"{side}_log_probs has {len(flat)} values, the alignment {len(chunk)} {side} tokens")
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32)).clamp(max=0)
    # the slot behind the last chunk takes what belongs to none
    slot = torch.where(chunk < 0, count, chunk).long()
    return flat.new_zeros(count + 1).index_add(0, slot, flat)[:count]


class _Log1mexp(torch.autograd.Function):
    """log(1 - exp(x)) for x < 0, with a slope that is right next to 0: -1 / expm1(-x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return -grad / torch.expm1(-x)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0: exact next to 0 and far from it, in value and slope."""
    return _Log1mexp.apply(x)


def _coins(x: Tensor, y: Tensor, divergence: str, alpha: float) -> Tensor:
    """Divergence of the coins q = exp(x - EPS) from p = exp(y - EPS), [C]."""
    b, a = x - EPS, y - EPS
    if divergence == "total_variation":
        return torch.maximum(a, b).exp() * -torch.expm1(-(x - y).abs())
    if divergence == "squared":
        return (x - y).square() / 2
    not_a, not_b = log1mexp(a), log1mexp(b)
    if divergence == "soft_cross_entropy":
        return -(a.exp() * b - torch.expm1(a) * not_b)
    if divergence == "forward_kl":
        return a.exp() * (y - x) - torch.expm1(a) * (not_a - not_b)
    if divergence == "reverse_kl":
        return b.exp() * (x - y) - torch.expm1(b) * (not_b - not_a)
    both = torch.logaddexp(alpha * a + (1 - alpha) * b, alpha * not_a + (1 - alpha) * not_b)
    return both / (alpha - 1)


def _limit(x: Tensor, y: Tensor, divergence: str, alpha: float) -> Tensor:
    """The limit of tau * divergence as tau grows: the coins become rates -x and -y."""
    q, p = EPS - x, EPS - y
    if divergence == "forward_kl":
        return q - p + p * (p / q).log()
    if divergence == "soft_cross_entropy":
        return q - p * q.log()
    if divergence == "reverse_kl":
        return p - q + q * (q / p).log()
    if divergence == "total_variation":
        return (p - q).abs()
    if divergence == "squared":
        return (p - q).square() / 2
    return (p**alpha * q ** (1 - alpha) - alpha * p - (1 - alpha) * q) / (alpha - 1)
