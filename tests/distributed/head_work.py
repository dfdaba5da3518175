"""What each process does in test_heads.py: data-parallel training with the head in shards."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import potstill as ps
import torch
import torch.distributed as dist
from potstill.capture.hidden import final_hidden
from potstill.distributed import materialized_head
from torch import nn

V, D, B, L = 101, 12, 2, 5


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


class Tiny(nn.Module):
    """Embedding, two blocks, a head: what final_hidden and Head.from_model need of a causal LM."""

    def __init__(self, tied: bool):
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(final_logit_softcapping=9.0)
        self.embed, self.blocks = nn.Embedding(V, D), nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(D, V, bias=not tied)
        if tied:
            self.lm_head.weight = self.embed.weight
        self.double()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


def batch(rank: int) -> tuple[torch.Tensor, torch.Tensor, ps.TopK]:
    g = torch.Generator().manual_seed(100 + rank)
    ids = torch.randint(0, V, (B, L), generator=g)
    labels = torch.randint(0, V, (B, L), generator=g)
    labels[0, : 1 + rank] = -100  # another number of rows in each process
    return ids, labels, ps.topk(torch.randn(B, L, V, generator=g, dtype=torch.float64) * 2, 7)


def loss_of(model, rank: int, **words) -> torch.Tensor:
    ids, labels, teacher = batch(rank)
    hidden, _ = final_hidden(model, input_ids=ids)
    with materialized_head(model) as head:
        assert type(head.weight) in (torch.Tensor, nn.Parameter) and head.weight.shape == (V, D)
        return ps.linear_distill_loss(hidden, head, teacher, labels, ce_weight=0.3, **words)


def plain(world: int, tied: bool, **words):
    """One process: (losses by rank, gradients of their mean)."""
    model = Tiny(tied)
    losses = torch.stack([loss_of(model, rank, **words) for rank in range(world)])
    losses.mean().backward()
    return losses.detach(), {name: p.grad for name, p in model.named_parameters()}


def fsdp2(rank: int, world: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    for tied, own_unit, low_memory in (
        (True, False, False),
        (False, False, True),
        (False, True, False),
        (False, True, True),
    ):
        words = dict(low_memory=low_memory)
        losses, grads = plain(world, tied, **words)
        model = Tiny(tied)
        for module in [*model.blocks, *([model.lm_head] if own_unit else [])]:
            fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for training in (False, True, True):
            model.train(training)
            model.zero_grad()
            with torch.set_grad_enabled(training):
                loss = loss_of(model, rank, **words)
            torch.testing.assert_close(loss.detach(), losses[rank], msg=f"{tied} {own_unit} train={training}")
            if not training:
                continue
            loss.backward()
            for name, p in model.named_parameters():
                got = p.grad.full_tensor()
                torch.testing.assert_close(got, grads[name], msg=f"{name} tied={tied} own_unit={own_unit}")


def ddp(rank: int, world: int) -> None:
    """num_items counts the rows of all processes; DDP averages, so the loss is multiplied by their number."""
    from torch.nn.parallel import DistributedDataParallel

    count = sum(int((batch(r)[1] != -100).sum()) for r in range(world))
    alone = Tiny(True)
    ids, labels, tops = zip(*(batch(r) for r in range(world)), strict=True)
    teacher = ps.TopK(*(torch.cat([getattr(t, f) for t in tops]) for f in ("ids", "log_probs", "log_rest")))
    hidden, _ = final_hidden(alone, input_ids=torch.cat(ids))
    whole = ps.linear_distill_loss(
        hidden, ps.Head.from_model(alone, check=False), teacher, torch.cat(labels), ce_weight=0.3
    )
    whole.backward()
    model = DistributedDataParallel(copy.deepcopy(alone))
    model.zero_grad()
    loss = loss_of(model, rank, num_items=torch.tensor(count))
    total = loss.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, whole.detach())
    (loss * world).backward()
    for (name, p), q in zip(alone.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)
