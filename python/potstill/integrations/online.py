"""A teacher model beside the student: its rows for a batch, wherever it lives, and batches that name their targets."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from potstill.capture.hidden import teacher_hidden, unwrap
from potstill.distributed import is_sharded, materialized_head
from potstill.integrations.inputs import model_inputs
from potstill.teachers import Head, HiddenTeacher

IGNORED = -100


class OnlineTeacher:
    """A frozen causal LM that answers for each batch: `with teacher(inputs, device) as rows: loss(..., rows, ...)`.

    model: on its own device and in its own dtype; put into evaluation mode, its parameters no longer require grad.
    vocab_size: entries of its head from this one on are padding.

    Where the student is on another device, hidden states are moved batch by batch and one copy of the head is kept
    there. A model in shards (FSDP2, ZeRO-3) is gathered as `materialized_head` says.
    """

    def __init__(self, model: Any, *, vocab_size: int | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"the teacher must be a loaded model, not {type(model).__name__}: load it with from_pretrained"
            )
        self.model = model.eval().requires_grad_(False)
        self.vocab_size = vocab_size
        self.sharded = is_sharded(model)
        self._heads: dict[torch.device, Head] = {}
        if not self.sharded:
            head = Head.from_model(unwrap(model), vocab_size=vocab_size, hidden="head_input")
            self._heads[head.weight.device] = head

    @property
    def vocabulary(self) -> int | None:
        """Entries of its head that are no padding; None for a model in shards, which is not read here."""
        sizes = [head.vocab_size for head in self._heads.values()]
        return sizes[0] if sizes else self.vocab_size

    @contextlib.contextmanager
    def __call__(self, inputs: Mapping[str, Any], device: torch.device) -> Iterator[HiddenTeacher]:
        """HiddenTeacher of the inputs' rows [B, L, D_t], on `device`."""
        self.model.eval()  # a Trainer's train() reaches a teacher that is an attribute of the student
        own = next(self.model.parameters()).device
        with torch.autocast(own.type, enabled=False):
            hidden = teacher_hidden(self.model, **_moved(model_inputs(self.model, inputs), own))
        if self.sharded:
            with materialized_head(
                self.model, vocab_size=self.vocab_size, hidden="head_input", dtype=hidden.dtype
            ) as h:
                yield HiddenTeacher(hidden.to(device), h.detach())
            return
        yield HiddenTeacher(hidden.to(device), self._head(device))

    def _head(self, device: torch.device) -> Head:
        if device not in self._heads:
            (head,) = self._heads.values()
            bias = None if head.bias is None else head.bias.to(device)
            self._heads[device] = Head(
                head.weight.to(device),
                bias,
                logit_scale=head.logit_scale,
                softcap=head.softcap,
                vocab_size=head.vocab_size,
            )
        return self._heads[device]


def _moved(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


class TargetsOnly:
    """A collator's batches, with -100 in place of labels that no row predicts.

    That is the first token of each sequence: at position 0 where `position_ids` are given (packed rows begin again),
    else the first that `attention_mask` shows. A count of labels is then a count of rows with a target, however a
    trainer counts.
    """

    def __init__(self, collator: Callable[[Sequence[Any]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, examples: Sequence[Any]) -> dict[str, Any]:
        batch = self.collator(examples)
        labels = batch.get("labels")
        if isinstance(labels, Tensor) and labels.dim() == 2:
            batch["labels"] = labels.masked_fill(self._first(batch, labels), IGNORED)
        return batch

    def _first(self, batch: Any, labels: Tensor) -> Tensor:
        """[B, L], True at tokens that no row predicts."""
        first = torch.zeros_like(labels, dtype=torch.bool)
        first[:, 0] = True
        positions, mask = batch.get("position_ids"), batch.get("attention_mask")
        if isinstance(positions, Tensor) and positions.shape == labels.shape:
            first |= positions == 0
        if isinstance(mask, Tensor) and mask.shape == labels.shape:
            seen = mask.bool()
            first |= ~seen
            first[:, 1:] |= ~seen[:, :-1]
        return first
