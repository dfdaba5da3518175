from __future__ import annotations

import copy

import numpy as np
import potstill as ps
import pytest
import torch
import transformers
from potstill.integrations.transformers import (
    CacheCollator,
    DistillConfig,
    DistillMixin,
    DistillTrainer,
    student_hidden,
)
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from .conftest import VOCAB, exact_rows, needs_packing, tiny_llama

KEYS = [{"key": f"s{i}"} for i in range(4)]


def arguments(tmp_path, **options):
    defaults = {
        "output_dir": str(tmp_path),
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "seed": 1,
    }
    return TrainingArguments(**{**defaults, **options})


def trainer_of(
    model,
    cache,
    tmp_path,
    *,
    side="right",
    cls=DistillTrainer,
    distill=None,
    data=KEYS,
    callbacks=None,
    **options,
):
    return cls(
        model=model,
        args=arguments(tmp_path, **options),
        train_dataset=data,
        eval_dataset=data,
        data_collator=collator_of(cache, side),
        distill=distill,
        callbacks=callbacks,
    )


def collator_of(cache, side):
    return CacheCollator(cache, 0, packed=True) if side == "packed" else CacheCollator(cache, 0, padding_side=side)


def exact_batch(cache, model, sequences, side, shift=0):
    """The collator's batch with unrounded rows in place of the cached ones, moved on by `shift` rows."""
    batch = CacheCollator(cache, 0, padding_side=side)(KEYS)
    for b, tokens in enumerate(sequences.values()):
        rows = exact_rows(model, tokens)
        at = batch["attention_mask"][b].bool()
        batch["teacher_ids"][b, at] = rows.ids.roll(shift, 0)
        batch["teacher_log_probs"][b, at] = rows.log_probs.roll(shift, 0)
        batch["teacher_log_rest"][b, at] = rows.log_rest.roll(shift, 0)
    return batch


@pytest.mark.parametrize("side", ["right", "left"])
def test_self_distillation_is_zero_and_shifted_rows_are_not(model, cache, sequences, tmp_path, side):
    trainer = trainer_of(copy.deepcopy(model), cache, tmp_path, side=side)
    loss = trainer.compute_loss(trainer.model, exact_batch(cache, model, sequences, side))
    assert abs(loss.item()) < 1e-6
    for shift in (1, -1):
        assert trainer.compute_loss(trainer.model, exact_batch(cache, model, sequences, side, shift)).item() > 0.1
    cached = trainer.compute_loss(trainer.model, CacheCollator(cache, 0, padding_side=side)(KEYS))
    assert abs(cached.item()) < 2e-3, "what a cache rounds away"


def reference(student, cache, examples, config: DistillConfig):
    """The objective with full logits, one sequence at a time: the mean over tokens that have a target."""
    total, count = 0.0, 0
    words = {name: value for name, value in config.options().items() if name != "low_memory"}
    for example in examples:
        sequence = cache[example["key"]]
        tokens = torch.from_numpy(sequence.tokens).long()
        labels = torch.as_tensor(np.asarray(example.get("labels", sequence.tokens))).long()[1:]
        total = total + ps.distill_loss(
            student(tokens[None]).logits[0, :-1], sequence.topk[:-1], labels, reduction="sum", **words
        )
        count += int((labels != -100).sum())
    return total / count


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


CONFIG = DistillConfig(divergence="reverse_kl", ce_weight=0.3, distill_weight=0.7)


@pytest.fixture(scope="module")
def eight(cache, sequences):
    """(examples with ragged lengths and masks, the loss and gradients of one batch of all of them)."""
    masked = [("s0", 12), ("s1", 0), ("s2", 5), ("s3", 0), ("s0", 0), ("s1", 9), ("s2", 16), ("s3", 2)]
    examples = [{"key": key, "labels": [-100] * n + sequences[key][n:].tolist()} for key, n in masked]
    student = tiny_llama(seed=5)
    want = reference(student, cache, examples, CONFIG)
    names, parameters = zip(*student.named_parameters(), strict=True)
    return examples, want.item(), dict(zip(names, torch.autograd.grad(want, parameters), strict=True))


@pytest.mark.parametrize("side", ["right", "left", pytest.param("packed", marks=needs_packing)])
@pytest.mark.parametrize("batch, steps", [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_gradients_do_not_depend_on_accumulation(cache, eight, tmp_path, batch, steps, side):
    """Every split has micro-batches of unequal numbers of targets, and some without any."""
    examples, want, expected = eight
    caught = Gradients()
    trainer = trainer_of(
        tiny_llama(seed=5),
        cache,
        tmp_path,
        side=side,
        distill=CONFIG,
        data=examples,
        callbacks=[caught],
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=steps,
        per_device_eval_batch_size=batch,
        learning_rate=0.0,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(want, abs=2e-4)
    assert caught.found.keys() == expected.keys()
    for name, grad in caught.found.items():
        torch.testing.assert_close(grad, expected[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(want, abs=1e-5), "evaluation is the same objective"


def test_num_items_as_int_tensor_or_none(cache, model, tmp_path):
    student = tiny_llama(seed=5)
    trainer = trainer_of(student, cache, tmp_path)
    batch = CacheCollator(cache, 0)(KEYS)
    count = int((batch["labels"] != -100).sum())
    mean = trainer.compute_loss(student, dict(batch)).item()
    for items in (count, torch.tensor(count)):
        assert trainer.compute_loss(student, dict(batch), num_items_in_batch=items).item() == pytest.approx(
            mean, rel=1e-6
        )
    assert trainer.compute_loss(student, dict(batch), num_items_in_batch=2 * count).item() == pytest.approx(
        mean / 2, rel=1e-6
    )


def test_twenty_steps_bring_the_loss_down_and_logs_carry_the_parts(cache, tmp_path):
    config = DistillConfig(ce_weight=0.1, distill_weight=0.9)
    trainer = trainer_of(tiny_llama(seed=5), cache, tmp_path, distill=config, max_steps=20, learning_rate=5e-3)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 20 and logs[-1]["loss"] < 0.7 * logs[0]["loss"]
    assert after["eval_loss"] < 0.7 * before["eval_loss"]
    for entry in logs:
        assert entry["loss"] == pytest.approx(0.9 * entry["distill"] + 0.1 * entry["ce"], abs=1e-3)
    assert before["eval_loss"] == pytest.approx(0.9 * before["eval_distill"] + 0.1 * before["eval_ce"], abs=1e-3)
    assert logs[0]["distill"] == pytest.approx(before["eval_distill"], abs=1e-3), "evaluation takes the same path"


def test_logged_parts_do_not_depend_on_accumulation(cache, tmp_path):
    def first_log(batch, steps):
        options = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": steps,
            "max_steps": 2,
            "logging_steps": 2,
        }
        trainer = trainer_of(
            tiny_llama(seed=5),
            cache,
            tmp_path,
            distill=DistillConfig(ce_weight=0.5),
            learning_rate=0.0,
            **options,
        )
        trainer.train()
        return trainer.state.log_history[0]

    whole, split = first_log(4, 1), first_log(1, 4)
    for name in ("loss", "distill", "ce"):
        assert split[name] == pytest.approx(whole[name], rel=1e-3)


class KeyOnly(Trainer):
    """Somebody's own subclass, with a collator's output that the mixin has to serve."""


def test_the_mixin_serves_other_trainers(cache, model, sequences, tmp_path):
    class Mixed(DistillMixin, KeyOnly):
        pass

    trainer = trainer_of(copy.deepcopy(model), cache, tmp_path, cls=Mixed)
    assert abs(trainer.compute_loss(trainer.model, exact_batch(cache, model, sequences, "right")).item()) < 1e-6


def test_columns_of_a_dataset_survive_the_trainer(cache, sequences, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict(
        {
            "key": list(sequences),
            "input_ids": [t.tolist() for t in sequences.values()],
            "unused": [0] * 4,
        }
    )
    trainer = trainer_of(tiny_llama(), cache, tmp_path, data=rows)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 1
    # an ordinary Trainer drops the key; the collator says so instead of going on without a teacher
    plain = Trainer(
        model=tiny_llama(),
        args=arguments(tmp_path),
        train_dataset=rows,
        data_collator=CacheCollator(cache, 0),
    )
    with pytest.raises(TypeError, match="has no 'key'"):
        plain.train()


@pytest.mark.parametrize("missing", ["teacher_ids", "teacher_log_rest", "labels"])
def test_a_batch_without_teacher_rows_is_an_error(cache, tmp_path, missing):
    collator = CacheCollator(cache, 0)

    def dropping(examples):
        batch = collator(examples)
        del batch[missing]
        return batch

    trainer = trainer_of(tiny_llama(), cache, tmp_path)
    trainer.data_collator = dropping
    with pytest.raises(ValueError, match=f"the batch has no {missing}"):
        trainer.train()
    with pytest.raises(ValueError, match=f"the batch has no {missing}"):
        trainer.evaluate()


def test_arguments_that_would_be_ignored_are_refused(cache, tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        trainer_of(tiny_llama(), cache, tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="compute_loss_func"):
        DistillTrainer(model=tiny_llama(), args=arguments(tmp_path), compute_loss_func=lambda *a, **k: 0)


def test_another_vocabulary_is_refused_and_padding_can_be_named(model, sequences, tmp_path):
    spec = ps.cache.Spec(vocab_size=VOCAB - 20, k=8)
    with ps.cache.Writer(tmp_path / "c", spec) as writer:
        for key, tokens in sequences.items():
            with torch.no_grad():
                logits = model(torch.from_numpy(tokens).long()[None]).logits[0]
            writer.add(key, tokens, ps.topk(logits, 8, vocab_size=VOCAB - 20))
    cache = ps.cache.open(tmp_path / "c")
    with pytest.raises(ValueError, match="vocabulary of 280, the student's head over 300"):
        trainer_of(copy.deepcopy(model), cache, tmp_path)
    trainer = trainer_of(copy.deepcopy(model), cache, tmp_path, distill=DistillConfig(vocab_size=VOCAB - 20))
    assert abs(trainer.compute_loss(trainer.model, trainer.data_collator(KEYS)).item()) < 2e-3


def test_metrics_get_full_logits(cache, sequences, tmp_path):
    seen = {}

    def metrics(prediction):
        seen["shape"] = prediction.predictions.shape
        return {"mean": float(prediction.predictions.mean())}

    trainer = DistillTrainer(
        model=tiny_llama(),
        args=arguments(tmp_path),
        eval_dataset=KEYS,
        data_collator=CacheCollator(cache, 0),
        compute_metrics=metrics,
    )
    assert "eval_mean" in trainer.evaluate() and seen["shape"] == (
        4,
        max(map(len, sequences.values())),
        VOCAB,
    )


def test_student_hidden_calls_the_wrapper(cache, model):
    class Wrapper(nn.Module):
        calls = 0

        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **inputs):
            self.calls += 1
            return self.module(**inputs)

    wrapped = Wrapper(model)
    batch = CacheCollator(cache, 0, padding_side="left")(KEYS)
    hidden, outputs = student_hidden(wrapped, batch)
    assert wrapped.calls == 1 and hidden.shape == (4, 23, 32) and outputs.logits.shape == (4, 1, VOCAB)


def test_an_adapter_on_the_head_is_refused(cache, tmp_path):
    class Adapter(nn.Linear):
        pass

    student = tiny_llama()
    adapted = Adapter(32, VOCAB, bias=False)
    adapted.base_layer = student.lm_head
    student.set_output_embeddings(adapted)
    with pytest.raises(ValueError, match="wrapped by an adapter"):
        trainer_of(student, cache, tmp_path)


def test_the_installed_transformers_is_one_the_adapter_was_written_for():
    assert (4, 51) <= tuple(int(x) for x in transformers.__version__.split(".")[:2]) < (6, 0)


def test_another_temperature_where_the_cache_has_its_rest(model, sequences, tmp_path):
    """The recorded rest reaches the loss, which then is KL at that temperature; without it the loss refuses."""
    spec = ps.cache.Spec(vocab_size=VOCAB, k=8, teacher="tiny", values="fp32", temperatures=(1.0, 2.0))
    with ps.cache.Writer(tmp_path / "c", spec) as writer:
        for key, tokens in sequences.items():
            with torch.no_grad():
                z = model(torch.as_tensor(tokens, dtype=torch.int64)[None]).logits[0]
            writer.add(key, tokens, ps.topk(z, 8, temperatures=(2.0,)))
    student = tiny_llama(5)
    trainer = trainer_of(student, ps.cache.open(tmp_path / "c"), tmp_path, distill=DistillConfig(temperature=2.0))
    batch = trainer.data_collator(KEYS)
    loss = trainer.compute_loss(student, dict(batch))
    rows = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        zs, zt = (
            m(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1][rows] for m in (student, model)
        )
    expected = ps.distill_loss(zs, ps.topk(zt, 8, temperatures=(2.0,)), temperature=2.0)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    del batch["teacher_log_rest_at_2.0"]
    with pytest.raises(ValueError, match=r"temperature=2.0.*recorded at \[1.0\]"):
        trainer.compute_loss(student, dict(batch))
