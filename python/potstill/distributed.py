"""Heads of models whose parameters are cut over data-parallel processes: gathered once, the gradient goes back.

Not to be confused with a head that stays cut along the vocabulary: `Head(rows, vocab_size=, vocab_start=, group=)`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from potstill.capture.hidden import fsdp2_units, unwrap
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
    are. FSDP2: after `student_hidden` the head is still whole from the forward's own all-gather and FSDP reduces its
    gradient; without gradients its unit is released when the context ends. A DTensor (FSDP2 without that forward,
    tensor parallelism): one all-gather; in backward the gradient is averaged over the processes and each keeps its
    shard. ZeRO-3: gathered here, and released with the context or, where it learns, after the backward.

    What the model applies to its logits is not asked of the sharded model: call `Head.from_model(model)` once before it
    is sharded, and what it finds is remembered; otherwise the usual meaning of the configuration is taken.

    vocab_size, hidden: as for Head.from_model.
    dtype: of the gathered copy; the dtype of the hidden states under FSDP2's mixed precision.

    Raises ValueError for a weight that is cut along more than one dimension of a device mesh, and for FSDP1.
    """
    _refuse_fsdp1(model)
    inner = unwrap(model)
    module = output_projection(inner)
    try:
        with zero3_gathered([x for x in (module.weight, module.bias) if x is not None]):
            yield head_of(inner, vocab_size=vocab_size, hidden=hidden, check=False, whole=lambda x: gathered(x, dtype))
    finally:
        if not torch.is_grad_enabled():  # with gradients the backward releases them
            for unit in fsdp2_units(model, module):
                unit.reshard()


def is_sharded(model: Any) -> bool:
    """Whether a parameter of the model is in shards (a DTensor, or ZeRO-3's)."""
    return any(type(p).__name__ == "DTensor" or hasattr(p, "ds_id") for p in model.parameters())


def _refuse_fsdp1(model: Any) -> None:
    if "torch.distributed.fsdp.fully_sharded_data_parallel" not in sys.modules:
        return
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise ValueError(
            "the model is wrapped by FullyShardedDataParallel (FSDP1), whose head is a view into a flat shard: shard "
            "it with FSDP2 (torch's fully_shard; fsdp_version: 2 in accelerate's configuration)"
        )


@contextlib.contextmanager
def zero3_gathered(parameters: list[Any]) -> Iterator[None]:
    """Those of the parameters that ZeRO-3 has cut are whole inside, and where they learn, until the backward has ended:
    a gradient is accumulated into a parameter that has its shape.
    """
    learning = torch.is_grad_enabled()
    with contextlib.ExitStack() as stack:
        for x in parameters:
            if hasattr(x, "ds_id") and learning and x.requires_grad:
                x.all_gather()
            elif hasattr(x, "ds_id"):
                import deepspeed  # whose parameters they are

                stack.enter_context(deepspeed.zero.GatheredParameters([x]))
        yield


def gathered(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x, gathered (and converted to `dtype`) where it is a DTensor. It keeps its memory when ZeRO-3 releases x."""
    from torch.distributed.tensor import DTensor

    if not isinstance(x, DTensor):
        return _Zero3.apply(x) if hasattr(x, "ds_id") else x
    if sum(not placement.is_replicate() for placement in x.placements) > 1:
        raise ValueError(
            f"the head is placed as {x.placements} over {x.device_mesh}: cut more than once. With tensor parallelism "
            "keep the vocabulary cut: Head(rows, vocab_size=, vocab_start=, group=)"
        )
    return _Gather.apply(x if dtype is None else x.to(dtype))


class _Zero3(torch.autograd.Function):
    """A gathered parameter of ZeRO-3, released after the backward that gives it its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Tensor:  # type: ignore[override]
        ctx.parameter = x
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x = ctx.parameter

        def release() -> None:
            if not x.ds_active_sub_modules:  # else the embedding that it is tied to has it, and is released by ZeRO-3
                x.partition()

        torch.autograd.Variable._execution_engine.queue_callback(release)
        return grad


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
