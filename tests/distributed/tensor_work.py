"""What each process does with a model cut by transformers' own tensor parallelism, held against one process."""

from __future__ import annotations

from pathlib import Path

import potstill as ps
import torch
import torch.distributed as dist
from potstill.distributed import materialized_head
from potstill.integrations.collator import next_token_labels
from potstill.integrations.transformers import student_hidden
from tiny_model import tiny_llama

VOCAB = 301  # shares of unequal size
WORDS = dict(divergence="reverse_kl", distill_weight=0.7, ce_weight=0.3)


def inputs() -> tuple[dict[str, torch.Tensor], torch.Tensor, ps.TopK]:
    """The same in every process: (batch [2, 11], labels, teacher rows)."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCAB, (2, 11), generator=g)
    labels = next_token_labels(ids.masked_fill(torch.rand(2, 11, generator=g) < 0.3, -100))
    return {"input_ids": ids}, labels, ps.topk(torch.randn(2, 11, VOCAB, generator=g) * 3, 8)


def gathered_head(model):
    return materialized_head(model, hidden="head_input")


def cut_head(model):
    """The head as it lies: this process's rows of it, the vocabulary over the mesh."""
    import contextlib

    weight = model.lm_head.weight
    first = weight.device_mesh.get_local_rank() * -(-VOCAB // weight.device_mesh.size())
    head = ps.Head(weight.to_local(), vocab_size=VOCAB, vocab_start=first, group=weight.device_mesh.get_group())
    return contextlib.nullcontext(head)


def loss_of(model, head_of) -> torch.Tensor:
    batch, labels, teacher = inputs()
    hidden, _ = student_hidden(model, batch)
    with head_of(model) as head:
        return ps.linear_distill_loss(hidden, head, teacher, labels, **WORDS)


def tensor_parallel(rank: int, world: int, folder: str) -> None:
    from torch.distributed.tensor import DTensor
    from transformers import LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    for tied in (False, True):
        alone = tiny_llama(5, vocab_size=VOCAB, tie_word_embeddings=tied).train()
        expected = loss_of(alone, gathered_head)
        expected.backward()
        grads = {name: p.grad for name, p in alone.named_parameters()}
        path = Path(folder, f"model-{tied}")
        if rank == 0:
            alone.save_pretrained(path)
        dist.barrier()
        config = DistributedConfig(tp_plan="auto", tp_size=world)
        model = LlamaForCausalLM.from_pretrained(path, distributed_config=config, dtype=torch.float32)
        cut = {name for name, p in model.named_parameters() if isinstance(p, DTensor)}
        assert isinstance(model.lm_head.weight, DTensor) and len(model.lm_head.weight.to_local()) < VOCAB
        assert len(cut) >= 2 * 7 + 1, cut  # seven projections a layer, and the head
        for head_of in (gathered_head, cut_head):
            for training in (False, True):
                model.train(training).zero_grad()
                with torch.set_grad_enabled(training):
                    loss = loss_of(model, head_of)
                torch.testing.assert_close(loss.detach(), expected.detach(), atol=1e-5, rtol=1e-5)
            loss.backward()
            for name, p in model.named_parameters():
                grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
                torch.testing.assert_close(
                    grad, grads[name], atol=1e-5, rtol=1e-4,
                    msg=lambda m, n=name, t=tied, h=head_of: f"{n} tied={t} {h.__name__}: {m}",
                )  # fmt: skip
        dist.barrier()
