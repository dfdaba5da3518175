"""Final hidden states of a causal LM through its own forward, without its logits."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn


def unwrap(model: Any) -> Any:
    """The causal LM inside data-parallel, DeepSpeed, torch.compile and peft wrappers."""
    while True:
        own = hasattr(type(model), "get_output_embeddings")  # DeepSpeed's engine has its model's attributes besides
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(getattr(model, "module", None), nn.Module) and not own:
            model = model.module
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def fsdp2_units(model: nn.Module, module: nn.Module) -> list[Any]:
    """The FSDP2 units (`fully_shard`) around a module, itself included, the innermost first."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # where it was never imported nothing is sharded by it
    unit_type = getattr(fsdp, "FSDPModule", None)
    name = None if unit_type is None else next((name for name, m in model.named_modules() if m is module), None)
    if unit_type is None or name is None:
        return []
    path = name.split(".") if name else []
    around = (model.get_submodule(".".join(path[:n])) for n in range(len(path), -1, -1))
    return [m for m in around if isinstance(m, unit_type)]


def final_hidden(model: nn.Module, *, all_logits: bool = False, **inputs: Any) -> tuple[Tensor, Any]:
    """Runs `model(**inputs)`; (hidden [B, L, D], outputs): hidden is exactly what the model's head is given.

    The whole forward runs, wrappers included, so the hooks of DDP and FSDP fire; the head itself is given the
    last position only, so `outputs.logits` is [B, 1, V] and nothing of size [B, L, V] exists. With
    `all_logits` the head runs on every position. `position_ids` is left out for models whose forward has no
    such argument. Under FSDP2 the units around the head are told to stay whole after their forward (as a root does by
    default): the loss takes the weight from the same all-gather, and as it does not come from these units' outputs,
    nothing would gather them again for the backward.

    Raises TypeError when the model has no output embeddings, ValueError when its forward did not call them
    once.
    """
    inner = unwrap(model)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if head is None:
        raise TypeError(
            f"{type(inner).__name__} has no output embeddings: a causal language model with a head is needed"
        )
    if "position_ids" in inputs and "position_ids" not in inspect.signature(inner.forward).parameters:
        inputs.pop("position_ids")
    for unit in fsdp2_units(model, head):
        if not hasattr(unit, "set_reshard_after_forward"):
            raise RuntimeError(
                f"torch {torch.__version__} cannot keep a unit of FSDP2 whole after its forward (its FSDPModule has no "
                "set_reshard_after_forward, which torch 2.6 lacks): take a newer torch, or train without FSDP2"
            )
        unit.set_reshard_after_forward(False, recurse=False)
    caught: list[Tensor] = []

    def catch(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        caught.append(args[0])
        return args if all_logits else (args[0][..., -1:, :], *args[1:])

    # before ZeRO-3's own hook, which would wait in the backward for a gradient of the head's output
    handle = head.register_forward_pre_hook(catch, prepend=hasattr(head.weight, "ds_id"))
    try:
        outputs = model(**inputs)
    finally:
        handle.remove()
    ids = inputs.get("input_ids")
    if len(caught) != 1 or (ids is not None and caught[0].shape[:-1] != ids.shape):
        shapes = [tuple(c.shape) for c in caught]
        raise ValueError(
            f"{type(inner).__name__} called its head {len(caught)} times with inputs of shape {shapes}, "
            "once with [B, L, D] is "
            "needed: its final hidden states cannot be taken this way"
        )
    return caught[0], outputs


@torch.no_grad()
def teacher_hidden(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
    """hidden [B, L, D] of `model` on `input_ids` [B, L] without gradients or a key-value cache."""
    parameters = inspect.signature(unwrap(model).forward).parameters
    if "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        inputs["use_cache"] = False
    return final_hidden(model, input_ids=input_ids, attention_mask=attention_mask, **inputs)[0]
