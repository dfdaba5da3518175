"""The ops of the losses: schemas, fakes, autograd.

linear_distill        the weighted sum of the row losses; gradients are made in the forward pass, once
linear_distill_rows   the row losses; gradients are made again in the backward pass, from the incoming ones
distill_rows          the row losses of logits at hand; the gradient is made in the backward pass
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from potstill import divergences
from potstill.chunked import TeacherRows, Wanted, linear_rows, logits_rows
from potstill.ops.library import Op, no_second_derivative, register, side_of, wide
from potstill.rows import RowSpec

TEACHER = (
    "Tensor? t_hidden, Tensor? t_weight, Tensor? t_bias, Tensor? t_logits, Tensor? ids, Tensor? log_probs, "
    "Tensor? log_rest"
)
# sides are (vocab_size, scale, softcap); t_side is empty for a sparse teacher
SPEC = (
    "str divergence, float[] values, float[] s_side, float[] t_side, str tail, float temperature, "
    "float distill_weight, float ce_weight, int chunk_rows, bool precise, str backend"
)
STUDENT = "Tensor hidden, Tensor weight, Tensor? bias"
WANT = "bool want_hidden, bool want_weight, bool want_bias"
SCHEMAS = {
    "linear_distill": f"({STUDENT}, {TEACHER}, Tensor coef, Tensor? labels, {SPEC}, {WANT})"
    " -> (Tensor loss, Tensor parts, Tensor d_hidden, Tensor d_weight, Tensor d_bias)",
    "linear_distill_rows": f"({STUDENT}, {TEACHER}, Tensor coef, Tensor? labels, {SPEC}, {WANT})"
    " -> (Tensor loss, Tensor parts)",
    "linear_distill_rows_backward": f"({STUDENT}, {TEACHER}, Tensor coef, Tensor? labels, {SPEC}, {WANT})"
    " -> (Tensor d_hidden, Tensor d_weight, Tensor d_bias)",
    "distill_rows": f"(Tensor logits, {TEACHER}, Tensor coef, Tensor? labels, {SPEC}) -> (Tensor loss, Tensor parts)",
    "distill_rows_backward": f"(Tensor logits, {TEACHER}, Tensor coef, Tensor? labels, {SPEC}) -> Tensor",
    "scale_gradients": "(Tensor grad, Tensor d_hidden, Tensor d_weight, Tensor d_bias) -> (Tensor, Tensor, Tensor)",
}
N_TEACHER = TEACHER.count("Tensor?")
N_SPEC = SPEC.count(",") + 1


def spec_of(settings: tuple[Any, ...]) -> tuple[RowSpec, tuple[int, bool, str]]:
    """The SPEC arguments as a RowSpec and (chunk_rows, precise, backend)."""
    name, values, s_side, t_side, tail, temperature, distill_weight, ce_weight, *rest = settings
    entry = divergences.get(name)
    entry = entry(**{p.name: v for p, v in zip(entry.parameters, values, strict=True)})
    teacher = side_of(t_side) if t_side else None
    spec = RowSpec(entry, side_of(s_side), teacher, tail, temperature, distill_weight, ce_weight)
    rows, precise, backend = rest
    return spec, (rows, precise, backend)


def _weighed(parts: Tensor, spec: RowSpec) -> Tensor:
    """Row losses [N]: an unweighted part is left out, so that an infinity in it stays out."""
    loss = spec.distill_weight * parts[0] if spec.distill_weight else torch.zeros_like(parts[0])
    return loss + spec.ce_weight * parts[1] if spec.ce_weight else loss


def _split(
    args: tuple[Any, ...], lead: int
) -> tuple[TeacherRows, Tensor, Tensor | None, tuple[Any, ...], tuple[Any, ...]]:
    """Arguments after the student's -> teacher, coef, labels, SPEC settings, what follows."""
    teacher = TeacherRows(*args[lead : lead + N_TEACHER])
    coef, labels = args[lead + N_TEACHER : lead + N_TEACHER + 2]
    settings = args[lead + N_TEACHER + 2 :]
    return teacher, coef, labels, settings[:N_SPEC], settings[N_SPEC:]


def _linear(args: tuple[Any, ...], want: Wanted) -> tuple[RowSpec, tuple[Tensor, Tensor, Tensor, Tensor]]:
    hidden, weight, bias = args[:3]
    teacher, coef, labels, settings, _ = _split(args, 3)
    spec, (rows, precise, backend) = spec_of(settings)
    return spec, linear_rows(hidden, weight, bias, teacher, coef, labels, spec, want, rows, precise, backend)


def linear_distill(*args: Any) -> tuple[Tensor, ...]:
    spec, (parts, *grads) = _linear(args, Wanted(*args[-3:]))
    coef = args[3 + N_TEACHER]
    loss = torch.where(coef != 0, coef * _weighed(parts, spec), 0.0).sum()
    return (loss, parts, *grads)


def linear_distill_rows(*args: Any) -> tuple[Tensor, Tensor]:
    spec, (parts, *_) = _linear(args, Wanted())
    return _weighed(parts, spec), parts


def linear_distill_rows_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _linear(args, Wanted(*args[-3:]))[1][1:]


def _logits(args: tuple[Any, ...], want: bool) -> tuple[RowSpec, tuple[Tensor, Tensor]]:
    teacher, coef, labels, settings, _ = _split(args, 1)
    spec, (rows, precise, backend) = spec_of(settings)
    return spec, logits_rows(args[0], teacher, coef, labels, spec, want, rows, precise, backend)


def distill_rows(*args: Any) -> tuple[Tensor, Tensor]:
    spec, (parts, _) = _logits(args, False)
    return _weighed(parts, spec), parts


def distill_rows_backward(*args: Any) -> Tensor:
    return _logits(args, True)[1][1]


def scale_gradients(grad: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:
    return tuple(g * grad.to(g.dtype) for g in saved)


def _fake_grads(args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = args[:2]
    want = Wanted(*args[-3:])
    return (
        torch.empty_like(hidden, memory_format=torch.contiguous_format) if want.hidden else hidden.new_empty(0),
        torch.empty_like(weight, memory_format=torch.contiguous_format) if want.weight else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if want.bias else 0),
    )


def _fake_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], dtype=wide(x)), x.new_empty(2, x.shape[0], dtype=wide(x))


def _fake_linear_distill(*args: Any) -> tuple[Tensor, ...]:
    loss, parts = _fake_rows(args[0])
    return (loss.new_empty(()), parts, *_fake_grads(args))


FAKES = {
    "linear_distill": _fake_linear_distill,
    "linear_distill_rows": lambda *args: _fake_rows(args[0]),
    "linear_distill_rows_backward": lambda *args: _fake_grads(args),
    "distill_rows": lambda *args: _fake_rows(args[0]),
    "distill_rows_backward": lambda *args: torch.empty_like(args[0], memory_format=torch.contiguous_format),
    "scale_gradients": lambda grad, *saved: tuple(torch.empty_like(g) for g in saved),
}


def _save_linear_distill(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, parts, d_hidden, d_weight, d_bias = output
    coef = inputs[3 + N_TEACHER]
    *_, ctx.distill_weight, ctx.ce_weight = inputs[3 + N_TEACHER + 2 :][: N_SPEC - 3]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(d_hidden, d_weight, d_bias, parts if coef.requires_grad else None)
    ctx.want, ctx.count = inputs[-3:], len(inputs)


def _freed_after(saved: list[Tensor]) -> bool:
    """Whether the running backward frees the graph, so that what it saved is nobody's any more (not while tracing)."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is not None and all(type(x) is Tensor for x in saved) and not keeps()


def _backward_linear_distill(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    out: list[Tensor | None] = [None] * ctx.count
    if grad is None:
        return tuple(out)
    *saved, parts = ctx.saved_tensors
    if _freed_after(saved):  # in place: a second [V, D] would double the peak
        one = grad.device.type == "cpu" and grad.item() == 1  # a look is cheap on a CPU
        scaled = tuple(saved) if one else tuple(g.mul_(grad.to(g.dtype)) for g in saved)
    else:
        scaled = torch.ops.potstill.scale_gradients(grad, *saved)
    for i, wanted in enumerate(ctx.want):
        out[i] = scaled[i] if wanted else None
    if parts is not None:
        out[3 + N_TEACHER] = grad * (ctx.distill_weight * parts[0] + ctx.ce_weight * parts[1])
    return tuple(out)


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.inputs = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.places = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]


def _rows_arguments(ctx: Any, grad: Tensor, lead: int) -> list[Any]:
    """The saved inputs with coef multiplied by the incoming gradient of each row."""
    args = list(ctx.inputs)
    for i, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
        args[i] = tensor  # not detached: a second derivative must meet the backward op, which refuses it
    place = lead + N_TEACHER
    args[place] = torch.where(args[place] != 0, args[place] * grad, 0.0)
    return args


def _backward_linear_distill_rows(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    out: list[Tensor | None] = [None] * len(ctx.inputs)
    if grad is not None:
        args = _rows_arguments(ctx, grad, 3)
        grads = torch.ops.potstill.linear_distill_rows_backward(*args)
        for i, wanted in enumerate(args[-3:]):
            out[i] = grads[i] if wanted else None
    return tuple(out)


def _backward_distill_rows(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    out: list[Tensor | None] = [None] * len(ctx.inputs)
    if grad is not None and ctx.needs_input_grad[0]:
        out[0] = torch.ops.potstill.distill_rows_backward(*_rows_arguments(ctx, grad, 1))
    return tuple(out)


AUTOGRAD: dict[str, tuple[Any, Any]] = {
    "linear_distill": (_backward_linear_distill, _save_linear_distill),
    "linear_distill_rows": (_backward_linear_distill_rows, _save_rows),
    "linear_distill_rows_backward": (no_second_derivative, None),
    "distill_rows": (_backward_distill_rows, _save_rows),
    "distill_rows_backward": (no_second_derivative, None),
    "scale_gradients": (no_second_derivative, None),
}

for _name, _schema in SCHEMAS.items():
    register(Op(_name, _schema, globals()[_name], FAKES[_name], *AUTOGRAD[_name]))
