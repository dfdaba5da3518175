"""The public losses: argument checks at the edge, then one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from potstill import divergences, ops  # noqa: F401  ops registers torch.ops.potstill
from potstill.arguments import REDUCTIONS, Call, check_choice, check_temperature, promote
from potstill.divergences import Divergence
from potstill.mixtures import Teacher
from potstill.parts_arguments import check_parts, shard_arguments
from potstill.row_losses import RowLoss
from potstill.rows import TAILS, Side
from potstill.teachers import Head, describe


def linear_distill_loss(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    teacher: Teacher | None,
    labels: Tensor | None = None,
    *,
    divergence: str | Divergence | RowLoss = "forward_kl",
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    scale_by_t2: bool = False,
    distill_weight: float = 1.0,
    ce_weight: float = 0.0,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    tail: str = "bucket",
    chunk_rows: int | None = None,
    low_memory: bool = False,
    precise: bool = False,
    return_metrics: bool | Sequence[str] = False,
    backend: str = "auto",
) -> Any:
    """Distillation loss from the student's last hidden states; no [rows, V] matrix is ever held.

    Row i of every argument predicts the same next token: nothing is shifted here.

    student_hidden: [..., D] fp64, fp32, bf16 or fp16.
    student_head: Head, or its weight [V, D]. With a shard of the vocabulary every process of its group makes the call,
        with the same rows; each gets the same loss, the whole gradient of student_hidden and that of its own shard.
    teacher: HiddenTeacher, LogitsTeacher, TopK, Mix or Masked with the same leading shape; None with distill_weight=0.
        Never receives a gradient (but a soft mask's bounds do).
    labels: [...] int64, the next token of each row. Rows equal to `ignore_index` are left out of everything.
    divergence: a name or object of `potstill.divergences`; teacher first, in nats.
    temperature: > 0, divides both sides' logits in the divergence; the cross-entropy stays at 1. A TopK needs the rest
        at that temperature (`log_rest_at`), but for tail="renormalize".
    teacher_temperature: divides the teacher's logits instead, where the two differ.
    scale_by_t2: multiply value and gradient of the divergence by temperature squared.
    distill_weight, ce_weight: `distill_weight * divergence + ce_weight * cross_entropy(labels)` per row.
    token_weights: [...] multiplies the whole row, cross-entropy included. May require grad.
    reduction: "mean": sum(w * l) / sum(w) over valid rows, or / num_items (clamped to at least 1) when that is given;
        "sequence_mean": that mean within each sequence (the last of the leading dimensions), then over the sequences
        that have a valid row (or / num_items); "sum"; "none": [...] in fp32, 0 at ignored rows. num_items is never read
        back from a device.
    tail: for TopK, what stands for the mass outside the K entries: "bucket" one more entry (needs `log_rest`),
        "renormalize" both sides over the K entries (no gradient outside), "drop" nothing: the teacher's true
        probabilities on the K entries against the student's full distribution; "sampled": the entries were drawn (needs
        `counts`), each weighted by its share of the draws over its probability, so that value and gradient are unbiased
        for divergences that vanish where p = 0 (arXiv:2503.16870); for draws at another temperature, consistent.
    chunk_rows: rows of the logit buffer; None chooses from a byte budget.
    low_memory: the vocabulary in tiles, computed again for each step and in backward: a peak that grows neither with V
        nor with chunk_rows x V, for one more student product (two with a dense teacher). For teachers that are a
        HiddenTeacher, a LogitsTeacher or a TopK, and divergences that are sums.
    precise: 16-bit inputs: never round logits to 16 bits, where the device would (see docs/precision.md).
    return_metrics: True also returns {"distill", "ce"}: detached, unweighted parts, reduced as the loss is. Names of
        potstill.metrics ("kl", "acceptance", ...) add those, each for one more pass over the logits.
    backend: "auto", or a kernel by name for tests and benchmarks.

    Equals, for a HiddenTeacher and the defaults, with z = logits / temperature in fp32:
    `F.kl_div(zs.log_softmax(-1), zt.log_softmax(-1), log_target=True, reduction="none").sum(-1)[valid].mean()`

    Returns a fp32 (fp64 for fp64) scalar, or [...] for "none". With no valid row: 0, with zero gradients.
    Raises TypeError or ValueError naming the argument, what it was and what is accepted. A second derivative raises.
    """
    head = student_head if isinstance(student_head, Head) else Head(student_head)
    hidden, weight, bias = promote(student_hidden, head, shard=True)
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"student_hidden has shape {list(hidden.shape)}; its last size must be the head's D = {weight.shape[1]}"
        )
    call = Call(
        hidden.shape[:-1], hidden, head.side, teacher, labels, divergence=divergence, temperature=temperature,
        teacher_temperature=teacher_temperature, tail=tail, scale_by_t2=scale_by_t2, distill_weight=distill_weight,
        ce_weight=ce_weight, token_weights=token_weights, ignore_index=ignore_index, reduction=reduction,
        num_items=num_items, return_metrics=return_metrics, backend=backend, chunk_rows=chunk_rows, precise=precise,
        shard=None if head.group is None else head,
    )  # fmt: skip
    grad = torch.is_grad_enabled()
    want = [grad and x is not None and x.requires_grad for x in (hidden, weight, bias, call.bounds)]
    student = hidden.reshape(-1, hidden.shape[-1]), weight, bias
    if low_memory or head.group is not None:
        check_parts(call, teacher, low_memory)
        how = shard_arguments(head, low_memory)
        rows, parts, *_ = torch.ops.potstill.linear_distill_parts(
            *student, *call.arguments(call.live()), *how, *want[:3]
        )
        return call.finish(rows, parts)
    if reduction == "none":
        rows, parts = torch.ops.potstill.linear_distill_rows(*student, *call.arguments(call.live()), *want)
        return call.finish(rows, parts)
    loss, parts, *_ = torch.ops.potstill.linear_distill(*student, *call.arguments(call.coef), *want)
    return call.finish(loss, parts)


def distill_loss(
    student_logits: Tensor,
    teacher: Teacher | None,
    labels: Tensor | None = None,
    *,
    vocab_size: int | None = None,
    divergence: str | Divergence | RowLoss = "forward_kl",
    temperature: float = 1.0,
    teacher_temperature: float | None = None,
    scale_by_t2: bool = False,
    distill_weight: float = 1.0,
    ce_weight: float = 0.0,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    tail: str = "bucket",
    chunk_rows: int | None = None,
    precise: bool = False,
    return_metrics: bool | Sequence[str] = False,
    backend: str = "auto",
) -> Any:
    """linear_distill_loss for logits already at hand: student_logits [..., V] fp64, fp32, bf16 or fp16.

    The same words mean the same; columns from `vocab_size` on are padding. The forward allocates nothing of the logits'
    size and the backward only their gradient. `precise` concerns a HiddenTeacher's logits; given ones are as they are.
    """
    if not isinstance(student_logits, Tensor) or not student_logits.is_floating_point():
        raise TypeError(f"student_logits must be a floating-point tensor [..., V], not {describe(student_logits)}")
    columns = student_logits.shape[-1]
    if vocab_size is not None and not 1 <= vocab_size <= columns:
        raise ValueError(f"vocab_size={vocab_size} is outside 1..{columns}, the columns of student_logits")
    side = Side(columns if vocab_size is None else vocab_size)
    call = Call(
        student_logits.shape[:-1], student_logits, side, teacher, labels, divergence=divergence,
        temperature=temperature, teacher_temperature=teacher_temperature, tail=tail, scale_by_t2=scale_by_t2,
        distill_weight=distill_weight, ce_weight=ce_weight, token_weights=token_weights, ignore_index=ignore_index,
        reduction=reduction, num_items=num_items, return_metrics=return_metrics, backend=backend,
        chunk_rows=chunk_rows, precise=precise,
    )  # fmt: skip
    want_bounds = call.bounds is not None and call.bounds.requires_grad and torch.is_grad_enabled()
    rows, parts = torch.ops.potstill.distill_rows(
        student_logits.reshape(-1, columns), *call.arguments(call.live()), want_bounds
    )
    return call.finish(rows, parts)


class _Loss(nn.Module):
    """Keeps the options of a loss; checks the ones that can be checked without data."""

    def __init__(self, **options: Any):
        super().__init__()
        self.options = options
        divergences.get(options.get("divergence", "forward_kl"))
        check_temperature(options.get("temperature", 1.0))
        check_choice("reduction", options.get("reduction", "mean"), REDUCTIONS)
        check_choice("tail", options.get("tail", "bucket"), TAILS)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())


class LinearDistillLoss(_Loss):
    """linear_distill_loss as a module: options at construction, tensors (and per-call options) at the call."""

    def forward(
        self, student_hidden: Tensor, student_head: Head | Tensor, teacher: Teacher, labels: Tensor | None = None,
        **per_call: Any,
    ) -> Any:  # fmt: skip
        return linear_distill_loss(student_hidden, student_head, teacher, labels, **{**self.options, **per_call})


class DistillLoss(_Loss):
    """distill_loss as a module: options at construction, tensors (and per-call options) at the call."""

    def forward(self, student_logits: Tensor, teacher: Teacher, labels: Tensor | None = None, **per_call: Any) -> Any:
        return distill_loss(student_logits, teacher, labels, **{**self.options, **per_call})
