"""The op of a loss whose vocabulary is in parts: schema, fakes, autograd (the engine is parts.py).

    linear_distill_parts   the row losses, and what the backward needs of them: stats [5, N], entries [N, K].
                           `start`, `group` and `tiled` are those of parts_inputs.Shard.

Where `group` names a process group, forward and backward hold collectives: every process of it calls both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from potstill.chunked import Task, Wanted
from potstill.ops.library import Op, no_second_derivative, register, wide
from potstill.ops.losses import SPEC, STUDENT, TASK, rows_arguments, save_rows, task_of, weighed
from potstill.parts import linear_parts, linear_parts_backward
from potstill.parts_inputs import PartTeacher, Shard
from potstill.rows import RowSpec, Side
from potstill.targets import parse, scaled

SHARD = "int start, str group, bool tiled"
WANT = "bool want_hidden, bool want_weight, bool want_bias"
ARGUMENTS = f"{STUDENT}, {TASK}, {SPEC}, {SHARD}, {WANT}"
SCHEMAS = {
    "linear_distill_parts": f"({ARGUMENTS}) -> (Tensor loss, Tensor parts, Tensor stats, Tensor entries)",
    "linear_distill_parts_backward": f"({ARGUMENTS}, Tensor stats, Tensor entries)"
    " -> (Tensor d_hidden, Tensor d_weight, Tensor d_bias)",
}
N_AFTER = SHARD.count(",") + WANT.count(",") + 2


def teacher_of(task: Task, start: int) -> tuple[PartTeacher, RowSpec]:
    """The task's teacher as the engine takes it for a shard from `start` on, and the objective with its side."""
    read = parse(task.plan)
    ratio = task.numbers[read["ratio"]]

    def at(place: int | None) -> Tensor | None:
        return None if place is None else task.teacher[place]

    def side(places: list[int]) -> Side:
        vocab_size, scale, softcap = (task.numbers[i] for i in places)
        return scaled(Side(int(vocab_size), scale, softcap), ratio)

    match read["source"]:
        case ["hidden", hidden, weight, bias, numbers]:
            teacher = PartTeacher(hidden=at(hidden), weight=at(weight), bias=at(bias))
        case ["logits", logits, numbers]:
            teacher = PartTeacher(logits=task.teacher[logits][:, start:])  # given for the whole vocabulary
        case ["topk", ids, log_probs, log_rest, weights, *_]:
            places = (ids, log_probs, log_rest, weights)
            ids_at, *others = (at(x) for x in places)
            return PartTeacher(None, None, None, None, ids_at, *others), task.spec
        case source:
            raise AssertionError(source)
    return teacher, replace(task.spec, teacher=side(numbers))


def _call(args: tuple[Any, ...]) -> tuple[Task, dict[str, Any]]:
    """The task and the engine's arguments, of linear_distill_parts' arguments."""
    task = task_of(args, 3)
    start, group, tiled = args[-N_AFTER:][:3]
    teacher, spec = teacher_of(task, start)
    shard = Shard(spec.student.vocab_size, start, group, tiled)
    given: dict[str, Any] = dict(zip(("hidden", "weight", "bias"), args[:3], strict=True))
    return task, given | dict(
        teacher=teacher, coef=task.coef, labels=task.labels, spec=spec, shard=shard, rows=task.rows,
        precise=task.precise, backend=task.backend,
    )  # fmt: skip


def linear_distill_parts(*args: Any) -> tuple[Tensor, ...]:
    task, call = _call(args)
    parts, stats, entries = linear_parts(**call)
    return weighed(parts, task.spec), parts, stats, entries


def linear_distill_parts_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *own, stats, entries = args
    return linear_parts_backward(**_call(tuple(own))[1], stats=stats, entries=entries, want=Wanted(*own[-3:]))


def _fake_parts(*args: Any) -> tuple[Tensor, ...]:
    hidden, task = args[0], task_of(args, 3)
    n = hidden.shape[0]
    source = parse(task.plan)["source"]
    k = task.teacher[source[1]].shape[1] if source[0] == "topk" else 0
    kind = wide(hidden)
    return (
        hidden.new_empty(n, dtype=kind),
        hidden.new_empty(2, n, dtype=kind),
        hidden.new_empty(5, n, dtype=torch.float64),
        hidden.new_empty(n, k, dtype=kind),
    )


def _fake_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = args[:2]
    want_hidden, want_weight, want_bias = args[-5:-2]
    return (
        hidden.new_empty(hidden.shape if want_hidden else 0),
        weight.new_empty(weight.shape if want_weight else 0),
        weight.new_empty(weight.shape[0] if want_bias else 0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, stats, entries = output
    save_rows(ctx, (*inputs, stats, entries), output)
    ctx.none = ctx.none[:-2]
    ctx.mark_non_differentiable(stats, entries)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    out = list(ctx.none)
    if grad is not None:
        args = rows_arguments(ctx, grad, 3)
        grads = torch.ops.potstill.linear_distill_parts_backward(*args)
        for i, wanted in enumerate(args[-5:-2]):
            out[i] = grads[i] if wanted else None
    return tuple(out)


ENTRIES = (
    (linear_distill_parts, _fake_parts, _backward, _save),
    (linear_distill_parts_backward, _fake_backward, no_second_derivative, None),
)
for _run, *_rest in ENTRIES:
    register(Op(_run.__name__, SCHEMAS[_run.__name__], _run, *_rest))
