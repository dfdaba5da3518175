"""Blocks trained and scored one by one: each is fed what the teacher's block in its place is fed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

Loss = Callable[[Tensor, Tensor], Tensor]
Score = Callable[[Any, Any], float | Tensor]


def first_tensor(output: Any) -> Tensor:
    """The hidden states in a block's output: the output itself, or the first of a tuple."""
    found = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(found, Tensor):
        raise TypeError(f"a block gave {type(output).__name__}; a tensor, or a tuple that begins with one, is needed")
    return found


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (tuple, list)):
        return type(value)(_detached(v) for v in value)
    if isinstance(value, dict):
        return {name: _detached(v) for name, v in value.items()}
    return value


def block_losses(
    teacher: nn.Module, students: Mapping[str, nn.Module], *args: Any, loss: Loss = mse_loss, backward: bool = False,
    scale: float = 1.0, **kwargs: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """Runs `teacher(*args, **kwargs)` once; each student block is given what the teacher's block of that name is given.

    students: module name in the teacher ("model.layers.3", or a part of a layer) -> the block that is to replace it.
        The teacher's own output goes on to the next block, so that every student block has its own graph.
    loss: (student's output, teacher's output [..., D], detached) -> scalar, such as `hidden` losses of this package.
    backward: call `(scale * loss).backward()` at once, so that one block's graph exists at a time.

    The block-local distillation of Puzzle (arXiv:2411.19146, normalised squared error), mmMamba (arXiv:2502.13145, mean
    squared error x 1000 on attention outputs) and MaTVLM (arXiv:2503.13440, Frobenius norm), read in the authors' code.
    """
    modules = dict(teacher.named_modules())
    if missing := [name for name in students if name not in modules]:
        raise ValueError(f"the teacher has no module {missing[0]!r}; its modules are named by teacher.named_modules()")
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            if name in found:
                raise ValueError(f"module {name!r} ran twice in one call; its losses would be mixed")
            with torch.enable_grad():
                made = first_tensor(students[name](*_detached(given), **_detached(named)))
                value = loss(made, first_tensor(output).detach())
                if backward:
                    (scale * value).backward()
            found[name] = value.detach() if backward else value

        return hook

    with ExitStack() as stack, torch.no_grad():
        for name in students:
            stack.enter_context(_hook(modules[name], watch(name)))
        teacher(*args, **kwargs)
    if missing := [name for name in students if name not in found]:
        raise ValueError(f"module {missing[0]!r} did not run in the teacher's forward")
    return found


@contextmanager
def _hook(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replaced(model: nn.Module, blocks: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """The model with the named modules exchanged for `blocks`, until the end of the with-block."""
    homes = {}
    for name in blocks:
        parent, _, last = name.rpartition(".")
        home = model.get_submodule(parent)
        homes[name] = (home, last, getattr(home, last))
    try:
        for name, block in blocks.items():
            setattr(homes[name][0], homes[name][1], block)
        yield model
    finally:
        for home, last, original in homes.values():
            setattr(home, last, original)


def assembled(model: nn.Module, blocks: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of the model with the named modules exchanged (the blocks themselves, not copies)."""
    copied = copy.deepcopy(model)
    for name, block in blocks.items():
        parent, _, last = name.rpartition(".")
        setattr(copied.get_submodule(parent), last, block)
    return copied


class _Recorded(nn.Module):
    """Stands for a block of which the output is known; everything else is asked of the block itself."""

    def __init__(self, block: nn.Module, output: Any) -> None:
        super().__init__()
        self.__dict__["block"], self.__dict__["output"] = block, output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.__dict__["output"]


@torch.no_grad()
def replace_one_scores(
    model: nn.Module, candidates: Mapping[str, Mapping[str, nn.Module]], batches: Iterable[Mapping[str, Any]],
    run: Callable[[nn.Module, Mapping[str, Any]], Any], score: Score, *, order: list[str] | None = None,
) -> dict[tuple[str, str], float]:  # fmt: skip
    """The mean over batches of score(outputs of the model with one block replaced, outputs of the whole model).

    candidates: module name -> name of a candidate -> block.  run(model, batch): its outputs, for example
        `lambda m, b: final_hidden(m, **b)[0]`.  score(changed, whole): a number, the smaller the better, for example
        the forward KL by `linear_distill_loss`.
    order: the names of a chain of blocks in the order in which they run (a model's layers), each of which is given
        nothing but its predecessor's output and what the model gives all of them. The blocks before the one in question
        are then not computed again. None runs the whole model each time; the scores are the same.
    Returns {(module name, candidate): score}. The scoring of Puzzle (arXiv:2411.19146, read in the authors' code),
    whose choice among candidates is an integer programme outside of this library.
    """
    modules = dict(model.named_modules())
    for name in [*candidates, *(order or [])]:
        if name not in modules:
            raise ValueError(f"the model has no module {name!r}; its modules are named by model.named_modules()")
    if order is not None and (outside := [name for name in candidates if name not in order]):
        raise ValueError(f"module {outside[0]!r} has candidates and is not in order={order}")
    totals: dict[tuple[str, str], float] = {}
    count = 0
    for batch in batches:
        count += 1
        outputs: dict[str, Any] = {}
        with ExitStack() as stack:
            for name in order or []:
                stack.enter_context(_hook(modules[name], _record(outputs, name)))
            whole = run(model, batch)
        for name, blocks in candidates.items():
            before = order[: order.index(name)] if order else []
            known = {n: _Recorded(modules[n], outputs[n]) for n in before}
            for label, block in blocks.items():
                with replaced(model, {**known, name: block}):
                    value = float(score(run(model, batch), whole))
                totals[name, label] = totals.get((name, label), 0.0) + value
    return {which: total / count for which, total in totals.items()}


def _record(outputs: dict[str, Any], name: str) -> Callable[..., None]:
    def hook(_: nn.Module, __: tuple[Any, ...], ___: dict[str, Any], output: Any) -> None:
        outputs[name] = output

    return hook
