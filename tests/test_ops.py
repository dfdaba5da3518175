"""The ops as torch.compile and friends see them."""

from __future__ import annotations

import potstill as ps
import pytest
import torch
from potstill.arguments import Call
from potstill.ops import losses as ops
from potstill.rows import Side
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

V, D = 33, 8


TEACHERS = {
    "hidden": lambda h, z, b: ps.HiddenTeacher(h, ps.Head(torch.randn(V, 4))),
    "logits": lambda h, z, b: ps.LogitsTeacher(z),
    "row_loss": lambda h, z, b: ps.LogitsTeacher(z),
    "topk": lambda h, z, b: ps.topk(z, 5),
    "mix": lambda h, z, b: ps.Mix([(torch.tensor(0.3), ps.Student()), (0.7, ps.LogitsTeacher(z))]),
    "masked": lambda h, z, b: ps.Masked(ps.LogitsTeacher(z), b[0] / 2, 0.5 + b[1] / 2, softness=0.1),
}
DIVERGENCES = {"row_loss": "adaptive_kl"}


def call_arguments(form: str, want: bool) -> tuple:
    """(student, what follows it, whether the bounds take a gradient) of the linear ops."""
    hidden, weight = torch.randn(6, D, requires_grad=want), torch.randn(V, D, requires_grad=want)
    t = TEACHERS[form](torch.randn(6, 4), torch.randn(6, V), torch.rand(2, requires_grad=want))
    call = Call(
        hidden.shape[:1], hidden, Side(V), t, torch.randint(0, V, (6,)), divergence=DIVERGENCES.get(form, "jsd"),
        temperature=1.0, teacher_temperature=None, tail="bucket", scale_by_t2=False, distill_weight=0.7, ce_weight=0.3,
        token_weights=None, ignore_index=-100, reduction="sum", num_items=None, return_metrics=("acceptance",),
        backend="auto", chunk_rows=4, precise=False,
    )  # fmt: skip
    return (hidden, weight, None), call.arguments(torch.ones(6)), call.bounds is not None and want


@pytest.mark.parametrize("form", ["hidden", "logits", "topk", "mix", "masked", "row_loss"])
def test_opcheck(form):
    student, task, bounds = call_arguments(form, True)
    potstill = torch.ops.potstill
    opcheck(potstill.linear_distill.default, (*student, *task, True, True, False, bounds))
    opcheck(potstill.linear_distill_rows.default, (*student, *task, True, True, False, bounds))
    logits = torch.randn(6, V, requires_grad=True)
    opcheck(potstill.distill_rows.default, (logits, *task, bounds))
    opcheck(potstill.topk.default, (torch.randn(6, V), 3, [float(V), 1.0, 0.0], "auto"))
    opcheck(
        potstill.linear_topk.default,
        (torch.randn(6, D), torch.randn(V, D), None, 3, [float(V), 1.0, 0.0], 0, False, "auto"),
    )


def test_every_op_has_a_fake_and_a_derivative():
    assert set(ops.SCHEMAS) == set(ops.FAKES) == set(ops.AUTOGRAD)


@pytest.mark.parametrize("form", ["hidden", "logits", "topk"])
def test_pitfall_19_torch_compile(form):
    """One graph, equal to eager at ignored rows, and no graph per sequence length once lengths vary."""
    weight, teacher_weight = torch.randn(V, D), torch.randn(V, 4)

    def loss(hidden, w, teacher, labels):
        if form == "hidden":
            t = ps.HiddenTeacher(teacher[0], ps.Head(teacher_weight))
        else:
            t = ps.LogitsTeacher(teacher[0]) if form == "logits" else ps.TopK(*teacher)
        return ps.linear_distill_loss(hidden, ps.Head(w), t, labels, ce_weight=0.3)

    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(loss, fullgraph=True, backend=counting)
    for n in (12, 7, 19, 23):
        hidden = torch.randn(n, D, requires_grad=True)
        w = weight.clone().requires_grad_()
        logits = torch.randn(n, V)
        top = ps.topk(logits, 5)
        teacher = {"hidden": [torch.randn(n, 4)], "logits": [logits], "topk": [top.ids, top.log_probs, top.log_rest]}[
            form
        ]
        labels = torch.randint(0, V, (n,))
        labels[::3] = -100
        a, b = compiled(hidden, w, teacher, labels), loss(hidden, w, teacher, labels)
        torch.testing.assert_close(a, b)
        for x, y in zip(torch.autograd.grad(a, (hidden, w)), torch.autograd.grad(b, (hidden, w)), strict=True):
            torch.testing.assert_close(x, y)
    assert len(graphs) <= 2, "a graph for each length"


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    hidden, weight = torch.randn(6, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    teacher = ps.LogitsTeacher(torch.randn(6, V))

    def loss(h, w):
        return ps.linear_distill_loss(h, w, teacher)

    expected = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    checkpoint(loss, hidden, weight, use_reentrant=reentrant).backward()
    torch.testing.assert_close((hidden.grad, weight.grad), expected)


def test_total_refusal_prints_every_sentence():
    from potstill import dispatch

    with pytest.raises(ValueError, match="no backend serves 'dense_rows' for torch.int64") as caught:
        dispatch.select(dispatch.Facts("dense_rows", torch.device("cpu"), torch.int64))
    for backend in ("cpp", "triton", "cuda", "torch"):
        assert f"\n  {backend}: " in str(caught.value)


def test_losses_work_without_the_extensions():
    """The plain torch backend serves where _cpp and _rust are not built."""
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['potstill._cpp'] = None; sys.modules['potstill._rust'] = None\n"
        "import torch, potstill as ps\n"
        "h = torch.randn(3, 4, requires_grad=True)\n"
        "ps.linear_distill_loss(h, torch.randn(9, 4), ps.topk(torch.randn(3, 9), 2)).backward()\n"
        "assert h.grad.abs().sum() > 0\n"
        "try: ps.topk(torch.randn(2, 9), 2, backend='cpp')\n"
        "except ValueError as e: assert 'not built' in str(e), e\n"
        "else: raise SystemExit('cpp served')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
