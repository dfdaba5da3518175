"""Chunks as the losses see them: their log-likelihoods, where words end, and neighbours taken together."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from potstill import ops  # noqa: F401  registers torch.ops.potstill
from potstill.teachers import Head
from potstill.tokens import TokenLogprobs, token_logprobs
from potstill.xtok.alignment import Alignment

NO_TOKEN = -100


def chunk_log_probs(log_probs: Tensor, alignment: Alignment, side: str = "student", *, backend: str = "auto") -> Tensor:
    """Log-likelihood [C] of every chunk: the sum over its tokens, with gradient.

    log_probs: [n] of every token of that side given those before it, laid out as `alignment.student_chunk` or
    `teacher_chunk`; fp64 stays, all else becomes fp32. Values above 0 count 0 and get no gradient, as special tokens
    inside a chunk. Equals `zeros(C).index_add(0, chunk[inside], torch.where(log_probs > 0, 0, log_probs)[inside])` with
    `inside = chunk >= 0`.
    """
    chunk = alignment.student_chunk if side == "student" else alignment.teacher_chunk
    flat = log_probs.reshape(-1)
    if len(flat) != len(chunk):
        raise ValueError(f"{side}_log_probs has {len(flat)} values, the alignment {len(chunk)} {side} tokens")
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    ranges = alignment.token_ranges()[0 if side == "student" else 1]
    return torch.ops.potstill.chunk_sums(flat, chunk, ranges[:, 0].contiguous(), ranges[:, 1].contiguous(), backend)


def next_token_log_probs(
    hidden: Tensor, head: Head | Tensor, ids: Tensor, ptr: Tensor | None = None, *, word_starts: Tensor | None = None,
    precise: bool = False, chunk_rows: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Log-probability [n] of every token given those before it; 0 for the first token of each row.

    hidden: [n, D] with ids [n] and ptr [B+1], or [B, T, D] with ids [B, T]. The state before a token predicts it.
    word_starts: bool [V], the ids that begin a word (`VocabBytes.word_starts`): also return [n], the log-probability
        that a word ends behind each token, which is their mass in the row of that token.
    """
    if hidden.dim() == 3:
        ptr = torch.arange(0, ids.numel() + 1, max(ids.shape[1], 1), device=ids.device)
    if ptr is None:
        raise ValueError("flat hidden states [n, D] need ptr [B+1], where each row begins")
    flat, ids = hidden.reshape(-1, hidden.shape[-1]), ids.reshape(-1).long()
    if len(flat) != len(ids):
        raise ValueError(f"{len(flat)} hidden states were given for {len(ids)} ids; they must be as many")
    ends = (ptr[1:] - 1)[ptr[1:] > ptr[:-1]]
    target = torch.cat([ids[1:], ids[:1]])
    # the last state of a row predicts nothing of it; its row is looked at for the end of a word alone
    target[ends] = NO_TOKEN if word_starts is None else 0
    found = token_logprobs(flat, head, target, subset=word_starts, precise=precise, chunk_rows=chunk_rows)
    log_probs = found.log_probs if isinstance(found, TokenLogprobs) else found
    shifted = torch.cat([log_probs.new_zeros(1), log_probs[:-1]])[: len(ids)]
    first = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    first[ptr[:-1][ptr[1:] > ptr[:-1]]] = True
    shifted = torch.where(first, 0.0, shifted)
    if not isinstance(found, TokenLogprobs):
        return shifted
    assert found.log_mass is not None
    return shifted, found.log_mass


def predicted_chunks(alignment: Alignment) -> Tensor:
    """bool [C]: the chunk holds no first token of its row, which nothing predicts."""
    return (alignment.spans[:, :, 0] > 0).all(1)


def at_chunk_ends(boundary: tuple[Tensor, Tensor], alignment: Alignment) -> tuple[Tensor, Tensor]:
    """(student [C], teacher [C]): what stands at the last token of each chunk, at most 0; of `boundary`, the
    log-probability that a word ends behind each token, (student [n], teacher [m])."""
    ranges = alignment.token_ranges()
    student, teacher = (
        values.reshape(-1)[(own[:, 1] - 1).clamp(min=0)].clamp(max=0)
        for values, own in zip(boundary, ranges, strict=True)
    )
    return student, teacher


def merged_at_words(alignment: Alignment, boundary: tuple[Tensor, Tensor], threshold: float = 0.1) -> Alignment:
    """Neighbouring chunks taken together until both sides hold it likely that a word ends there.

    boundary: as in `at_chunk_ends`.  threshold: the least probability. Chunks then end where neither tokenizer knows
    more of the end than the text says. See `Alignment.merged`.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold} is a probability, 0 to 1")
    student, teacher = at_chunk_ends(boundary, alignment)
    least = math.log(threshold) if threshold > 0 else -math.inf
    return alignment.merged((student.detach() >= least) & (teacher.detach() >= least))
