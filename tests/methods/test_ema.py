"""Averaged teachers: traces equal the recursion, in 16 bits too; order, window, buffers and resuming."""

from __future__ import annotations

import pytest
import torch
from potstill.methods.ema import EMA, WindowMean
from torch import nn


def walk(model, steps, seed=0):
    """Moves the weights at random, yielding after each move."""
    g = torch.Generator().manual_seed(seed)
    for step in range(steps):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=g).to(p.dtype) * 0.1)
        yield step


def linear(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(dtype)


@pytest.mark.parametrize("order", ["before", "after"])
def test_the_trace_is_the_recursion_and_after_lags_one_step(order):
    student = linear()
    teacher = EMA(student, 0.9, order=order)
    x = torch.randn(5, 3, dtype=torch.float64)
    weight = average = student[0].weight.detach().clone()
    for _ in walk(student, 6):
        seen = teacher(x)
        weight = student[0].weight.detach()
        before, average = average, 0.9 * average + 0.1 * weight
        used = average if order == "before" else before
        torch.testing.assert_close(teacher.teacher[0].weight, average, rtol=1e-12, atol=0)
        bias = teacher.teacher[0].bias
        if order == "before":
            torch.testing.assert_close(seen, teacher.teacher(x))
        else:  # the output is of the weights before the update
            assert not torch.allclose(used, average) and not torch.allclose(seen, teacher.teacher(x))
        assert not seen.requires_grad and not bias.requires_grad
    assert teacher.updates == 6
    teacher.eval()
    teacher(x)
    assert teacher.updates == 6


def test_bf16_averages_move_where_bf16_arithmetic_stands_still():
    student = linear(torch.bfloat16)
    teacher = EMA(student, 0.999)
    stuck = student[0].weight.detach().clone()
    with torch.no_grad():
        student[0].weight.add_(0.01)
    goal = student[0].weight.detach()
    start = (stuck.float() - goal.float()).abs().mean()
    for _ in range(3000):
        teacher.update()
        stuck.lerp_(goal, 0.001)
    left = (teacher.teacher[0].weight.float() - goal.float()).abs().mean()
    assert left < 0.1 * start and (stuck.float() - goal.float()).abs().mean() > 0.5 * start


def test_momentum_may_ramp_and_buffers_follow():
    student = linear()
    teacher = EMA(student, lambda step: [0.0, 0.5, 1.0][step])
    next(walk(student, 1))
    first = student[0].weight.detach().clone()
    student[1].running_mean.fill_(7.0)
    teacher.update()
    torch.testing.assert_close(teacher.teacher[0].weight.data, first)
    assert (teacher.teacher[1].running_mean == 7).all()
    next(walk(student, 1, seed=5))
    second = student[0].weight.detach().clone()
    teacher.update()
    torch.testing.assert_close(teacher.teacher[0].weight.data, (first + second) / 2)
    teacher.update()
    torch.testing.assert_close(teacher.teacher[0].weight.data, (first + second) / 2)


@pytest.mark.parametrize("window", [3, lambda step: 1 + step // 2])
def test_the_window_mean_is_the_mean_of_the_last_states(window):
    student = linear()
    teacher = WindowMean(student, window)
    past = []
    for step in walk(student, 7):
        past.append(student[0].weight.detach().clone())
        size = window(step) if callable(window) else window
        teacher.update()
        held = past[-size:]
        torch.testing.assert_close(teacher.teacher[0].weight.data, torch.stack(held).mean(0), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("make", [lambda s: EMA(s, 0.9), lambda s: WindowMean(s, 3)])
def test_a_loaded_state_goes_on_as_the_first_would_have(make):
    student = linear(torch.bfloat16)
    teacher = make(student)
    for _ in walk(student, 4):
        teacher.update()
    again = make(linear(torch.bfloat16))
    again.load_state_dict(teacher.state_dict())
    again.__dict__["student"] = student
    assert again.updates == 4
    for _ in walk(student, 2, seed=9):
        teacher.update()
        again.update()
    for a, b in zip(teacher.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all("student" not in name for name in teacher.state_dict())


def test_refusals():
    with pytest.raises(ValueError, match="momentum=1.5"):
        EMA(linear(), 1.5)
    with pytest.raises(ValueError, match="order='later'"):
        EMA(linear(), order="later")
    with pytest.raises(ValueError, match="window=0"):
        WindowMean(linear(), 0)
