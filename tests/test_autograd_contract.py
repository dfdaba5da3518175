"""The losses inside what trainers wrap around them: checkpointing, autocast, scaling, threads, repeated runs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import potstill as ps
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

N, V, D, DT = 37, 211, 24, 16
FORMS = ("hidden", "logits", "topk")
WORDS = ({}, dict(low_memory=True), dict(reduction="none"))


def make(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def teacher_of(form: str):
    hidden, weight = make(N, DT, seed=1), make(V, DT, seed=2)
    if form == "hidden":
        return ps.HiddenTeacher(hidden, ps.Head(weight))
    return ps.LogitsTeacher(hidden @ weight.T) if form == "logits" else ps.topk(hidden @ weight.T, 9)


class Student(nn.Module):
    """A layer, a head with a bias, and the loss."""

    def __init__(self, form: str, words: dict, at_hand: bool = False):
        super().__init__()
        torch.manual_seed(3)
        self.body, self.head = nn.Linear(D, D), nn.Linear(D, V)
        self.teacher, self.words, self.at_hand = teacher_of(form), words, at_hand
        self.labels = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(4))
        self.labels[::5] = -100

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden, words = torch.tanh(self.body(x)), dict(ce_weight=0.3, **self.words)
        if self.at_hand:
            loss = ps.distill_loss(self.head(hidden), self.teacher, self.labels, **words)
        else:
            head = ps.Head(self.head.weight, self.head.bias)
            loss = ps.linear_distill_loss(hidden, head, self.teacher, self.labels, chunk_rows=16, **words)
        return loss.sum()


def gradients(model: nn.Module) -> list[torch.Tensor]:
    taken = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return taken


def cases() -> Iterator[Any]:
    for form in FORMS:
        for words in WORDS:
            yield pytest.param(form, words, False, id=f"{form}-{words}")
        yield pytest.param(form, {}, True, id=f"{form}-distill_loss")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("form, words, at_hand", list(cases()))
def test_checkpointing_recomputes_the_same(form, words, at_hand, reentrant):
    model, x = Student(form, words, at_hand), make(N, D, seed=5).requires_grad_()
    loss = model(x)
    loss.backward()
    expected, dx = gradients(model), x.grad.clone()
    x.grad = None
    again = checkpoint(model, x, use_reentrant=reentrant)
    again.backward()
    assert torch.equal(again, loss) and torch.equal(x.grad, dx)
    for a, b in zip(gradients(model), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("form, words, at_hand", list(cases()))
def test_the_same_run_gives_the_same_bits(form, words, at_hand):
    """Twice in a row, and under torch.use_deterministic_algorithms, which refuses what is not deterministic."""
    model, x = Student(form, words, at_hand), make(N, D, seed=5)
    results = []
    for deterministic in (False, False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            loss = model(x)
            loss.backward()
        finally:
            torch.use_deterministic_algorithms(False)
        results.append([loss.detach(), *gradients(model)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_threads_give_the_same_within_rounding(form, dtype):
    """One, two and four threads: apart by what another order of summing V terms may give, no more."""
    hidden, weight = make(300, D, seed=6).to(dtype).requires_grad_(), make(V, D, seed=7).to(dtype).requires_grad_()
    teacher_logits = make(300, V, seed=8)
    teacher = {
        "hidden": ps.HiddenTeacher(make(300, DT, seed=9).to(dtype), ps.Head(make(V, DT, seed=10).to(dtype))),
        "logits": ps.LogitsTeacher(teacher_logits),
        "topk": ps.topk(teacher_logits, 9),
    }[form]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            loss = ps.linear_distill_loss(hidden, weight, teacher, chunk_rows=64)
            results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    finally:
        torch.set_num_threads(before)
    bound = V**0.5 * torch.finfo(dtype).eps
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert (a - b).abs().max() <= bound * a.abs().max()


@pytest.mark.parametrize("form", FORMS)
def test_grad_scaler(form):
    """Scaled, unscaled and stepped as plain training is; an overflow is seen and its step skipped."""
    plain, scaled = Student(form, {}), Student(form, {})
    x = make(N, D, seed=5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for model in (plain, scaled):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
        if model is plain:
            model(x).backward()
            optimiser.step()
            continue
        scaler.scale(model(x)).backward()
        scaler.unscale_(optimiser)
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-8)
        scaler.step(optimiser)
        scaler.update()
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        before = copy.deepcopy(model.state_dict())
        optimiser.zero_grad()
        scaler.scale(model(x) * 3e38).backward()  # times the scale: infinite
        scaler.step(optimiser)
        scaler.update()
        assert scaler.get_scale() == 2.0**15
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("form", FORMS)
def test_autocast_equals_casting_by_hand(form):
    """Under autocast the fp32 head is used as the autocast type, as a linear layer would be; gradients are fp32."""
    hidden, head = make(N, D, seed=6), nn.Linear(D, V)
    teacher = teacher_of(form)
    h = hidden.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ps.linear_distill_loss(h, ps.Head(head.weight, head.bias), teacher)
    got = torch.autograd.grad(loss, (h, head.weight, head.bias))
    by_hand = ps.Head(*(p.detach().bfloat16().requires_grad_() for p in (head.weight, head.bias)))
    if form == "hidden":
        teacher = ps.HiddenTeacher(teacher.hidden.bfloat16(), ps.Head(teacher.head.weight.bfloat16()))
    want = ps.linear_distill_loss(h, by_hand, teacher)
    torch.testing.assert_close(loss, want, rtol=1e-3, atol=1e-3)
    expected = torch.autograd.grad(want, (h, by_hand.weight, by_hand.bias))
    assert loss.dtype == torch.float32 and [g.dtype for g in got] == [torch.bfloat16, torch.float32, torch.float32]
    for a, b in zip(got, expected, strict=True):
        assert (a.float() - b.float()).norm() <= 0.01 * b.float().norm()


def test_a_trainers_loop_of_accumulation_sees_one_gradient():
    """Micro-batches with num_items, each checkpointed, under a scaler: the gradient of the whole batch."""
    hidden, weight = make(N, D, seed=6), make(V, D, seed=7).requires_grad_()
    teacher = teacher_of("topk")
    whole = ps.linear_distill_loss(hidden, weight, teacher)
    (expected,) = torch.autograd.grad(whole, weight)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for rows in (slice(0, 5), slice(5, 30), slice(30, N)):

        def part(w, rows=rows):
            return ps.linear_distill_loss(hidden[rows], w, teacher[rows], num_items=N)

        scaler.scale(checkpoint(part, weight, use_reentrant=False)).backward()
    torch.testing.assert_close(weight.grad / 1024.0, expected)
