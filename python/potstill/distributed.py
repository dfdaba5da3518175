"""Heads of models whose parameters are cut over data-parallel processes: gathered once, the gradient goes back.

Not to be confused with a head that stays cut along the vocabulary: `Head(rows, vocab_size=, vocab_start=, group=)`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from potstill.capture.hidden import unwrap
from potstill.heads import head_of, output_projection
from potstill.teachers import Head


@contextlib.contextmanager
def materialized_head(
    model: Any, *, vocab_size: int | None = None, hidden: str | None = None, dtype: torch.dtype | None = None
) -> Iterator[Head]:
    """`Head.from_model(model)` where FSDP2 or ZeRO-3 may have left the head in shards, tied to the embedding or not.

    with materialized_head(model) as head:
        loss = linear_distill_loss(hidden, head, teacher)

    A collective: every process enters it, in training and in evaluation. Parameters that are whole are taken as they
    are. FSDP2 (a DTensor): one all-gather; in backward the gradient is averaged over the processes and each keeps its
    shard, as FSDP does with other parameters. ZeRO-3: `deepspeed.zero.GatheredParameters` while the context is open.

    What the model applies to its logits is not asked of the sharded model: call `Head.from_model(model)` once before it
    is sharded, and what it finds is remembered; otherwise the usual meaning of the configuration is taken.

    vocab_size, hidden: as for Head.from_model.
    dtype: of the gathered copy; the dtype of the hidden states under FSDP2's mixed precision.

    Raises ValueError for a weight that is cut along more than one dimension of a device mesh (tensor parallelism).
    """
    inner = unwrap(model)
    module = output_projection(inner)
    with _zero3([x for x in (module.weight, module.bias) if hasattr(x, "ds_id")]):
        yield head_of(inner, vocab_size=vocab_size, hidden=hidden, check=False, whole=lambda x: _whole(x, dtype))


def _zero3(parameters: list[Any]) -> Any:
    """DeepSpeed's context in which these parameters are whole; nothing for none."""
    if not parameters:
        return contextlib.nullcontext()
    import deepspeed  # whose parameters they are

    return deepspeed.zero.GatheredParameters(parameters)


def _whole(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """x gathered where it is a DTensor. The result keeps its memory when the parameter is released."""
    from torch.distributed.tensor import DTensor

    if not isinstance(x, DTensor):
        return x.view_as(x) if hasattr(x, "ds_id") else x
    if sum(not placement.is_replicate() for placement in x.placements) > 1:
        raise ValueError(
            f"the head is placed as {x.placements} over {x.device_mesh}: cut more than once. With tensor parallelism "
            "keep the vocabulary cut: Head(rows, vocab_size=, vocab_start=, group=)"
        )
    return _Gather.apply(x if dtype is None else x.to(dtype))


class _Gather(torch.autograd.Function):
    """A DTensor whole; its gradient averaged over the mesh and cut again."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Tensor:  # type: ignore[override]
        ctx.mesh, ctx.placements = x.device_mesh, x.placements
        return x.full_tensor()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        from torch.distributed.tensor import DTensor, Partial

        parts = [Partial()] * ctx.mesh.ndim
        whole = DTensor.from_local(grad.contiguous(), ctx.mesh, parts, run_check=False)
        return whole.redistribute(ctx.mesh, ctx.placements) / ctx.mesh.size()
