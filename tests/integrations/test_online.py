"""A teacher model beside the student: the same objective as full logits, whatever its dtype and padding."""

from __future__ import annotations

import copy

import potstill as ps
import pytest
import torch
from potstill.integrations.online import TargetsOnly
from potstill.integrations.transformers import CacheCollator, DistillConfig, DistillTrainer
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DataCollatorWithFlattening, TrainingArguments

from .. import tiny_model
from .conftest import VOCAB, needs_packing, tiny_llama


@pytest.fixture(scope="module")
def examples(sequences):
    return [{"input_ids": tokens.tolist(), "labels": tokens.tolist()} for tokens in sequences.values()]


def collate(side):
    def padded(examples):
        ids, labels = ([torch.tensor(x[name]) for x in examples] for name in ("input_ids", "labels"))
        masks = [torch.ones_like(x) for x in ids]

        def pad(rows, value):
            return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)

        return {"input_ids": pad(ids, 0), "labels": pad(labels, -100), "attention_mask": pad(masks, 0)}

    return padded


def trainer_of(student, teacher, examples, tmp_path, *, collator=None, distill=None, **options):
    defaults = {
        "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "max_grad_norm": 0.0,
        "max_steps": 1, "learning_rate": 0.0, "logging_steps": 1, "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
    }  # fmt: skip
    return DistillTrainer(
        model=student, args=TrainingArguments(str(tmp_path), **{**defaults, **options}), train_dataset=examples,
        eval_dataset=examples, data_collator=collator or collate("right"), distill=distill, teacher=teacher,
    )  # fmt: skip


def expected(student, teacher, examples, size=VOCAB, **words):
    """The mean over every row with a target, by full logits, one sequence at a time."""
    total, count = 0.0, 0
    for example in examples:
        tokens = torch.tensor(example["input_ids"])
        with torch.no_grad():
            theirs = teacher(tokens[None]).logits[0, :-1, :size].float()
        logits = student(tokens[None]).logits[0, :-1]
        labels = torch.tensor(example["labels"])[1:]
        total = total + ps.distill_loss(logits, ps.LogitsTeacher(theirs), labels, reduction="sum", **words)
        count += int((labels != -100).sum())
    return total / count


@pytest.mark.parametrize(
    "batch, steps, side",
    [(4, 1, "right"), (1, 4, "right"), (4, 1, "left"), pytest.param(2, 2, "packed", marks=needs_packing)],
)
def test_equal_to_full_logits_in_training_and_evaluation(examples, tmp_path, batch, steps, side):
    student, teacher = tiny_llama(5), tiny_llama(6)
    words = {"divergence": "jsd", "temperature": 2.0, "ce_weight": 0.2, "distill_weight": 0.8}
    want = expected(student, teacher, examples, **words)
    want.backward()
    grads = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    trainer = trainer_of(
        student, teacher, examples, tmp_path, distill=DistillConfig(**words), per_device_train_batch_size=batch,
        gradient_accumulation_steps=steps, collator=DataCollatorWithFlattening() if side == "packed" else collate(side),
    )  # fmt: skip
    found = []
    trainer.optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    trainer.optimizer.register_step_pre_hook(lambda *_: found.extend(p.grad.clone() for p in student.parameters()))
    trainer.train()
    torch.testing.assert_close(found, grads, atol=1e-5, rtol=1e-5)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(want.item(), abs=2e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(want.item(), abs=1e-5)


def test_self_distillation_is_zero_and_another_teacher_is_not(model, examples, tmp_path):
    trainer = trainer_of(copy.deepcopy(model), copy.deepcopy(model), examples, tmp_path)
    assert abs(trainer.evaluate()["eval_loss"]) < 1e-6
    assert trainer_of(tiny_llama(5), model, examples, tmp_path).evaluate()["eval_loss"] > 0.1


@pytest.mark.parametrize("dtype, near", [(torch.float64, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_teacher_of_another_width_dtype_and_padding(examples, tmp_path, dtype, near):
    teacher = tiny_model.tiny_llama(7, vocab_size=VOCAB + 20, hidden_size=48, pad_token_id=0).to(dtype)
    student = tiny_llama(5)
    want = expected(student, teacher, examples, VOCAB).item()
    trainer = trainer_of(student, teacher, examples, tmp_path, distill=DistillConfig(vocab_size=VOCAB))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(want, rel=near)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    with pytest.raises(ValueError, match="vocabulary of 320, the student's over 300.*vocab_size=len.tokenizer."):
        trainer_of(student, teacher, examples, tmp_path)


def test_mixed_precision_reaches_the_head(examples, tmp_path):
    plain = trainer_of(tiny_llama(5), tiny_llama(6), examples, tmp_path).evaluate()["eval_loss"]
    trainer = trainer_of(tiny_llama(5), tiny_llama(6), examples, tmp_path, bf16=True)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(plain, rel=0.05)


class Calls(TorchDispatchMode):
    """The gradients that the loss was asked for, and how often a number was read back."""

    def __init__(self):
        super().__init__()
        self.wanted, self.reads = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.potstill.linear_distill.default:
            self.wanted.append(args[-4:])  # hidden, weight, bias, bounds
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_lora_student_asks_for_no_gradient_of_its_frozen_head(cache, tmp_path):
    peft = pytest.importorskip("peft")
    student = peft.get_peft_model(tiny_llama(5), peft.LoraConfig(target_modules=["q_proj"], r=2))
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], max_steps=1, save_strategy="no", disable_tqdm=True, logging_steps=1
    )
    data = [{"key": key} for key in cache]
    trainer = DistillTrainer(
        model=student, args=args, train_dataset=data, eval_dataset=data, data_collator=CacheCollator(cache, 0)
    )
    with Calls() as calls:
        trainer.train()
    assert calls.wanted == [(True, False, False, False)]
    moved = [p for n, p in student.named_parameters() if "lora_B" in n]
    assert moved and all((p != 0).any() for p in moved), "the adapter learns"
    assert trainer.evaluate()["eval_loss"] > 0.1


def test_metrics_are_logged_and_read_nothing_back_before(cache, tmp_path):
    def first_log(metrics):
        args = TrainingArguments(
            str(tmp_path), use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, max_grad_norm=0.0,
            per_device_train_batch_size=4, max_steps=3, logging_steps=3, learning_rate=0.0,
        )  # fmt: skip
        data, distill = [{"key": key} for key in cache], DistillConfig(metrics=metrics, ce_weight=0.1)
        trainer = DistillTrainer(
            model=tiny_llama(5), args=args, train_dataset=data, eval_dataset=data, distill=distill,
            data_collator=CacheCollator(cache, 0),
        )  # fmt: skip
        with Calls() as calls:
            trainer.train()
        return trainer.state.log_history[0], trainer.evaluate(), calls.reads

    names = ("kl", "student_entropy", "teacher_mass", "agreement")
    log, evaluated, reads = first_log(names)
    plain, _, fewer = first_log(())
    assert reads == fewer, "a metric read something back in a step"
    assert log["loss"] == pytest.approx(plain["loss"], abs=1e-6)
    for name in ("distill", "ce", *names):
        assert log[name] == pytest.approx(evaluated[f"eval_{name}"], abs=1e-4), name
    assert log["kl"] == pytest.approx(log["distill"], rel=1e-4) and 0 <= log["agreement"] <= 1
    assert log["student_entropy"] > 0.1 and log["teacher_mass"] == pytest.approx(1, abs=1e-2)


def test_labels_that_no_row_predicts_are_left_out():
    left = {
        "labels": torch.tensor([[-100, 5, 6, 7], [4, 5, 6, 7]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]),
    }
    assert TargetsOnly(lambda _: left)([])["labels"].tolist() == [[-100, -100, 6, 7], [-100, 5, 6, 7]]
    packed = {"labels": torch.tensor([[3, 4, 5, 6]]), "position_ids": torch.tensor([[0, 1, 0, 1]])}
    assert TargetsOnly(lambda _: packed)([])["labels"].tolist() == [[-100, 4, -100, 6]]


def test_a_teacher_and_a_cache_at_once_are_refused(cache, model, tmp_path):
    with pytest.raises(ValueError, match="both a teacher and a cache"):
        trainer_of(tiny_llama(5), model, [], tmp_path, collator=CacheCollator(cache, 0))
    with pytest.raises(TypeError, match="must be a loaded model, not str"):
        trainer_of(tiny_llama(5), "a/name", [], tmp_path)
