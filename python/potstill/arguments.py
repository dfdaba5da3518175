"""Arguments of the losses: checked at the public edge, flattened to rows, turned into an op's arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from potstill import divergences, metrics
from potstill.divergences import Divergence
from potstill.encoding import check_objective, encode
from potstill.mixtures import TEACHERS, Teacher
from potstill.row_losses import RowLoss
from potstill.rows import TAILS, Side
from potstill.teachers import Head, TopK, describe

REDUCTIONS = ("mean", "sequence_mean", "sum", "none")


class Call:
    """One call's teacher, labels and weights, checked and flattened to rows."""

    def __init__(
        self, lead: torch.Size, x: Tensor, side: Side, teacher: Teacher | None, labels: Tensor | None, *,
        divergence: str | Divergence | RowLoss, temperature: float, teacher_temperature: float | None, tail: str,
        scale_by_t2: bool, distill_weight: float, ce_weight: float, token_weights: Tensor | None, ignore_index: int,
        reduction: str, num_items: int | Tensor | None, return_metrics: bool | Sequence[str], backend: str,
        chunk_rows: int | None, precise: bool, shard: Head | None = None,
    ):  # fmt: skip
        self.lead, self.device, self.side, self.labels, self.shard = lead, x.device, side, labels, shard
        self.wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.divergence = divergences.get(divergence)
        self.temperature, self.tail = check_temperature(temperature), tail
        self.teacher_temperature = self.temperature
        if teacher_temperature is not None:
            self.teacher_temperature = check_temperature(teacher_temperature, "teacher_temperature")
        check_choice("tail", tail, TAILS)
        t2 = self.temperature**2 if scale_by_t2 else 1.0
        self.distill_weight, self.ce_weight = (
            finite("distill_weight", distill_weight) * t2,
            finite("ce_weight", ce_weight),
        )
        self._check_teacher(teacher, backend)
        self.metrics = metric_names(return_metrics, teacher)
        self.with_metrics = return_metrics is not False
        self.teacher, self.numbers, self.plan, self.bounds = encode(self, teacher, self.metrics)
        if labels is not None:
            self.check_rows("labels", labels)
            if labels.dtype not in (torch.int64, torch.int32):
                raise TypeError(f"labels must be int64 or int32, not {labels.dtype}")
        self.reduction = reduction
        self.coef = self._coefficients(token_weights, ignore_index, num_items)
        self.labels_flat = self._labels(ignore_index)
        self.how = (rows_or_budget(chunk_rows), precise, backend)

    def _check_teacher(self, teacher: Teacher | None, backend: str) -> None:
        if teacher is None:
            if self.distill_weight:
                raise ValueError("teacher is None; give one, or distill_weight=0.0 for the cross-entropy alone")
            self.tail = "drop"  # a sparse teacher without entries
        elif not isinstance(teacher, TEACHERS):
            raise TypeError(
                "teacher must be a HiddenTeacher, LogitsTeacher, TopK, Mix or Masked, "
                f"not {describe(teacher)}"
                + ("; wrap logits as LogitsTeacher(logits)" if isinstance(teacher, Tensor) else "")
            )
        else:
            check_objective(self, teacher, backend)

    def check_rows(self, name: str, value: Tensor, trailing: int = 0) -> None:
        """Raise unless value's shape, less `trailing` dimensions, and device are those of the student's rows."""
        lead = value.shape[: value.dim() - trailing]
        if lead != self.lead:
            raise ValueError(
                f"{name} has leading shape {list(lead)}; the student's rows have {list(self.lead)}, and row i of "
                "both must predict the same token"
            )
        if value.device != self.device:
            raise ValueError(f"{name} is on {value.device}; the student is on {self.device}: move it with .to()")

    def _coefficients(self, token_weights: Tensor | None, ignore_index: int, num_items: int | Tensor | None) -> Tensor:
        """[N]: what each row's loss is multiplied by."""
        weights = torch.ones(self.lead, dtype=self.wide, device=self.device)
        if token_weights is not None:
            self.check_rows("token_weights", token_weights)
            weights = token_weights.to(self.wide)
        if self.labels is not None:
            weights = torch.where(self.labels != ignore_index, weights, 0.0)
        return row_coefficients(weights, self.reduction, num_items).reshape(-1)

    def live(self) -> Tensor:
        """1 for rows that count, 0 for the others: [N], no gradient."""
        return (self.coef.detach() != 0).to(self.coef.dtype)

    def _labels(self, ignore_index: int) -> Tensor | None:
        """Labels [N] int64 for the cross-entropy, or None when it is not asked for."""
        if not self.ce_weight:
            return None
        if self.labels is None:
            raise ValueError(f"ce_weight={self.ce_weight} needs labels")
        flat = self.labels.reshape(-1).long()
        check_ids("labels", flat, self.side.vocab_size, ignore_index)
        return flat

    def arguments(self, coef: Tensor) -> tuple[Any, ...]:
        """The op's arguments between the student's and what it wants."""
        d = self.divergence
        return (
            self.teacher, self.numbers, self.plan, self.bounds, coef, self.labels_flat, d.name, list(d.values),
            [float(self.side.vocab_size), self.side.scale, self.side.softcap], self.tail, self.temperature,
            self.distill_weight, self.ce_weight, ",".join(self.metrics), *self.how,
        )  # fmt: skip

    def finish(self, loss: Tensor, parts: Tensor) -> Any:
        """The loss reduced where it is row losses [N], and the parts [2 + M, N] reduced alike where asked for."""
        if loss.dim():
            loss = torch.where(self.coef != 0, self.coef * loss, 0.0)
            loss = loss.reshape(self.lead) if self.reduction == "none" else loss.sum()
        if not self.with_metrics:
            return loss
        parts = torch.where(self.coef != 0, self.coef.detach() * parts.detach(), 0.0)
        parts = parts.reshape(-1, *self.lead) if self.reduction == "none" else parts.sum(-1)
        return loss, dict(zip(("distill", "ce", *self.metrics), parts, strict=True))


def row_coefficients(weights: Tensor, reduction: str, num_items: int | Tensor | None = None) -> Tensor:
    """[...], what each row's loss is multiplied by so that the sum is the reduction; weights [...], 0 stays 0."""
    check_choice("reduction", reduction, REDUCTIONS)
    if reduction == "sequence_mean" and weights.dim() < 2:
        raise ValueError(
            f"reduction='sequence_mean' needs rows [..., sequence, position]; they have shape {list(weights.shape)}"
        )
    means = reduction in ("mean", "sequence_mean")
    if not means:
        if num_items is not None:
            raise ValueError(f"num_items is the denominator of a mean; reduction={reduction!r} has none")
        return weights
    if reduction == "sequence_mean":  # each sequence's rows sum to 1; then the mean over those that have any
        total = weights.sum(-1, keepdim=True)
        weights = weights / torch.where(total == 0, 1.0, total)
        count = (total != 0).sum().clamp(min=1) if num_items is None else num_items
    else:
        total = weights.sum()
        count = torch.where(total == 0, 1.0, total) if num_items is None else num_items
    count = torch.as_tensor(count, dtype=weights.dtype, device=weights.device)
    return weights / (count if num_items is None else count.clamp(min=1.0))


def metric_names(wanted: bool | Sequence[str], teacher: Teacher | None) -> tuple[str, ...]:
    """The metrics beyond "distill" and "ce" that are asked for. Raises ValueError on one that cannot be had."""
    names = () if isinstance(wanted, bool) else (wanted,) if isinstance(wanted, str) else tuple(wanted)
    names = tuple(name for name in names if name not in ("distill", "ce"))
    for name in names:
        if name not in metrics.NAMES:
            known = ", ".join(("distill", "ce", *metrics.NAMES))
            raise ValueError(f"return_metrics names {name!r}; known are {known}")
        if name in metrics.SPARSE_ONLY and not isinstance(teacher, TopK):
            raise ValueError(f"return_metrics names {name!r}, the mass on a TopK's entries; the teacher is no TopK")
    if names and teacher is None:
        raise ValueError(f"return_metrics names {names[0]!r}, but there is no teacher")
    return names


def promote(hidden: Tensor, head: Head, *, shard: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden, weight and bias in one dtype: as they are, or autocast's where it is on."""
    if head.group is not None and not shard:
        raise ValueError(
            f"the head is a shard of the vocabulary, from {head.vocab_start} on; linear_distill_loss takes one as "
            "student_head, and beside it in a HiddenTeacher. Give the whole head here"
        )
    if not isinstance(hidden, Tensor) or not hidden.is_floating_point():
        raise TypeError(f"hidden states must be a floating-point tensor [..., D], not {describe(hidden)}")
    weight, bias = head.weight, head.bias
    if hidden.device != weight.device:
        raise ValueError(f"hidden states are on {hidden.device} and their head on {weight.device}: move one with .to()")
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
        return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"hidden states are {hidden.dtype} and their head's weight {weight.dtype}; give both one dtype, or run "
            "under torch.autocast"
        )
    return hidden, weight, bias


def check_ids(name: str, ids: Tensor, vocab_size: int, also: int) -> None:
    """ids in 0..vocab_size-1 or equal to `also`; looked at on the CPU only, where looking costs no synchronisation."""
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bad = ((ids < 0) | (ids >= vocab_size)) & (ids != also)
    if bool(bad.any()):
        raise ValueError(
            f"{name} holds {int(ids[bad][0])}; accepted are 0..{vocab_size - 1} and {also}. Is it another tokenizer's?"
        )


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} is not known; use one of {', '.join(map(repr, known))}")


def check_temperature(temperature: float, name: str = "temperature") -> float:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"{name}={temperature} must be positive and finite")
    return float(temperature)


def finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{name}={value} must be finite")
    return float(value)


def rows_or_budget(chunk_rows: int | None) -> int:
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows={chunk_rows} must be at least 1, or None to choose from a byte budget")
    return chunk_rows or 0
