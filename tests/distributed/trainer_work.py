"""What each process does in test_trainers.py: a transformers Trainer over several processes, held against one."""

from __future__ import annotations

import os
from pathlib import Path

import potstill as ps
import torch
import torch.distributed as dist
from potstill.integrations.transformers import CacheCollator, DistillConfig, DistillTrainer
from tiny_model import tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback, TrainingArguments

VOCAB, WIDTH = 300, 32
CONFIG = DistillConfig(divergence="reverse_kl", distill_weight=0.7, ce_weight=0.3, metrics=("kl", "student_entropy"))


def write_cache(folder: Path) -> None:
    """Sequences of unequal length with rows of no model in particular."""
    g = torch.Generator().manual_seed(0)
    with ps.cache.Writer(folder, ps.cache.Spec(vocab_size=VOCAB, k=8, values="fp32")) as writer:
        for i, n in enumerate((23, 9, 17, 3)):
            tokens = torch.randint(1, VOCAB, (n,), generator=g)
            writer.add(f"s{i}", tokens.numpy(), ps.topk(torch.randn(n, VOCAB, generator=g) * 3, 8))


def example(key: str, length: int, learnt: bool = True) -> dict:
    return {"key": key} if learnt else {"key": key, "labels": [-100] * length}


def student(**config):
    return tiny_llama(5, pad_token_id=0, **config)


def alone(cache, examples, **config):
    """(loss, parts, gradients by name) of all the examples in one process: the mean over rows with a target."""
    model = student(**config)
    batch = CacheCollator(cache, 0)(examples)
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    rows = ps.TopK(batch["teacher_ids"], batch["teacher_log_probs"], batch["teacher_log_rest"])
    words = {name: value for name, value in CONFIG.options().items() if name != "low_memory"}
    loss, parts = ps.distill_loss(logits, rows, labels, return_metrics=CONFIG.metrics, **words)
    loss.backward()
    return loss.item(), {n: v.item() for n, v in parts.items()}, {n: p.grad for n, p in model.named_parameters()}


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters()}


def trainer_of(cache, folder, examples, model, **options) -> tuple[DistillTrainer, Gradients]:
    caught = Gradients()
    defaults = {
        "report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "max_steps": 1, "optim": "sgd",
        "max_grad_norm": 0.0, "logging_steps": 1, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
        "average_tokens_across_devices": True, "learning_rate": 0.0,
    }  # fmt: skip
    trainer = DistillTrainer(
        model=model, args=TrainingArguments(str(folder), **{**defaults, **options}), train_dataset=examples,
        eval_dataset=examples, data_collator=CacheCollator(cache, 0), distill=CONFIG, callbacks=[caught],
    )  # fmt: skip
    return trainer, caught


def processes(rank: int, world: int) -> None:
    """What a launcher sets."""
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    os.environ.update({name: str(value) for name, value in where.items()}, ACCELERATE_USE_CPU="true")


def same(found: dict, expected: dict, scale: float = 1.0) -> None:
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        grad = getattr(grad, "full_tensor", lambda g=grad: g)()
        torch.testing.assert_close(
            grad, scale * expected[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def work(rank: int, world: int, folder: str) -> None:
    """All in the same processes: importing transformers costs more than all of the training."""
    from tensor_work import tensor_parallel

    processes(rank, world)
    data_parallel(rank, world, folder)
    fsdp2(rank, world, folder)
    tensor_parallel(rank, world, f"{folder}-models")


def data_parallel(rank: int, world: int, folder: str) -> None:
    cache = ps.cache.open(folder)
    ragged = [example(f"s{i}", 0) for i in range(4)]
    loss, parts, grads = alone(cache, ragged)
    trainer, caught = trainer_of(cache, folder, ragged, student(), gradient_accumulation_steps=2)
    assert trainer.accelerator.num_processes == world
    trainer.train()
    same(caught.found, grads)
    log = trainer.state.log_history[0]
    for name, value in {"loss": loss, **parts}.items():
        assert abs(log[name] - value) < 2e-4, (name, log[name], value)

    # three examples over two processes: one is repeated to fill the last batch, and counts once
    expected, parts, _ = alone(cache, ragged[:3])
    found = trainer.evaluate(ragged[:3])
    for name, value in {"loss": expected, **parts}.items():
        assert abs(found[f"eval_{name}"] - value) < 1e-4, (name, found, value)

    # nothing to learn in one of the processes
    one_sided = [example("s0", 23), example("s2", 17, learnt=False)]
    loss, _, grads = alone(cache, one_sided)
    for across, scale in ((True, 1.0), (False, 0.5)):
        trainer, caught = trainer_of(cache, folder, one_sided, student(), average_tokens_across_devices=across)
        trainer.train()
        same(caught.found, grads, scale)
    nothing = [example("s0", 23, learnt=False), example("s2", 17, learnt=False)]
    trainer, caught = trainer_of(cache, folder, nothing, student())
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == 0 and all((g == 0).all() for g in caught.found.values())


class Gathers(TorchDispatchMode):
    """Counts the collectives that give a tensor as large as the head, or as the embedding."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "c10d" in func.namespace and "allgather" in func.name().replace("_", ""):
            tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            self.count += max(x.numel() for x in tensors) >= VOCAB * WIDTH
        return out


def fsdp2(rank: int, world: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    cache = ps.cache.open(folder)
    mesh = init_device_mesh("cpu", (world,))
    examples = [example(f"s{i}", 0) for i in range(4)]
    for tied, units in ((True, "root"), (False, "head"), (False, "norm and head")):
        config = {"tie_word_embeddings": tied}
        loss, parts, grads = alone(cache, examples, **config)
        model = student(**config)
        ps.Head.from_model(model, hidden="head_input")  # asked while whole
        own = {"root": [], "head": [model.lm_head], "norm and head": [[model.model.norm, model.lm_head]]}[units]
        for module in [*model.model.layers, *own]:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        # as from_pretrained(distributed_config=...) leaves it: the Trainer then wraps nothing around
        model._is_distributed_loading_by_transformers = model._is_fsdp_managed_module = True
        trainer, caught = trainer_of(cache, folder, examples, model, per_device_train_batch_size=2)
        with Gathers() as gathers:
            trainer.train()
        where = f"tied={tied} units={units}"
        once = 1 if tied else 2  # the embedding, and the head where it is another parameter
        assert gathers.count == once, f"{where}: {gathers.count} all-gathers in one step"
        same(caught.found, grads)
        assert abs(trainer.state.log_history[0]["loss"] - loss) < 2e-4, where
        with Gathers() as gathers:
            found = trainer.evaluate()
        assert gathers.count == 2 * once, f"{where}: {gathers.count} all-gathers in two evaluation steps"
        for name, value in {"loss": loss, **parts}.items():
            assert abs(found[f"eval_{name}"] - value) < 1e-4, (where, name, found, value)
        dist.barrier()
