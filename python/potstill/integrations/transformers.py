"""Distillation from a cache in a `transformers.Trainer`: DistillTrainer, DistillMixin, CacheCollator.

    cache = ps.cache.open("teacher-cache")
    trainer = DistillTrainer(
        model=student,
        args=TrainingArguments("out"),
        train_dataset=[{"key": key} for key in cache.keys()],
        data_collator=CacheCollator(cache, tokenizer),
        distill=DistillConfig(ce_weight=0.1),
    )
    trainer.train()

Labels follow the convention of transformers in batches (`labels[i]` belongs to token i) and are shifted
exactly once, in `compute_loss`, to "the next token of row i". Teacher rows are never shifted: the cache's row
i already speaks of token i + 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

from potstill.capture.hidden import final_hidden, unwrap
from potstill.integrations.collator import AT, TEACHER_COLUMNS, CacheCollator, next_token_labels
from potstill.losses import linear_distill_loss
from potstill.teachers import Head, TopK

if TYPE_CHECKING:
    _Base = transformers.Trainer
else:
    _Base = object

__all__ = ["CacheCollator", "DistillConfig", "DistillMixin", "DistillTrainer", "student_hidden"]

# Columns of an example that a model's forward does not take but the collator needs.
_EXAMPLE_COLUMNS = ("key",)


@dataclass(frozen=True)
class DistillConfig:
    """The objective: the words of `ps.linear_distill_loss`, all passed on as they are.

    vocab_size: entries of the student's head from this one on are padding (None: the whole matrix counts).
    """

    divergence: Any = "forward_kl"
    temperature: float = 1.0
    scale_by_t2: bool = False
    distill_weight: float = 1.0
    ce_weight: float = 0.0
    tail: str = "bucket"
    chunk_rows: int | None = None
    low_memory: bool = False
    precise: bool = False
    backend: str = "auto"
    vocab_size: int | None = None


def student_hidden(model: nn.Module, batch: dict[str, Any], *, all_logits: bool = False) -> tuple[Tensor, Any]:
    """(hidden [B, L, D], model outputs) of a batch of model inputs; teacher columns and labels are left out.

    The wrapped module itself is called, so the hooks of data-parallel wrappers fire; the head is run on the
    last position only (`all_logits=True`: on all of them).
    """
    inputs = {name: value for name, value in batch.items() if not name.startswith("teacher_") and name != "labels"}
    inputs.setdefault("use_cache", False)
    return final_hidden(model, all_logits=all_logits, **inputs)


def _student_head(model: Any, vocab_size: int | None) -> Head:
    inner = unwrap(model)
    embeddings = inner.get_output_embeddings()
    for attribute in ("lora_A", "base_layer", "modules_to_save"):
        if hasattr(embeddings, attribute):
            raise ValueError(
                f"the student's head is wrapped by an adapter ({type(embeddings).__name__}): its weight "
                "alone is not what the "
                "model applies; leave the head out of the adapter's target modules"
            )
    return Head.from_model(inner, vocab_size=vocab_size, hidden="head_input")


def _require_rows(inputs: dict[str, Any]) -> None:
    if missing := [name for name in (*TEACHER_COLUMNS, "labels") if inputs.get(name) is None]:
        raise ValueError(
            f"the batch has no {', '.join(missing)}: distillation needs the teacher's rows of every "
            "sequence; use "
            "CacheCollator as data_collator and give examples with a `key`"
        )


class DistillMixin(_Base):
    """Puts the fused distillation loss into any `transformers.Trainer`: `class Mine(DistillMixin, Base)`.

    Batches come from `CacheCollator`. A batch without teacher rows is an error in training and in evaluation;
    there is no fall-back to cross-entropy. Sums are divided by `num_items_in_batch` where the Trainer gives
    it, so gradient accumulation does not change the gradient. Logs carry `distill` and `ce`, evaluation
    `eval_distill` and `eval_ce`.

    Raises ValueError for arguments that would be ignored silently (compute_loss_func, label smoothing) and
    for a cache over another vocabulary than the student's head.
    """

    def __init__(self, *args: Any, distill: DistillConfig | None = None, **kwargs: Any) -> None:
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "compute_loss_func is never given the teacher's rows; choose the objective with "
                "distill=DistillConfig(...)"
            )
        if "tokenizer" in kwargs and "processing_class" not in kwargs:
            kwargs["processing_class"] = kwargs.pop("tokenizer")
        super().__init__(*args, **kwargs)
        self.distill = DistillConfig() if distill is None else distill
        if getattr(self, "label_smoother", None) is not None:
            raise ValueError("label_smoothing_factor has no part in the distillation loss: set it to 0")
        # The loss below honours num_items_in_batch; this is how a Trainer is told to count it and not to
        # divide again.
        self.model_accepts_loss_kwargs = True
        self._parts: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}
        self._steps_at_log = 0
        self._check_vocabulary()

    def _check_vocabulary(self) -> None:
        cache = getattr(self.data_collator, "cache", None)
        if cache is None:
            return
        head = _student_head(self.model, self.distill.vocab_size)
        if cache.spec.vocab_size != head.vocab_size:
            raise ValueError(
                f"the cache is over a vocabulary of {cache.spec.vocab_size}, the student's head over "
                f"{head.vocab_size}: "
                "teacher and student need one tokenizer; where only the head's matrix is padded, give "
                f"DistillConfig(vocab_size={cache.spec.vocab_size})"
            )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        wanted: Any = list(dict.fromkeys([*columns, *_EXAMPLE_COLUMNS, *TEACHER_COLUMNS]))
        self._signature_columns = wanted

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch of `CacheCollator`: a 0-d tensor, or (loss, outputs) with `return_outputs`.

        Outputs hold full logits only when `compute_metrics` will look at them.
        """
        _require_rows(inputs)
        wants_logits = return_outputs and getattr(self, "compute_metrics", None) is not None
        hidden, outputs = student_hidden(model, inputs, all_logits=wants_logits)
        at = {float(name.removeprefix(AT)): value for name, value in inputs.items() if name.startswith(AT)}
        teacher = TopK(inputs["teacher_ids"], inputs["teacher_log_probs"], inputs["teacher_log_rest"], log_rest_at=at)
        if teacher.ids.shape[:-1] != hidden.shape[:-1]:
            raise ValueError(
                f"teacher rows are {list(teacher.ids.shape[:-1])}, the student's hidden states "
                f"{list(hidden.shape[:-1])}"
            )
        options = {name: value for name, value in vars(self.distill).items() if name != "vocab_size"}
        loss, parts = linear_distill_loss(
            hidden,
            _student_head(model, self.distill.vocab_size),
            teacher,
            next_token_labels(inputs["labels"]),
            num_items=num_items_in_batch,
            return_metrics=True,
            **options,
        )
        if num_items_in_batch is not None and self._counts_across_devices():
            # Data parallel averages gradients; the count is already the sum over devices.
            scale = self.accelerator.num_processes
            loss, parts = loss * scale, {name: value * scale for name, value in parts.items()}
        self._note(model.training, parts)
        if not return_outputs:
            return loss
        kept = dict(outputs) if wants_logits else {}
        return loss, {"loss": loss, **{name: value for name, value in kept.items() if name == "logits"}}

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        _require_rows(inputs)  # without labels a Trainer would evaluate without any loss
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _counts_across_devices(self) -> bool:
        return bool(getattr(self.args, "average_tokens_across_devices", False)) and self.accelerator.num_processes > 1

    def _note(self, training: bool, parts: dict[str, Tensor]) -> None:
        noted = self._parts[training]
        if training and not noted:
            self._steps_at_log = self.state.global_step
        for name, value in parts.items():
            noted[name] = noted[name] + value.detach() if name in noted else value.detach().clone()
        noted["batches"] = noted.get("batches", torch.zeros((), device="cpu")) + 1

    def _take(self, training: bool, count: float | None = None) -> dict[str, float]:
        noted, self._parts[training] = self._parts[training], {}
        batches = float(noted.pop("batches", 0))
        divisor = batches if count is None else count
        if divisor <= 0:
            return {}
        return {name: float(self.accelerator.gather(value).mean()) / divisor for name, value in noted.items()}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the parts of the loss, averaged over the optimiser steps since the last log, to the training
        logs.
        """
        if "loss" in logs:
            logs.update(self._take(True, self.state.global_step - self._steps_at_log))
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._parts[False] = {}
        output: Any = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{name}": value for name, value in self._take(False).items()})
        return output


class DistillTrainer(DistillMixin, transformers.Trainer):
    """`transformers.Trainer` with the fused sparse distillation loss; takes `distill=DistillConfig(...)`
    beside its arguments.
    """
