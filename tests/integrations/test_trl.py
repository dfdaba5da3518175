"""TRL's losses by ours: the same values and gradients, and TRL's own trainers running on them."""

from __future__ import annotations

import copy

import numpy as np
import potstill as ps
import pytest
import torch
from potstill.integrations.transformers import CacheCollator, DistillConfig, DistillMixin
from potstill.integrations.trl import chunked_divergence_loss, divergence_of, generalized_jsd_loss

from .conftest import VOCAB, tiny_llama

pytest.importorskip("trl")
gkd = pytest.importorskip("trl.experimental.gkd")
from trl.trainer import distillation_trainer  # noqa: E402

theirs = gkd.GKDTrainer.generalized_jsd_loss
B, L, V, D, DT = 3, 5, 61, 16, 24


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def labels():
    found = torch.randint(0, V, (B, L), generator=torch.Generator().manual_seed(3))
    found[0, :3] = found[2] = -100
    return found


@pytest.mark.parametrize("beta", [0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_generalized_jsd_loss(labels, beta, temperature):
    z, teacher = randn(B, L, V, seed=1) * 3, randn(B, L, V, seed=2) * 3
    calls = [dict(reduction=r, labels=x) for r in ("batchmean", "sum", "mean") for x in (labels, None)]
    calls += [dict(num_items_in_batch=n, labels=labels) for n in (7, torch.tensor(7))]
    for words in calls:
        words |= dict(beta=beta, temperature=temperature)
        pair = []
        for loss in (generalized_jsd_loss, theirs):
            student = z.clone().requires_grad_()
            value = loss(student, teacher, **words)
            pair.append((value.detach(), *torch.autograd.grad(value, student)))
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-6, msg=lambda m, w=words: f"{w}: {m}")


def test_where_it_differs(labels):
    z, teacher = randn(B, L, V, seed=1), randn(B, L, V, seed=2)
    nothing = torch.full_like(labels, -100)
    assert generalized_jsd_loss(z, teacher, nothing) == theirs(z, teacher, nothing) == 0
    banned = [x.index_fill(-1, torch.tensor([4]), -torch.inf) for x in (z, teacher)]
    without = [torch.cat([x[..., :4], x[..., 5:]], -1) for x in (z, teacher)]
    torch.testing.assert_close(generalized_jsd_loss(*banned), generalized_jsd_loss(*without))
    near = (teacher + 0.01 * z).bfloat16()  # close to each other, 16 bits, as late in training
    truth = theirs(near.double(), teacher.bfloat16().double(), labels, beta=0.9)
    assert generalized_jsd_loss(near, teacher.bfloat16(), labels, beta=0.9).item() == pytest.approx(
        truth.item(), rel=1e-3
    )
    with pytest.raises(ValueError, match="reduction='none' is not offered"):
        generalized_jsd_loss(z, teacher, reduction="none")
    with pytest.raises(ValueError, match="beta=1.5 must lie in 0..1"):
        divergence_of(1.5)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_chunked_divergence_loss(beta):
    mask = torch.ones(B, L)
    mask[0, 2:] = mask[2] = 0
    words = dict(temperature=1.7, student_logit_scale=0.5, teacher_final_logit_softcapping=4.0)
    for items in (None, 11, torch.tensor(11)):
        pair = []
        for loss in (chunked_divergence_loss, distillation_trainer._chunked_divergence_loss):
            h, w, bias = (randn(*s, seed=i).requires_grad_() for i, s in enumerate([(B, L, D), (V, D), (V,)]))
            teacher = randn(B, L, DT, seed=4), w, randn(V, DT, seed=5)
            found = loss(h, *teacher, mask, beta, items, student_lm_head_bias=bias, **words)
            pair.append((*(x.detach() for x in found), *torch.autograd.grad(found[0], (h, w, bias))))
        torch.testing.assert_close(*pair, rtol=2e-4, atol=1e-5)


def options(tmp_path, **more):
    return {
        "output_dir": str(tmp_path), "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
        "max_steps": 1, "logging_steps": 1, "learning_rate": 0.0, "max_grad_norm": 0.0, "bf16": False,
        "per_device_train_batch_size": 4, "gradient_checkpointing": False, "max_length": None, **more,
    }  # fmt: skip


def test_sft_trainer_on_a_cache(cache, sequences, tokenizer, tmp_path):
    """The mixin's loss instead of SFT's, in training and evaluation; TRL's own columns and metrics stay out of it."""
    import datasets
    import trl
    from potstill.integrations.transformers import DistillTrainer
    from transformers import TrainingArguments

    class Trainer(DistillMixin, trl.SFTTrainer):
        pass

    data = datasets.Dataset.from_dict({"key": list(sequences), "input_ids": [t.tolist() for t in sequences.values()]})
    words = {"train_dataset": data, "eval_dataset": data, "distill": DistillConfig(ce_weight=0.2)}
    words |= {"data_collator": CacheCollator(cache, 0), "processing_class": tokenizer}
    trainer = Trainer(tiny_llama(5), args=trl.SFTConfig(**options(tmp_path)), **words)
    trainer.train()
    kept = {n: v for n, v in options(tmp_path).items() if n != "max_length"}
    plain = DistillTrainer(tiny_llama(5), args=TrainingArguments(**kept), **words)
    plain.train()
    found, expected = trainer.state.log_history[0], plain.state.log_history[0]
    for name in ("loss", "distill", "ce"):
        assert found[name] == pytest.approx(expected[name], abs=1e-6)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], abs=1e-6)


@pytest.fixture(scope="module")
def prompts():
    g = np.random.default_rng(1)
    texts = [" ".join(f"w{i}" for i in g.integers(3, VOCAB, n)) for n in (5, 3, 6, 4)]
    import datasets

    return datasets.Dataset.from_dict({"prompt": texts})


def gkd_batch(_):
    ids = torch.randint(3, VOCAB, (4, 9), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, 7:] = -100
    ones = torch.ones_like(ids)
    return {
        "input_ids": ids, "labels": labels, "attention_mask": ones, "prompts": ids[:, :4],
        "prompt_attention_mask": ones[:, :4],
    }  # fmt: skip


def test_gkd_trainer_by_its_function_and_by_the_mixin(prompts, tokenizer, tmp_path):
    class Ours(gkd.GKDTrainer):
        generalized_jsd_loss = staticmethod(generalized_jsd_loss)

    class Fused(DistillMixin, gkd.GKDTrainer):
        pass

    losses = {}
    for cls in (gkd.GKDTrainer, Ours, Fused):
        args = gkd.GKDConfig(**options(tmp_path), lmbda=0.0, beta=0.3)
        more = {"distill": DistillConfig(divergence=divergence_of(0.3))} if cls is Fused else {}
        trainer = cls(
            tiny_llama(5), tiny_llama(6), args=args, train_dataset=prompts, processing_class=tokenizer,
            data_collator=gkd_batch, **more,
        )  # fmt: skip
        trainer.train()
        losses[cls] = trainer.state.log_history[0]["loss"]
    assert losses[gkd.GKDTrainer] > 0.1
    assert losses[Ours] == pytest.approx(losses[gkd.GKDTrainer], rel=1e-4)
    assert losses[Fused] == pytest.approx(losses[gkd.GKDTrainer], rel=1e-4)


def test_distillation_trainer_on_our_loss(prompts, tokenizer, tmp_path, monkeypatch):
    import trl

    original, seen = distillation_trainer._chunked_divergence_loss, []

    def both(*args, **kwargs):
        ours, reference = chunked_divergence_loss(*args, **kwargs), original(*args, **kwargs)
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
        seen.append(ours[0].item())
        return ours

    monkeypatch.setattr(distillation_trainer, "_chunked_divergence_loss", both)
    words = {n: v for n, v in options(tmp_path).items() if n != "max_length"}
    args = trl.DistillationConfig(**words, max_completion_length=4, beta=0.5)
    trainer = trl.DistillationTrainer(
        model=copy.deepcopy(tiny_llama(5)), teacher_model=tiny_llama(6), args=args, train_dataset=prompts,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    assert seen and seen[0] > 0.1 and trainer.state.log_history[0]["loss"] == pytest.approx(seen[0], rel=1e-3)


def test_self_distillation_through_each_form_is_zero(model, sequences):
    tokens = torch.from_numpy(sequences["s0"]).long()[None]
    with torch.no_grad():
        out = model(tokens, output_hidden_states=True)
    hidden, weight, mask = out.hidden_states[-1], model.lm_head.weight.detach(), torch.ones(tokens.shape)
    for beta in (0.0, 0.5, 1.0):
        assert abs(generalized_jsd_loss(out.logits, out.logits, beta=beta)) < 1e-6
        assert abs(chunked_divergence_loss(hidden, hidden, weight, weight, mask, beta)[0]) < 1e-6
        shifted = hidden.roll(1, 1)
        assert chunked_divergence_loss(hidden, shifted, weight, weight, mask, beta)[0] > 0.05
        assert generalized_jsd_loss(out.logits, out.logits.roll(1, 1), beta=beta) > 0.05
    assert ps.divergences.get("forward_kl") == divergence_of(0)
