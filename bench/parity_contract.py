"""The second half of the failure classes: memory, work, autograd, compilation, and how a subject is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from parity_checks import Check, Result, against_truth, check, divergence, gradients, off, pair
from parity_subjects import NotOffered, Side, Subject
from torch import Tensor


@check(
    "gradient accumulation",
    "two micro-batches of 6 and 18 rows with the outside count 24 as denominator: the gradient of all 24 rows",
    "tests/test_losses.py::test_pitfall_13_num_items",
)
def accumulated(subject: Subject) -> Result:
    s, t = pair()
    whole = gradients(subject.loss(s, t), s)
    parts = [subject.loss(replace(s, hidden=s.hidden[r]), replace(t, hidden=t.hidden[r]), num_items=24)
             for r in (slice(0, 6), slice(6, 24))]  # fmt: skip
    error = off(gradients(sum(parts[1:], parts[0]), s), whole)
    return error < 1e-4, f"off by {error:.1e}"


def products(call: Callable[[], object]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The shapes of every matrix product of a call, as the profiler sees them, inside operators too."""
    with torch.profiler.profile(record_shapes=True, activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        call()
    found = []
    for event in seen.events():
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"):
            first = 1 if "addmm" in event.name else 0
            inside = event.cpu_parent is not None and event.cpu_parent.name in (
                "aten::mm",
                "aten::addmm",
                "aten::addmm_",
            )
            if not inside:
                found.append(tuple(tuple(shape[-2:]) for shape in event.input_shapes[first : first + 2]))
    return found


@check(
    "chunks larger than asked",
    "1,023 rows of V = 997 in chunks of 512, forward and backward; 512 rows of logits at once",
    "tests/test_bench.py::test_memory_is_measured_where_it_is_known",
    fused_only=True,
    failure="larger",
)
def chunk_bound(subject: Subject) -> Result:
    s, t = pair(1023, 997, width=8)
    scaled = subject.package == "trl"
    if scaled:  # its tiles are constants of 4,096 x 32,768; brought to this size
        from trl.kernels import chunked_divergence as tiles

        kept, tiles.TOKEN_CHUNK_SIZE, tiles.VOCAB_CHUNK_SIZE = (
            (tiles.TOKEN_CHUNK_SIZE, tiles.VOCAB_CHUNK_SIZE),
            512,
            997,
        )
    try:
        shapes = products(lambda: subject.loss(s, t, chunk=512).backward())
    finally:
        if scaled:
            tiles.TOKEN_CHUNK_SIZE, tiles.VOCAB_CHUNK_SIZE = kept
    rows = max(n for pair_ in shapes for shape in pair_ if 997 in shape and 8 not in shape for n in shape if n != 997)
    return rows <= 512, f"{rows} rows at once" + (" (its tiles scaled to 512 x 997)" if scaled else "")


@check(
    "a second backward",
    "retain_graph, gradient 3 the first time: the second gradient is that of 1",
    "tests/test_losses.py::test_pitfall_16_second_backward_and_in_place_scaling",
)
def twice(subject: Subject) -> Result:
    s, t = pair()
    loss = subject.loss(s, t)
    want = gradients(subject.loss(s, t), s)
    for g in torch.autograd.grad(loss, s.leaves(), torch.tensor(3.0), retain_graph=True):
        g.zero_()  # the caller's own to change
    error = off(gradients(loss, s), want)
    return error < 1e-6, f"off by {error:.1e}"


@check(
    "second derivatives",
    "gradient of the squared gradient: fp64's, or an error",
    "tests/test_losses.py::test_pitfall_16_second_derivatives_raise",
)
def second(subject: Subject) -> Result:
    s, t = pair()
    exact = s.double()
    (g,) = torch.autograd.grad(divergence(exact.logits(), t.double().logits()).mean(), exact.hidden, create_graph=True)
    (want,) = torch.autograd.grad(g.square().sum(), exact.hidden)
    try:
        (g,) = torch.autograd.grad(subject.loss(s, t), s.hidden, create_graph=True)
        (got,) = torch.autograd.grad(g.square().sum(), s.hidden)
    except RuntimeError as error:
        return True, f"raises: {str(error).splitlines()[0][:60]}"
    error = off([got.double()], [want])
    return error < 1e-3, f"computed, off by {error:.1e}"


@check(
    "gradient work nobody asked for",
    "256 rows, V = 997, D = 64, under no_grad: the 2 products of the logits",
    "tests/test_losses.py::test_pitfall_17_no_gradient_work_that_nobody_asked_for",
    failure="more",
)
def no_grad(subject: Subject) -> Result:
    s, t = pair(256, 997, width=64)
    with torch.no_grad():
        count = len(products(lambda: subject.loss(s, t, chunk=256)))
    return count == 2, f"{count} products"


@check(
    "a frozen head",
    "as above with gradients for the hidden states only: no product makes a [V, D] gradient",
    "tests/test_losses.py::test_pitfall_17_no_gradient_work_that_nobody_asked_for",
    failure="more",
)
def frozen(subject: Subject) -> Result:
    s, t = pair(256, 997, width=64)
    s = replace(s, weight=s.weight.detach())
    shapes = products(lambda: subject.loss(s, t, chunk=256).backward())
    wasted = sum(a[1] == 256 and {a[0], b[1]} == {64, 997} for a, b in shapes)
    return wasted == 0, f"{wasted} of {len(shapes)} products for the head's gradient"


@check(
    "torch.compile",
    "fullgraph=True, lengths 12, 7, 19, 23 with ignored rows: equal to eager, at most 2 graphs",
    "tests/test_compile.py::test_pitfall_19_lengths_do_not_recompile",
)
def compiled(subject: Subject) -> Result:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter, worst = CompileCounter(), 0.0

    def loss(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, labels: Tensor) -> Tensor:
        return subject.loss(Side(h, w), Side(th, tw), labels)

    faster = torch.compile(loss, fullgraph=True, backend=counter)
    for rows in (12, 7, 19, 23):
        s, t = pair(rows)
        labels = torch.arange(rows)
        labels[::3] = -100
        arguments = (*s.leaves(), t.hidden, t.weight, labels)
        try:
            got = faster(*arguments)
        except torch._dynamo.exc.Unsupported as error:
            raise RuntimeError(f"fullgraph=True: {str(error).strip().splitlines()[0]}") from error
        worst = max(worst, off(gradients(got, s), gradients(loss(*arguments), s)))
    return worst < 1e-5 and counter.frame_count <= 2, f"{counter.frame_count} graphs, off by {worst:.1e}"


@check(
    "inputs changed in place",
    "hidden states, heads and labels after forward and backward, compared bit by bit",
    "tests/test_losses.py::test_pitfall_20_inputs_are_left_alone",
)
def untouched(subject: Subject) -> Result:
    s, t = pair()
    labels = torch.arange(24)
    tensors = [s.hidden, s.weight, t.hidden, t.weight, labels]
    before = [x.detach().clone() for x in tensors]
    subject.loss(s, t, labels).backward()
    changed = sum(not torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    return changed == 0, f"{changed} of 5 changed"


@check(
    "one row; no row",
    "1 row equals fp64; 0 rows give 0 and zero gradients",
    "tests/test_losses.py::test_pitfall_20_one_row_and_non_contiguous_inputs",
)
def few(subject: Subject) -> Result:
    one = against_truth(subject, *pair(1), 1e-4)
    s, t = pair(0)
    try:
        loss = subject.loss(s, t)
    except Exception as error:
        raise RuntimeError(f"one row {'right' if one[0] else one[1]}; no row raises {type(error).__name__}") from error
    said = f"one row {'right' if one[0] else one[1]}; no row {loss.item()}"
    if not loss.requires_grad:
        return False, f"{said} without a gradient function"
    zero = loss.item() == 0 and all(not g.any() for g in gradients(loss, s))
    return one[0] and zero, said


def answer(subject: Subject, which: Check) -> tuple[str, str]:
    """("right", the failure's word, "refused", "not offered" or ""; what was measured)."""
    if which.fused_only and not subject.chunks:
        return "", "works on whole logits"
    try:
        right, said = which.run(subject)
    except NotOffered as reason:
        return "not offered", str(reason)
    except Exception as error:
        return "refused", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:70]}"
    return ("right" if right else which.failure), said
