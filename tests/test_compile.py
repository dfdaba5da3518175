"""The public calls under torch.compile, and every operator the package registers under opcheck."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import potstill as ps
import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

V, D = 33, 8
FORMS = ("hidden", "logits", "topk", "mix", "masked")
WHOLE_ROWS = ("mix", "masked")
TEACHER_WEIGHT = torch.randn(V, 4, generator=torch.Generator().manual_seed(5))


def teacher_of(form: str, parts: list[torch.Tensor]) -> Any:
    if form == "hidden":
        return ps.HiddenTeacher(parts[0], ps.Head(TEACHER_WEIGHT))
    if form == "mix":
        return ps.Mix([(1 - parts[1], ps.Student()), (parts[1], ps.LogitsTeacher(parts[0]))])
    if form == "masked":
        return ps.Masked(ps.LogitsTeacher(parts[0]), parts[1] / 10, 0.9, softness=0.05)
    return ps.LogitsTeacher(parts[0]) if form == "logits" else ps.TopK(*parts)


def linear(form: str, x: torch.Tensor, w: torch.Tensor, parts: list, labels: torch.Tensor, **words: Any) -> Any:
    return ps.linear_distill_loss(x, ps.Head(w, softcap=8.0), teacher_of(form, parts), labels, ce_weight=0.3, **words)


def at_hand(form: str, x: torch.Tensor, w: torch.Tensor, parts: list, labels: torch.Tensor, **words: Any) -> Any:
    return ps.distill_loss(x @ w.T, teacher_of(form, parts), labels, ce_weight=0.3, **words)


def inputs(form: str, n: int, seed: int = 0) -> tuple:
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(n, D, generator=g), torch.randn(V, D, generator=g)
    top = ps.topk(logits := torch.randn(n, V, generator=g), 5)
    parts = {
        "hidden": [torch.randn(n, 4, generator=g)],
        "logits": [logits],
        "mix": [logits, torch.rand((), generator=g)],
        "masked": [logits, torch.rand((), generator=g)],
        "topk": [top.ids, top.log_probs, top.log_rest],
    }
    labels = torch.randint(0, V, (n,), generator=g)
    labels[::3] = -100
    return x.requires_grad_(), w.requires_grad_(), parts[form], labels


def same(compiled: Callable[..., Any], plain: Callable[..., Any], form: str, n: int) -> None:
    """Value, gradient by rows (exactly 0 at ignored ones) and by the head agree with eager."""
    x, w, parts, labels = inputs(form, n, seed=n)
    a, b = compiled(form, x, w, parts, labels), plain(form, x, w, parts, labels)
    torch.testing.assert_close(a, b)
    (da, wa), (db, wb) = (torch.autograd.grad(v.sum(), (x, w)) for v in (a, b))
    torch.testing.assert_close((da, wa), (db, wb))
    assert (da[labels == -100] == 0).all() and (da[labels != -100] != 0).any()


class Graphs:
    """A backend that counts what it is given to compile, after AOTAutograd has traced forward and backward."""

    def __init__(self) -> None:
        self.forward = 0

    def __call__(self, graph: torch.fx.GraphModule, example: list) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        self.forward += 1
        return aot_eager(graph, example)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", [linear, at_hand])
def test_pitfall_19_lengths_do_not_recompile(loss, form):
    """The first length compiles once, the second once more (for any length), no other does; never a graph break."""
    torch._dynamo.reset()
    graphs = Graphs()
    compiled = torch.compile(loss, fullgraph=True, backend=graphs)
    counts = []
    for n in (12, 7, 19, 23, 100):
        same(compiled, loss, form, n)
        counts.append(graphs.forward)
    assert counts == [1, 2, 2, 2, 2]


@pytest.mark.parametrize("form", FORMS)
def test_a_length_marked_dynamic_compiles_once(form):
    torch._dynamo.reset()
    graphs = Graphs()
    compiled = torch.compile(linear, fullgraph=True, backend=graphs)
    for n in (12, 7, 19):
        x, w, parts, labels = inputs(form, n)
        for tensor in (x, *parts, labels):
            torch._dynamo.mark_dynamic(tensor, 0)
        torch.testing.assert_close(compiled(form, x, w, parts, labels), linear(form, x, w, parts, labels))
    assert graphs.forward == 1


@pytest.mark.parametrize(
    "words", [dict(reduction="none"), dict(low_memory=True), dict(temperature=2.0, tail="renormalize")]
)
@pytest.mark.parametrize("form", FORMS)
def test_options_under_compile(form, words):
    if "low_memory" in words and form in WHOLE_ROWS:
        pytest.skip("low_memory refuses targets that need whole rows")
    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")

    def called(which):
        return lambda *args: which(*args, **words)

    same(called(compiled), called(linear), form, 11)


def test_inductor(form="topk"):
    """The default compiler, once: the ops stay whole inside generated code."""
    torch._dynamo.reset()
    same(torch.compile(linear, fullgraph=True), linear, form, 12)


INSIDE_BACKWARD = (
    "token_logprobs_backward",
    "linear_distill_parts_backward",
    "linear_distill_rows_backward",
    "distill_rows_backward",
    "scale_gradients",
    "chunk_sums_backward",
)


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every call of a potstill operator, those inside backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "potstill":
            first = func._schema.name.split("::")[1] not in INSIDE_BACKWARD
            kept = [
                a.detach().clone().requires_grad_(first and a.requires_grad) if isinstance(a, torch.Tensor) else a
                for a in args
            ]
            self.calls.setdefault(func._schema.name, []).append((func, kept, kwargs or {}))
        return func(*args, **(kwargs or {}))


def registered() -> set[str]:
    return {n.split(".")[0] for n in torch._C._dispatch_get_all_op_names() if n.startswith("potstill::")}


def test_opcheck_every_operator():
    """Schema, fake, autograd registration and AOT dispatch of each operator, on the arguments of public calls."""
    recorder = Recorder()
    with recorder:
        for form in FORMS:
            for words in (dict(), dict(reduction="none"), dict(divergence="jsd", low_memory=True)):
                if "low_memory" in words and form in WHOLE_ROWS:
                    continue
                args = inputs(form, 6)
                (3 * linear(form, *args, **words)).sum().backward(retain_graph=True)
                if "low_memory" not in words:
                    (3 * at_hand(form, *args, **words)).sum().backward(retain_graph=True)
        tokens = torch.randint(0, V, (6,))
        for words in (dict(), dict(ids=tokens, temperatures=(2.0,))):
            ps.topk(torch.randn(6, V), 3, **words)
            ps.linear_topk(torch.randn(6, D), torch.randn(V, D), 3, **words)
        ps.sample(torch.randn(6, V), 4, seed=3)
        ps.linear_sample(torch.randn(6, D), torch.randn(V, D), 4, seed=3)
        x, w = torch.randn(6, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
        ps.token_logprobs(x, w, tokens).sum().backward()
        chunk, ends = torch.tensor([0, 0, -1, 1, 1, 1]), torch.tensor([[0, 2], [3, 6]])
        values = (-torch.rand(6)).requires_grad_()
        torch.ops.potstill.chunk_sums(values, chunk.int(), *ends.int().unbind(1), "auto").sum().backward()
    assert any(
        isinstance(a, torch.Tensor) and a.requires_grad for a in recorder.calls["potstill::linear_distill"][0][1]
    )
    for calls in recorder.calls.values():
        for overload, args, kwargs in calls:
            opcheck(overload, args, kwargs)
    assert registered() == set(recorder.calls)
