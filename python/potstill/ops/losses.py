"""The ops of the losses: schemas, fakes, autograd.

  linear_distill        the weighted sum of the row losses; gradients are made in the forward pass, once
  linear_distill_rows   the row losses; gradients are made again in the backward pass, from the incoming ones
  distill_rows          the row losses of logits at hand; the gradient is made in the backward pass

The teacher is a list of tensors and a plan that says what they are (targets.py); it gets no gradient. `bounds` [2, N]
are those of a masked teacher, and may.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from potstill import divergences, row_losses
from potstill.chunked import Task, Wanted, linear_rows, logits_rows
from potstill.ops.library import Op, no_second_derivative, register, side_of, wide
from potstill.rows import RowSpec

TASK = "Tensor[] teacher, float[] numbers, str plan, Tensor? bounds, Tensor coef, Tensor? labels"
# side is (vocab_size, scale, softcap); metrics are names between commas
SPEC = (
    "str divergence, float[] values, float[] side, str tail, float temperature, float distill_weight, "
    "float ce_weight, str metrics, int chunk_rows, bool precise, str backend"
)
STUDENT = "Tensor hidden, Tensor weight, Tensor? bias"
WANT = "bool want_hidden, bool want_weight, bool want_bias, bool want_bounds"
SCHEMAS = {
    "linear_distill": f"({STUDENT}, {TASK}, {SPEC}, {WANT})"
    " -> (Tensor loss, Tensor parts, Tensor d_hidden, Tensor d_weight, Tensor d_bias, Tensor d_bounds)",
    "linear_distill_rows": f"({STUDENT}, {TASK}, {SPEC}, {WANT}) -> (Tensor loss, Tensor parts)",
    "linear_distill_rows_backward": f"({STUDENT}, {TASK}, {SPEC}, {WANT})"
    " -> (Tensor d_hidden, Tensor d_weight, Tensor d_bias, Tensor d_bounds)",
    "distill_rows": f"(Tensor logits, {TASK}, {SPEC}, bool want_bounds) -> (Tensor loss, Tensor parts)",
    "distill_rows_backward": f"(Tensor logits, {TASK}, {SPEC}, bool want_bounds) -> (Tensor d_logits, Tensor d_bounds)",
    "scale_gradients": "(Tensor grad, Tensor d_hidden, Tensor d_weight, Tensor d_bias, Tensor d_bounds)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
}
N_TASK, N_SPEC = TASK.count(",") + 1, SPEC.count(",") + 1
BOUNDS, COEF, METRICS = 3, 4, 7  # places within TASK, within TASK, within SPEC


def task_of(args: tuple[Any, ...], lead: int) -> Task:
    """The arguments after the student's as a Task."""
    teacher, numbers, plan, bounds, coef, labels = args[lead : lead + N_TASK]
    name, values, side, tail, temperature, distill_weight, ce_weight, names, *how = args[lead + N_TASK :][:N_SPEC]
    entry: Any = divergences.TABLE.get(name) or row_losses.TABLE[name]
    entry = entry(**{p.name: v for p, v in zip(entry.parameters, values, strict=True)})
    spec = RowSpec(entry, side_of(side), None, tail, temperature, distill_weight, ce_weight)
    return Task(teacher, numbers, plan, bounds, coef, labels, spec, tuple(names.split(",")) if names else (), *how)


def weighed(parts: Tensor, spec: RowSpec) -> Tensor:
    """Row losses [N]: an unweighted part is left out, so that an infinity in it stays out."""
    loss = spec.distill_weight * parts[0] if spec.distill_weight else torch.zeros_like(parts[0])
    return loss + spec.ce_weight * parts[1] if spec.ce_weight else loss


def linear_distill(*args: Any) -> tuple[Tensor, ...]:
    task = task_of(args, 3)
    parts, *grads = linear_rows(args[0], args[1], args[2], task, Wanted(*args[-4:]))
    loss = torch.where(task.coef != 0, task.coef * weighed(parts, task.spec), 0.0).sum()
    return (loss, parts, *grads)


def linear_distill_rows(*args: Any) -> tuple[Tensor, Tensor]:
    task = task_of(args, 3)
    parts = linear_rows(args[0], args[1], args[2], task, Wanted())[0]
    return weighed(parts, task.spec), parts


def linear_distill_rows_backward(*args: Any) -> tuple[Tensor, ...]:
    return linear_rows(args[0], args[1], args[2], task_of(args, 3), Wanted(*args[-4:]))[1:]


def distill_rows(*args: Any) -> tuple[Tensor, Tensor]:
    task = task_of(args, 1)
    parts = logits_rows(args[0], task, Wanted())[0]
    return weighed(parts, task.spec), parts


def distill_rows_backward(*args: Any) -> tuple[Tensor, Tensor]:
    return logits_rows(args[0], task_of(args, 1), Wanted(hidden=True, bounds=args[-1]))[1:]


def scale_gradients(grad: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:
    return tuple(g * grad.to(g.dtype) for g in saved)


def _fake_bounds(x: Tensor, wanted: bool) -> Tensor:
    return x.new_empty((2, x.shape[0]) if wanted else 0, dtype=wide(x))


def _fake_grads(args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, *_ = args
    want_hidden, want_weight, want_bias, want_bounds = args[-4:]
    d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if want_hidden else hidden.new_empty(0)
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if want_weight else weight.new_empty(0)
    d_bias = weight.new_empty(weight.shape[0] if want_bias else 0)
    return d_hidden, d_weight, d_bias, _fake_bounds(hidden, want_bounds)


def _fake_rows(args: tuple[Any, ...], lead: int) -> tuple[Tensor, Tensor]:
    x, names = args[0], args[lead + N_TASK + METRICS]
    rows = 2 + (len(names.split(",")) if names else 0)
    return x.new_empty(x.shape[0], dtype=wide(x)), x.new_empty(rows, x.shape[0], dtype=wide(x))


def _fake_linear_distill(*args: Any) -> tuple[Tensor, ...]:
    loss, parts = _fake_rows(args, 3)
    return (loss.new_empty(()), parts, *_fake_grads(args))


def _fake_logits_backward(*args: Any) -> tuple[Tensor, Tensor]:
    d_logits = torch.empty_like(args[0], memory_format=torch.contiguous_format)
    return d_logits, _fake_bounds(args[0], args[-1])


FAKES = {
    "linear_distill": _fake_linear_distill,
    "linear_distill_rows": lambda *args: _fake_rows(args, 3),
    "linear_distill_rows_backward": lambda *args: _fake_grads(args),
    "distill_rows": lambda *args: _fake_rows(args, 1),
    "distill_rows_backward": _fake_logits_backward,
    "scale_gradients": lambda grad, *saved: tuple(torch.empty_like(g) for g in saved),
}


def _no_gradients(inputs: Any) -> list[Any]:
    """None for each input, and a list of None for a list of tensors, as autograd wants it."""
    lists = [isinstance(x, list) and all(isinstance(t, Tensor) for t in x) for x in inputs]
    return [[None] * len(x) if many else None for x, many in zip(inputs, lists, strict=True)]


def _save_linear_distill(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, parts, *grads = output
    coef = inputs[3 + COEF]
    ctx.distill_weight, ctx.ce_weight = inputs[3 + N_TASK + 5], inputs[3 + N_TASK + 6]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*grads, parts if coef.requires_grad else None)
    ctx.want, ctx.none = inputs[-4:], _no_gradients(inputs)


def _freed_after(saved: list[Tensor]) -> bool:
    """Whether the running backward frees the graph, so that what it saved is nobody's any more (not while tracing)."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is not None and all(type(x) is Tensor for x in saved) and not keeps()


def _backward_linear_distill(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    out = list(ctx.none)
    if grad is None:
        return tuple(out)
    *saved, parts = ctx.saved_tensors
    if _freed_after(saved):  # in place: a second [V, D] would double the peak
        one = grad.device.type == "cpu" and grad.item() == 1  # a look is cheap on a CPU
        scaled = tuple(saved) if one else tuple(g.mul_(grad.to(g.dtype)) for g in saved)
    else:
        scaled = torch.ops.potstill.scale_gradients(grad, *saved)
    for place, gradient, wanted in zip((0, 1, 2, 3 + BOUNDS), scaled, ctx.want, strict=True):
        if wanted:
            out[place] = gradient
    if parts is not None:
        weights = (ctx.distill_weight, ctx.ce_weight)
        out[3 + COEF] = grad * sum(w * part for w, part in zip(weights, parts, strict=False) if w)
    return tuple(out)


def save_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors: list[Tensor] = []
    kept: list[Any] = []  # an input, or where its tensors are among the saved ones
    for x in inputs:
        if isinstance(x, Tensor):
            kept.append(("one", len(tensors)))
            tensors.append(x)
        elif isinstance(x, list) and x and isinstance(x[0], Tensor):
            kept.append(("many", len(tensors), len(x)))
            tensors += x
        else:
            kept.append(("as it is", x))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.kept, ctx.none = kept, _no_gradients(inputs)


def rows_arguments(ctx: Any, grad: Tensor, lead: int) -> list[Any]:
    """The saved inputs with coef multiplied by the incoming gradient of each row."""
    saved = ctx.saved_tensors
    args: list[Any] = []
    for how, value, *count in ctx.kept:
        if how == "as it is":
            args.append(value)
        else:  # not detached: a second derivative must meet the backward op, which refuses it
            args.append(list(saved[value : value + count[0]]) if how == "many" else saved[value])
    place = lead + COEF
    args[place] = torch.where(args[place] != 0, args[place] * grad, 0.0)
    return args


def _backward_linear_distill_rows(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    out = list(ctx.none)
    if grad is not None:
        args = rows_arguments(ctx, grad, 3)
        grads = torch.ops.potstill.linear_distill_rows_backward(*args)
        for place, gradient, wanted in zip((0, 1, 2, 3 + BOUNDS), grads, args[-4:], strict=True):
            if wanted:
                out[place] = gradient
    return tuple(out)


def _backward_distill_rows(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    out = list(ctx.none)
    if grad is not None and (ctx.needs_input_grad[0] or ctx.needs_input_grad[1 + BOUNDS]):
        args = rows_arguments(ctx, grad, 1)
        out[0], d_bounds = torch.ops.potstill.distill_rows_backward(*args)
        if args[-1]:
            out[1 + BOUNDS] = d_bounds
    return tuple(out)


AUTOGRAD: dict[str, tuple[Any, Any]] = {
    "linear_distill": (_backward_linear_distill, _save_linear_distill),
    "linear_distill_rows": (_backward_linear_distill_rows, save_rows),
    "linear_distill_rows_backward": (no_second_derivative, None),
    "distill_rows": (_backward_distill_rows, save_rows),
    "distill_rows_backward": (no_second_derivative, None),
    "scale_gradients": (no_second_derivative, None),
}

for _name, _schema in SCHEMAS.items():
    register(Op(_name, _schema, globals()[_name], FAKES[_name], *AUTOGRAD[_name]))
