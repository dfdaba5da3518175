"""What each process does in test_zero3.py: a student cut by DeepSpeed's ZeRO-3, held against one process."""

from __future__ import annotations

import os

import potstill as ps
import torch
from potstill.distributed import materialized_head
from potstill.integrations.collator import CacheCollator, next_token_labels
from potstill.integrations.transformers import student_hidden
from trainer_work import CONFIG, alone, example, processes, student


def zero3(rank: int, world: int, folder: str) -> None:
    processes(rank, world)
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__.clear()  # none is compiled

    cache = ps.cache.open(folder)
    examples = [example(f"s{i}", 0) for i in range(4)]
    for tied in (False, True):
        loss, _, grads = alone(cache, examples, tie_word_embeddings=tied)
        model = student(tie_word_embeddings=tied)
        ps.Head.from_model(model, hidden="head_input")  # asked while whole
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True,
                "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            },
        )  # fmt: skip
        assert engine.module.lm_head.weight.numel() == 0, "the head is in shards"
        batch = CacheCollator(cache, 0)(examples)
        rows = (batch["labels"] != -100).sum()
        batch = {name: value[2 * rank : 2 * rank + 2] for name, value in batch.items()}
        teacher = ps.TopK(batch["teacher_ids"], batch["teacher_log_probs"], batch["teacher_log_rest"])
        words = dict(num_items=rows, **CONFIG.options())
        for training in (False, True):
            engine.train(training)
            with torch.set_grad_enabled(training):
                hidden, _ = student_hidden(engine, batch)
                with materialized_head(engine, hidden="head_input") as head:
                    own = ps.linear_distill_loss(hidden, head, teacher, next_token_labels(batch["labels"]), **words)
            total = own.detach().clone()
            torch.distributed.all_reduce(total)
            torch.testing.assert_close(total.item(), loss, rtol=1e-5, atol=1e-6)
        engine.backward(own * world)
        assert engine.module.lm_head.weight.numel() == 0, "the head is released again"
        engine.step()
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            moved = {name: before[name] - p.detach() for name, p in model.named_parameters()}  # lr = 1: the gradients
        for name, grad in moved.items():
            torch.testing.assert_close(grad, grads[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        engine.destroy()
