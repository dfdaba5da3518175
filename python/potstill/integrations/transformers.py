"""Distillation in a `transformers.Trainer`, from a cache or beside the teacher: DistillTrainer, DistillMixin.

    cache = ps.cache.open("teacher-cache")
    trainer = DistillTrainer(
        model=student,
        args=TrainingArguments("out"),
        train_dataset=[{"key": key} for key in cache.keys()],
        data_collator=CacheCollator(cache, tokenizer),  # or any collator of labels, and teacher=a_model
        distill=DistillConfig(ce_weight=0.1),
    )
    trainer.train()

Labels follow the convention of transformers in batches (`labels[i]` belongs to token i) and are shifted
exactly once, in `compute_loss`, to "the next token of row i". Teacher rows are never shifted: the cache's row
i already speaks of token i + 1.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

from potstill.capture.hidden import final_hidden, unwrap
from potstill.distributed import is_sharded, materialized_head
from potstill.heads import output_projection
from potstill.integrations.checks import WrongCache, check_cache, check_keys
from potstill.integrations.collator import AT, TEACHER_COLUMNS, CacheCollator, next_token_labels
from potstill.integrations.inputs import check_packing, model_inputs
from potstill.integrations.online import OnlineTeacher, TargetsOnly
from potstill.integrations.tally import Tally
from potstill.losses import linear_distill_loss
from potstill.teachers import Head, TopK

if TYPE_CHECKING:
    _Base = transformers.Trainer
else:
    _Base = object

__all__ = ["CacheCollator", "DistillConfig", "DistillMixin", "DistillTrainer", "WrongCache", "student_hidden"]


@dataclass(frozen=True)
class DistillConfig:
    """The objective: the words of `ps.linear_distill_loss`, all passed on as they are, and three of the trainer's.

    vocab_size: entries of the student's and an online teacher's head from this one on are padding (None: the whole
        matrix counts).
    metrics: names of potstill.metrics ("kl", "student_entropy", "teacher_mass", ...) that logs and evaluation carry
        beside `distill` and `ce`.
    expect: what the cache has to name, as `integrations.checks.check_cache` takes it: teacher, teacher_revision,
        tokenizer, chat_template. The tokenizer and template of a processing_class are compared without being named.
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
    metrics: tuple[str, ...] = ()
    expect: Mapping[str, str | None] = field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """The words for the loss."""
        return {n: v for n, v in vars(self).items() if n not in ("vocab_size", "metrics", "expect")}


def student_hidden(model: nn.Module, batch: Mapping[str, Any], *, all_logits: bool = False) -> tuple[Tensor, Any]:
    """(hidden [B, L, D], model outputs) of a batch; labels, teacher columns and what the forward does not name are
    left out.

    The wrapped module itself is called, so the hooks of data-parallel wrappers fire; the head is run on the
    last position only (`all_logits=True`: on all of them).
    """
    return final_hidden(model, all_logits=all_logits, **model_inputs(model, batch))


class DistillMixin(_Base):
    """Puts the fused distillation loss into any `transformers.Trainer`: `class Mine(DistillMixin, Base)`.

    The teacher's rows are a cache's, in batches from `CacheCollator`, or those of `teacher`, a model that answers for
    each batch (a base class's `teacher_model` is taken for it). A batch without teacher rows is an error in training
    and in evaluation; there is no fall-back to cross-entropy. Sums are divided by `num_items_in_batch` where the
    Trainer gives it, so gradient accumulation does not change the gradient; evaluation is the mean over all rows with a
    target, whatever the batch size. Logs carry `distill`, `ce` and DistillConfig.metrics, evaluation `eval_distill` and
    so on; they are kept on the device until a log is due.

    Raises, before the first step, WrongCache for a cache that is not the one meant (see `checks`), ValueError for
    arguments that would be ignored silently (compute_loss_func, label smoothing), for vocabularies that differ and for
    parallelism that cuts sequences.
    """

    def __init__(self, *args: Any, distill: DistillConfig | None = None, teacher: Any = None, **kwargs: Any) -> None:
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "compute_loss_func is never given the teacher's rows; choose the objective with "
                "distill=DistillConfig(...)"
            )
        if "tokenizer" in kwargs and "processing_class" not in kwargs:
            kwargs["processing_class"] = kwargs.pop("tokenizer")
        super().__init__(*args, **kwargs)
        self.distill = DistillConfig() if distill is None else distill
        self._refuse_what_is_ignored()
        # The loss below honours num_items_in_batch; this is how a Trainer is told to count it and not to
        # divide again.
        self.model_accepts_loss_kwargs = True
        names = ("distill", "ce", *self.distill.metrics)
        self._training, self._evaluation = Tally(names), Tally(("loss", *names, "rows"))
        self._steps_at_log: int | None = None
        self._asked: Any = None
        vocab_size = self._ask(self.model)
        teacher = getattr(self, "teacher_model", None) if teacher is None else teacher
        self.online = None if teacher is None else OnlineTeacher(teacher, vocab_size=self.distill.vocab_size)
        self._check_teacher(vocab_size)
        if self.online is not None:
            collator: Any = self.data_collator
            self.data_collator = TargetsOnly(collator)

    def _refuse_what_is_ignored(self) -> None:
        if getattr(self, "label_smoother", None) is not None:
            raise ValueError("label_smoothing_factor has no part in the distillation loss: set it to 0")
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs in one process mean nn.DataParallel, whose replicas hide their hidden states: "
                "start one process a GPU (torchrun, accelerate launch) or show one with CUDA_VISIBLE_DEVICES"
            )
        parallel = getattr(self.accelerator, "parallelism_config", None)
        if parallel is not None and (parallel.cp_enabled or getattr(parallel, "sp_enabled", False)):
            raise ValueError(
                "context and sequence parallelism cut sequences over processes, and the next token of a row may lie in "
                "another: not supported; use data parallelism or a head in shards (docs/parallel.md)"
            )

    def _ask(self, model: Any) -> int | None:
        """Holds the student's head against the logits the model returns, where it is whole, once a model.

        Returns the vocabulary it is over; None for a model that was asked before.
        """
        inner = unwrap(model)
        if self._asked is not None and self._asked() is inner:
            return None
        self._asked = weakref.ref(inner)
        if not is_sharded(inner):
            return Head.from_model(inner, vocab_size=self.distill.vocab_size, hidden="head_input").vocab_size
        weight = output_projection(inner).weight
        return self.distill.vocab_size or int(getattr(weight, "ds_shape", weight.shape)[0])

    def _check_teacher(self, vocab_size: int | None) -> None:
        collator: Any = self.data_collator
        cache = getattr(collator, "cache", None)
        if self.online is not None:
            if cache is not None:
                raise ValueError(
                    "both a teacher and a cache are given: take one, the loss would not know which to follow"
                )
            theirs = self.online.vocabulary
            if None not in (theirs, vocab_size) and theirs != vocab_size:
                raise ValueError(
                    f"the teacher's head is over a vocabulary of {theirs}, the student's over {vocab_size}: they need "
                    "one tokenizer; where only the matrices are padded differently, give "
                    "DistillConfig(vocab_size=len(tokenizer))"
                )
        elif cache is not None:
            processing = getattr(self, "processing_class", None) or getattr(collator, "tokenizer", None)
            tokenizer = getattr(processing, "tokenizer", processing)
            check_cache(cache, vocab_size=vocab_size, tokenizer=tokenizer, expect=self.distill.expect)
            for dataset in (self.train_dataset, self.eval_dataset):
                check_keys(cache, dataset, getattr(collator, "key", "key"))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        key = getattr(self.data_collator, "key", "key")  # of an example: the collator's, no argument of a forward
        wanted: Any = list(dict.fromkeys([*columns, key, *TEACHER_COLUMNS]))
        self._signature_columns = wanted

    def _rows(self, inputs: dict[str, Any], hidden: Tensor) -> Any:
        """A context that gives the teacher's rows of a batch."""
        if self.online is not None:
            return self.online(inputs, hidden.device)
        at = {float(name.removeprefix(AT)): value for name, value in inputs.items() if name.startswith(AT)}
        teacher = TopK(inputs["teacher_ids"], inputs["teacher_log_probs"], inputs["teacher_log_rest"], log_rest_at=at)
        if teacher.ids.shape[:-1] != hidden.shape[:-1]:
            raise ValueError(
                f"teacher rows are {list(teacher.ids.shape[:-1])}, the student's hidden states "
                f"{list(hidden.shape[:-1])}"
            )
        return contextlib.nullcontext(teacher)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch: a 0-d tensor, or (loss, outputs) with `return_outputs`.

        Outputs hold full logits only when `compute_metrics` will look at them, and in evaluation `sums`
        [B, 2 + parts]: loss, its parts and the number of rows with a target, summed within each sequence.
        """
        self._require_rows(inputs)
        self._ask(model)
        check_packing(model, inputs)
        wants_logits = return_outputs and getattr(self, "compute_metrics", None) is not None
        hidden, outputs = student_hidden(model, inputs, all_logits=wants_logits)
        labels = next_token_labels(inputs["labels"])
        how = {"reduction": "mean", "num_items": num_items_in_batch} if model.training else {"reduction": "none"}
        with (
            self._rows(inputs, hidden) as teacher,
            materialized_head(
                model, vocab_size=self.distill.vocab_size, hidden="head_input", dtype=hidden.dtype
            ) as head,
            self.accelerator.autocast(),
        ):
            loss, parts = linear_distill_loss(
                hidden,
                head,
                teacher,
                labels,
                return_metrics=self.distill.metrics or True,
                **how,
                **self.distill.options(),
            )
        kept: dict[str, Any] = {"logits": outputs.logits} if wants_logits else {}
        numbers = torch.stack([loss.detach(), *parts.values()], -1)  # [1 + parts], or [B, L, 1 + parts] in evaluation
        if model.training:
            scale = self._scale(num_items_in_batch)
            loss = loss * scale
            self._note(numbers[1:] * scale, num_items_in_batch is not None)
        else:
            rows = (labels != -100).to(numbers.dtype)
            kept["sums"] = torch.cat([numbers, rows[..., None]], -1).sum(1)
            loss = loss.sum() / (rows.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
            loss = loss * self._scale(num_items_in_batch)
        return (loss, {"loss": loss, **kept}) if return_outputs else loss

    def _require_rows(self, inputs: dict[str, Any]) -> None:
        needed = ("labels",) if self.online is not None else (*TEACHER_COLUMNS, "labels")
        if missing := [name for name in needed if inputs.get(name) is None]:
            raise ValueError(
                f"the batch has no {', '.join(missing)}: distillation needs the teacher's rows of every sequence; use "
                "CacheCollator as data_collator and give examples with a `key`, or give teacher=a_model and labels"
            )

    def _scale(self, num_items: Any) -> int:
        """Data parallel averages gradients; where the count is the sum over devices, that has to be undone."""
        if num_items is None or not getattr(self.args, "average_tokens_across_devices", False):
            return 1
        together = self.get_tp_size() if hasattr(self, "get_tp_size") else 1  # processes that see one batch
        return self.accelerator.num_processes // together

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        # drops what a sampler repeated to fill the last batch of every process
        self._evaluation.add(self.accelerator.gather_for_metrics(outputs["sums"]))
        if prediction_loss_only or "logits" not in outputs:
            return loss.detach(), None, None
        return loss.detach(), outputs["logits"], inputs["labels"]

    def _note(self, parts: Tensor, counted: bool) -> None:
        if self._steps_at_log is None:
            self._steps_at_log = self.state.global_step
        # without a count the Trainer divides the loss by the accumulation steps
        steps = 1 if counted else getattr(self, "current_gradient_accumulation_steps", 1)
        self._training.add(parts / steps)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the parts of the loss, averaged over the optimiser steps since the last log, to the training
        logs.
        """
        if "loss" in logs:
            steps = self.state.global_step - (
                self.state.global_step if self._steps_at_log is None else self._steps_at_log
            )
            parts = self._training.take(self.args.device, self.accelerator.gather)
            self._steps_at_log = None
            logs.update({name: value / max(steps, 1) for name, value in parts.items()})
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._evaluation.take(self.args.device, lambda x: x)
        output: Any = super().evaluation_loop(*args, **kwargs)
        sums = self._evaluation.take(self.args.device, lambda x: x)
        rows = max(sums.pop("rows"), 1.0)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{name}": value / rows for name, value in sums.items()})
        return output


class DistillTrainer(DistillMixin, transformers.Trainer):
    """`transformers.Trainer` with the fused distillation loss; takes `distill=DistillConfig(...)` and `teacher=` beside
    its arguments.
    """
