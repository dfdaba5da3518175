"""Losses between relations of tokens: Gram matrices, attention maps, self-relations, products of neighbours.

They compare how the tokens of a sequence stand to each other, so that student and teacher may differ in width. No
[positions, positions] matrix is held by gram_loss and relation_kl, no [tokens, vocabulary] matrix by span_product_loss.
The teacher's side never receives a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from potstill import gemm
from potstill.arguments import check_choice, promote, row_coefficients
from potstill.divergences import Divergence
from potstill.losses import distill_loss
from potstill.methods.gram import gram
from potstill.methods.hidden import reduced, unit, wide
from potstill.methods.self_relation import relation_sum
from potstill.reference.rows import apply_side
from potstill.rows import Side
from potstill.teachers import Head, HiddenTeacher, LogitsTeacher


def gram_loss(
    student: Tensor, teacher: Tensor, *, distance: str = "squared", normalize: bool = False,
    token_weights: Tensor | None = None, entries: str = "mean", reduction: str = "mean", form: str = "auto",
    tile_rows: int = 256,
) -> Tensor:  # fmt: skip
    """The distance of the Gram matrices S S^T and T T^T over the positions of each sequence.

    student: [..., N, D_s] fp64, fp32, bf16 or fp16.  teacher: [..., N, D_t]; N positions, the same leading shape.
    distance: "squared", the squared Frobenius norm of S S^T - T T^T (OPTIN, arXiv:2403.17921, read in the authors'
        code); "l1", the sum of its absolute entries (DSCLoRA's affinity term: second hand, its form from memory);
        "cosine", 1 minus the cosine of the two matrices as vectors, 1 where one is 0 (LLaVA-KD, arXiv:2410.16236: the
        matrices read in the authors' code, 1 - cos from memory).
    normalize: divide each row by its length first, so that entries are cosines.
    token_weights: [..., N] multiplies rows of both sides (after normalisation): a bool mask leaves positions out.
    entries: "sum" over the N^2 pairs, or "mean": divided by the number of pairs of positions with weight. Of no meaning
        for "cosine".
    reduction: over sequences that have a position with weight: "mean", "sum" or "none" ([...]).
    form: "tiles" makes `tile_rows` rows of both matrices at a time (N^2 D work, no cancellation), "moments" uses
        |S S^T|^2 = |S^T S|^2 (N D^2 work, in fp64; not for "l1"), "auto" takes the cheaper one.

    Peak memory grows with N D + tile_rows N, or N D + D^2, never with N^2. Products are in fp32 (fp64 for fp64 and for
    "moments"), sums in fp64. Equals, for one sequence, `(s @ s.T - t @ t.T).square().sum()` and its kin.
    A second derivative raises.
    """
    if student.dim() < 2 or teacher.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"student has shape {list(student.shape)} and teacher {list(teacher.shape)}; [..., N, D] is needed, alike "
            "in all but the last size"
        )
    check_choice("entries", entries, ("mean", "sum"))
    lead = student.shape[:-2]
    s, t = wide(student), wide(teacher.detach()).to(wide(student).dtype)
    weights = torch.ones(s.shape[:-1], dtype=s.dtype, device=s.device)
    if token_weights is not None:
        if token_weights.shape != s.shape[:-1]:
            raise ValueError(f"token_weights has shape {list(token_weights.shape)}; it must be {list(s.shape[:-1])}")
        weights = token_weights.to(s.dtype)
        live = (weights != 0)[..., None]
        s, t = torch.where(live, s, 0.0), torch.where(live, t, 0.0)
    if normalize:
        s, t = unit(s), unit(t)
    if token_weights is not None:
        s, t = s * weights[..., None], t * weights[..., None]
    flat = zip(s.reshape(-1, *s.shape[-2:]), t.reshape(-1, *t.shape[-2:]), strict=True)
    values = torch.stack([gram(a, b, distance, form, tile_rows) for a, b in flat]).reshape(lead)
    count = (weights != 0).sum(-1).to(s.dtype)
    if entries == "mean" and distance != "cosine":
        values = values / count.square().clamp(min=1)
    return reduced(values, (count > 0).to(s.dtype), reduction, None)


def attention_mse(student: Tensor, teacher: Tensor, *, keep: Tensor | None = None) -> Tensor:
    """mean (A_S - A_T)^2 over the kept entries of attention maps.

    student, teacher: [..., L, L], probabilities or scores, alike in shape.  keep: bool, broadcast to it; None keeps the
    entries that are not 0 in the teacher's map, as BiStil does (arXiv:2306.01709, read in the authors' code), so that
    masked positions are left out.
    Equals `((s - t).square() * keep).sum() / keep.sum()`; 0 where nothing is kept. Left-out entries may hold anything.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student has shape {list(student.shape)} and teacher {list(teacher.shape)}; they must be alike: choose or "
            "average heads first"
        )
    keep = (teacher != 0) if keep is None else keep.expand(student.shape)
    s, t = (torch.where(keep, wide(x), 0.0) for x in (student, teacher.detach()))
    return (s - t).square().sum() / keep.sum().clamp(min=1)


def attention_kl(
    student: Tensor, teacher: Tensor, *, token_weights: Tensor | None = None,
    divergence: str | Divergence = "forward_kl", reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """The divergence of two attention maps, row by row: mean over heads and queries of KL(A_T || A_S).

    student, teacher: [..., L, L], rows of probabilities (what a model returns with output_attentions=True); scores
    before the softmax go to `ps.distill_loss(scores, ps.LogitsTeacher(scores))` instead.
    token_weights: [..., L] by query.
    Equals `(t * (t.log() - s.log())).sum(-1).mean()` for positive entries; an entry of 0 on both sides adds 0.
    MiniLM's attention term, arXiv:2002.10957 (from memory).
    """
    tiny = torch.finfo(torch.float32).tiny
    s, t = (wide(x).clamp(min=tiny).log() for x in (student, teacher.detach()))
    loss = distill_loss(s, LogitsTeacher(t), divergence=divergence, token_weights=token_weights, reduction=reduction)
    assert isinstance(loss, Tensor)
    return loss


def relation_kl(
    student: Tensor, teacher: Tensor, *, student_keys: Tensor | None = None, teacher_keys: Tensor | None = None,
    heads: int = 1, token_mask: Tensor | None = None, divergence: str | Divergence = "forward_kl",
) -> Tensor:  # fmt: skip
    """KL between softmax(A A^T / sqrt(d)) of the teacher and of the student, mean over heads and live positions.

    student: [B, L, D_s].  teacher: [B, L, D_t]. Queries, keys, values or hidden states of one layer: with A for both
        factors it is a self-relation (MiniLMv2, arXiv:2012.15828; the INDUS encoder, arXiv:2405.10725: from memory).
    student_keys, teacher_keys: the second factor, where it differs: queries and keys give MiniLM's attention relation.
    heads: both widths are cut into that many relation heads of d = D / heads; student and teacher need not have as many
        attention heads.
    token_mask: bool [B, L]; positions left out are neither queries nor keys.
    Short sequences run as products of many heads, two megabytes of relations at a time; long ones as fused linear
    losses whose head is the sequence itself, with no L x L matrix. Equals, for one head of one sequence,
    `F.kl_div((s @ s.T / d_s**0.5).log_softmax(-1), (t @ t.T / d_t**0.5).log_softmax(-1), log_target=True,
    reduction="sum") / L`. No causal mask: for causal maps use attention_kl.
    """
    if student.dim() != 3 or teacher.shape[:2] != student.shape[:2]:
        raise ValueError(
            f"student {list(student.shape)} and teacher {list(teacher.shape)} must be [B, L, D], alike in B, L"
        )
    keys = student if student_keys is None else student_keys
    sides = (student, keys, teacher, teacher if teacher_keys is None else teacher_keys)
    if bad := [x.shape[-1] for x in sides if x.shape[-1] % heads]:
        raise ValueError(f"a width of {bad[0]} cannot be cut into {heads} relation heads")
    rows = torch.tensor(student[..., 0].numel()) if token_mask is None else token_mask.sum()
    return relation_sum(sides, heads, token_mask, divergence) / (heads * rows).clamp(min=1)


def span_product_loss(
    student_hidden: Tensor, student_head: Head | Tensor, teacher: HiddenTeacher, spans: Tensor, *,
    distance: str = "l1", temperature: float = 1.0, reduction: str = "mean", chunk_rows: int | None = None,
) -> Tensor:  # fmt: skip
    """The distance of r_i = p_i * p_{i+1}, entry by entry of the vocabulary, over neighbours in a span.

    student_hidden: [B, T, D].  student_head: Head, or weight [V, D].  teacher: hidden [B, T, D_t] and its head.
    spans: int [B, T], the number of a row's span, negative for none; rows i and i + 1 of one span are a pair.
    distance: "l1", sum_v |r_S - r_T|, or "squared", sum_v (r_S - r_T)^2.
    temperature divides both sides' logits.  reduction over pairs: "mean" or "sum".
    The products over a span are of multi-granularity distillation (second hand); its distance was not at hand.
    Holds the probabilities of `chunk_rows` pairs a side at a time. No pair gives 0. A second derivative raises.
    """
    check_choice("distance", distance, ("l1", "squared"))
    head = student_head if isinstance(student_head, Head) else Head(student_head)
    hidden, weight, bias = promote(student_hidden, head)
    t_hidden, t_weight, t_bias = promote(teacher.hidden.detach(), teacher.head.detach())
    first = ((spans[:, 1:] == spans[:, :-1]) & (spans[:, 1:] >= 0)).nonzero()
    at = first[:, 0] * spans.shape[1] + first[:, 1]  # [P], the first row of each pair
    dtype = wide(hidden).dtype
    coef = row_coefficients(torch.ones(len(at), dtype=dtype, device=hidden.device), reduction)
    rows = chunk_rows or gemm.chunk_rows(hidden.device, len(weight), dtype)
    sides = (head.side, t_hidden.flatten(0, 1), t_weight, t_bias, teacher.head.side)
    loss: Tensor = _SpanProducts.apply(
        hidden.flatten(0, 1), weight, bias, *sides, at, coef, distance, temperature, rows
    )
    return loss


class _SpanProducts(torch.autograd.Function):
    """Gradient in the forward pass, a chunk of pairs at a time."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, side: Side, t_hidden: Tensor, t_weight: Tensor,
        t_bias: Tensor | None, t_side: Side, at: Tensor, coef: Tensor, distance: str, temperature: float, rows: int,
    ) -> Tensor:  # fmt: skip
        def product(first: Tensor, second: Tensor, w: Tensor, b: Tensor | None, side: Side) -> Tensor:
            p, r = ((apply_side(linear(x, w, b), side)[0] / temperature).softmax(-1) for x in (first, second))
            return p * r

        total = torch.zeros((), dtype=coef.dtype, device=coef.device)
        given = [weight, *(() if bias is None else (bias,))]
        grads = [torch.zeros(x.shape, dtype=coef.dtype, device=x.device) for x in (hidden, *given)]
        want = any(ctx.needs_input_grad[:3])
        for piece, share in zip(at.split(rows), coef.split(rows), strict=True):
            with torch.set_grad_enabled(want):
                leaves = [x.detach().requires_grad_(want) for x in (hidden[piece], hidden[piece + 1], *given)]
                gap = product(leaves[0], leaves[1], leaves[2], leaves[3] if len(leaves) > 3 else None, side)
                gap = gap - product(t_hidden[piece], t_hidden[piece + 1], t_weight, t_bias, t_side)
                value = (share * (gap.abs() if distance == "l1" else gap.square()).sum(-1)).sum()
                found = torch.autograd.grad(value, leaves) if want and len(piece) else ()
            total += value.detach()
            for i, x in enumerate(found):
                if i < 2:
                    grads[0].index_add_(0, piece + i, x.to(coef.dtype))
                else:
                    grads[i - 1] += x
        ctx.save_for_backward(*(x.to(hidden.dtype) for x in grads))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
        grads = [x * given if want else None for x, want in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)]
        return (*grads, *[None] * (13 - len(grads)))
