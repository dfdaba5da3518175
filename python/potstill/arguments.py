"""Arguments of the losses: checked at the public edge, flattened to rows, turned into an op's arguments."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from potstill import divergences
from potstill.divergences import Divergence
from potstill.rows import TAILS, Side
from potstill.teachers import Head, HiddenTeacher, LogitsTeacher, Teacher, TopK, describe

REDUCTIONS = ("mean", "sum", "none")


class Call:
    """One call's teacher, labels and weights, checked and flattened to rows."""

    def __init__(self, lead: torch.Size, x: Tensor, side: Side, teacher: Teacher, labels: Tensor | None,
                 divergence: str | Divergence, temperature: float, tail: str):  # fmt: skip
        self.lead, self.device, self.side, self.teacher, self.labels = lead, x.device, side, teacher, labels
        self.wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.divergence = divergences.get(divergence)
        self.temperature, self.tail = check_temperature(temperature), tail
        check_choice("tail", tail, TAILS)
        if not isinstance(teacher, HiddenTeacher | LogitsTeacher | TopK):
            raise TypeError(
                f"teacher must be a HiddenTeacher, LogitsTeacher or TopK, not {describe(teacher)}"
                + ("; wrap logits as LogitsTeacher(logits)" if isinstance(teacher, Tensor) else "")
            )
        if labels is not None:
            self._check_rows("labels", labels)
            if labels.dtype not in (torch.int64, torch.int32):
                raise TypeError(f"labels must be int64 or int32, not {labels.dtype}")

    def _check_rows(self, name: str, value: Tensor, trailing: int = 0) -> None:
        lead = value.shape[: value.dim() - trailing]
        if lead != self.lead:
            raise ValueError(
                f"{name} has leading shape {list(lead)}; the student's rows have {list(self.lead)}, and row i of "
                "both must predict the same token"
            )
        if value.device != self.device:
            raise ValueError(f"{name} is on {value.device}; the student is on {self.device}: move it with .to()")

    def weights(self, token_weights: Tensor | None, ignore_index: int, reduction: str,
                num_items: int | Tensor | None, return_metrics: bool) -> tuple[Tensor, Any]:  # fmt: skip
        """coef [N]: what each row's loss is multiplied by; and a function that reduces rows and metrics."""
        check_choice("reduction", reduction, REDUCTIONS)
        rows = math.prod(self.lead)
        weights = torch.ones(rows, dtype=self.wide, device=self.device)
        if token_weights is not None:
            self._check_rows("token_weights", token_weights)
            weights = token_weights.reshape(-1).to(self.wide)
        if self.labels is not None:
            weights = torch.where(self.labels.reshape(-1) != ignore_index, weights, 0.0)
        if num_items is not None and reduction != "mean":
            raise ValueError(f"num_items is the denominator of reduction='mean'; reduction={reduction!r} has none")
        coef = weights
        if reduction == "mean" and num_items is None:
            total = weights.sum()
            coef = weights / torch.where(total == 0, 1.0, total)
        elif reduction == "mean":
            count = torch.as_tensor(num_items, dtype=self.wide, device=self.device)
            coef = weights / count.clamp(min=1.0)

        def finish(loss: Tensor, parts: Tensor) -> Any:
            if loss.dim():  # row losses
                loss = torch.where(coef != 0, coef * loss, 0.0)
                loss = loss.reshape(self.lead) if reduction == "none" else loss.sum()
            if not return_metrics:
                return loss
            parts = torch.where(coef != 0, coef.detach() * parts, 0.0)
            parts = parts.reshape(2, *self.lead) if reduction == "none" else parts.sum(-1)
            return loss, {"distill": parts[0], "ce": parts[1]}

        return coef, finish

    @staticmethod
    def live(coef: Tensor) -> Tensor:
        """1 for rows that count, 0 for the others: [N], no gradient."""
        return (coef.detach() != 0).to(coef.dtype)

    def labels_for(self, ce_weight: float, ignore_index: int) -> Tensor | None:
        """Labels [N] int64 for the cross-entropy, or None when it is not asked for."""
        if not ce_weight:
            return None
        if self.labels is None:
            raise ValueError(f"ce_weight={ce_weight} needs labels")
        flat = self.labels.reshape(-1).long()
        check_ids("labels", flat, self.side.vocab_size, ignore_index)
        return flat

    def settings(self) -> tuple[Any, ...]:
        """The op's arguments from `divergence` to `tail`."""
        s, t = self.side, None
        if isinstance(self.teacher, HiddenTeacher):
            t = self.teacher.head.side
        elif isinstance(self.teacher, LogitsTeacher):
            t = self.teacher.side
        if t is not None and t.vocab_size != s.vocab_size:
            raise ValueError(
                f"the teacher's vocabulary has {t.vocab_size} entries and the student's {s.vocab_size}; where one "
                "is padded, give the true size to both: Head(..., vocab_size=n), LogitsTeacher(..., vocab_size=n)"
            )
        sides = [[float(x.vocab_size), x.scale, x.softcap] if x else [] for x in (s, t)]
        return self.divergence.name, list(self.divergence.values), *sides, self.tail

    def teacher_tensors(self) -> tuple[Tensor | None, ...]:
        """The op's seven teacher arguments, flattened to rows and detached."""
        t = self.teacher
        if isinstance(t, HiddenTeacher):
            hidden, weight, bias = (None if x is None else x.detach() for x in promote(t.hidden, t.head))
            assert hidden is not None and weight is not None
            if hidden.shape[-1] != weight.shape[1]:
                raise ValueError(
                    f"the teacher's hidden has shape {list(hidden.shape)}; its last size must be its head's "
                    f"D = {weight.shape[1]}"
                )
            self._check_rows("the teacher's hidden", hidden, 1)
            return hidden.reshape(-1, hidden.shape[-1]), weight, bias, None, None, None, None
        if isinstance(t, LogitsTeacher):
            self._check_rows("the teacher's logits", t.logits, 1)
            return None, None, None, t.logits.detach().reshape(-1, t.logits.shape[-1]), None, None, None
        self._check_rows("the teacher's ids", t.ids, 1)
        return None, None, None, None, *self._sparse(t)

    def _sparse(self, t: TopK) -> tuple[Tensor, Tensor, Tensor | None]:
        """ids [N, K] int64, log_probs [N, K] and log_rest [N] at the loss's temperature."""
        ids = t.ids.reshape(-1, t.k).long()
        check_ids("the teacher's ids", ids, self.side.vocab_size, -1)
        log_probs = t.log_probs.detach().reshape(-1, t.k).to(self.wide)
        if self.tail == "renormalize":
            log_probs = log_probs / self.temperature
            total = log_probs.logsumexp(-1, keepdim=True)
            return ids, log_probs - torch.where(total == -math.inf, 0.0, total), None
        if self.temperature != 1:
            raise ValueError(
                f"temperature={self.temperature} with a TopK teacher and tail={self.tail!r}: the mass outside the K "
                "entries at that temperature was not recorded; use temperature=1.0, or tail='renormalize'"
            )
        if self.tail == "drop":
            return ids, log_probs, None
        if t.log_rest is None:
            raise ValueError(
                "tail='bucket' needs TopK.log_rest, the log of the mass outside the K entries; give it, or choose "
                "tail='renormalize' or 'drop'"
            )
        return ids, log_probs, t.log_rest.detach().reshape(-1).to(self.wide)


def promote(hidden: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden, weight and bias in one dtype: as they are, or autocast's where it is on."""
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


def check_temperature(temperature: float) -> float:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature} must be positive and finite")
    return float(temperature)


def finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{name}={value} must be finite")
    return float(value)


def rows_or_budget(chunk_rows: int | None) -> int:
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows={chunk_rows} must be at least 1, or None to choose from a byte budget")
    return chunk_rows or 0
