"""ALM: the likelihoods of aligned chunks, compared as coins (Minixhofer et al., "Universal Cross-Tokenizer Distillation
via Approximate Likelihood Matching", arXiv 2503.20083)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from potstill.teachers import Head
from potstill.xtok.alignment import Alignment
from potstill.xtok.chunks import at_chunk_ends, chunk_log_probs, merged_at_words, next_token_log_probs, predicted_chunks
from potstill.xtok.coins import DIVERGENCES, coins

WEIGHTS = ("chunk", "token", "log")


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
    boundary_log_probs: (student [n], teacher [m]), log-probability that a word ends behind each token, the mass of
        `VocabBytes.word_starts` in its row; that of a chunk's last token is added to the chunk, which takes out what
        the two tokenizers know of its end (outcome debiasing).
    reduction: "mean" (sum(w * l) / sum(w), or / num_items), "sum", or "none" ([C], 0 where a chunk is left out).

    Log-probs above 0 count as 0. Without chunks the loss is 0 with zero gradients.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence={divergence!r} is none of {', '.join(DIVERGENCES)}")
    if weights not in WEIGHTS or reduction not in ("mean", "sum", "none"):
        raise ValueError(f"weights={weights!r} must be one of {WEIGHTS}, reduction={reduction!r} mean, sum or none")
    if not tau > 0 or (divergence == "renyi" and (alpha <= 0 or alpha == 1)):
        raise ValueError(f"tau={tau} must be positive, alpha={alpha} positive and not 1")
    student = chunk_log_probs(student_log_probs, alignment, "student")
    teacher = chunk_log_probs(teacher_log_probs.detach(), alignment, "teacher")
    if boundary_log_probs is not None:
        ends = at_chunk_ends(boundary_log_probs, alignment)
        student, teacher = student + ends[0], teacher + ends[1].detach()
    keep = alignment.valid if chunk_mask is None else alignment.valid & chunk_mask
    tokens = (alignment.spans[:, 0, 1] - alignment.spans[:, 0, 0]).to(student.dtype)
    weight = {"chunk": torch.ones_like, "token": lambda n: n, "log": lambda n: 1 + n.clamp(min=1).log()}[weights](
        tokens
    )
    weight = torch.where(keep, weight, 0.0)
    # what is left out must not meet the formula: its bytes differ, and 0 * inf is no zero
    x, y = torch.where(keep, student, -1.0), torch.where(keep, teacher.to(student.dtype), -1.0)
    loss = weight * coins(x, y, divergence, tau, alpha)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (weight.sum().clamp(min=torch.finfo(weight.dtype).tiny) if num_items is None else num_items)


def linear_alm_loss(
    student_hidden: Tensor, student_head: Head | Tensor, student_ids: Tensor, teacher_log_probs: Tensor,
    alignment: Alignment, *, word_starts: Tensor | None = None, teacher_boundary: Tensor | None = None,
    merge_below: float | None = None, chunk_mask: Tensor | None = None, precise: bool = False,
    chunk_rows: int | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """`alm_loss` from the student's last hidden states through its head; no [tokens, vocabulary] matrix is held.

    student_hidden: [n, D] or [B, T, D] and student_ids [n] or [B, T], laid out as alignment.student_chunk: row i is the
        state at token i, which predicts token i + 1. Chunks that hold a row's first token on either side, which nothing
        predicts, are left out.
    word_starts: bool [V] of the student, and teacher_boundary [m], log-probability that a word ends behind each of the
        teacher's tokens: the ends of chunks are debiased with them, in the same read of the logits.
    merge_below: with these, chunks whose end either side gives a smaller probability are merged with the next
        (`merged_at_words`); then chunk_mask and reduction="none" do not go with it.
    precise, chunk_rows: as in `linear_distill_loss`.  Other options as in `alm_loss`.
    """
    if (word_starts is None) != (teacher_boundary is None):
        raise ValueError("word_starts and teacher_boundary go together: the student's side and the teacher's")
    found = next_token_log_probs(
        student_hidden, student_head, student_ids, alignment.student_ptr, word_starts=word_starts, precise=precise,
        chunk_rows=chunk_rows,
    )  # fmt: skip
    boundary = None
    if isinstance(found, tuple):
        assert teacher_boundary is not None
        found, ends = found
        boundary = ends, teacher_boundary
    if merge_below is not None:
        if boundary is None or chunk_mask is not None or options.get("reduction") == "none":
            raise ValueError(
                "merge_below needs word_starts and teacher_boundary, and makes other chunks than chunk_mask and "
                "reduction='none' count; merge beforehand with merged_at_words for these"
            )
        alignment = merged_at_words(alignment, boundary, merge_below)
    mask = predicted_chunks(alignment)
    mask = mask if chunk_mask is None else mask & chunk_mask
    return alm_loss(found, teacher_log_probs, alignment, chunk_mask=mask, boundary_log_probs=boundary, **options)
