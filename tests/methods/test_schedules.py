"""Schedules: TAID's controller bit for bit, ramps, stages, and balancers whose ratios have no gradient."""

from __future__ import annotations

import json
import math

import potstill as ps
import pytest
import torch
from potstill.methods.schedules import Ramp, Stage, Stages, TAIDController, balanced_total, loss_ratio


def plain_taid(losses, steps, t_start=0.4, t_end=1.0, alpha=5e-4, beta=0.99):
    t, m, before, trace = t_start, 0.0, None, []
    for n, loss in enumerate(losses):
        if before is not None:
            m = beta * m + (1 - beta) * ((before - loss) / (before + 1e-15))
            delta = alpha * (1 / (1 + math.exp(-m))) * (1 - t)
            t = min(t_end, max(t_start + (t_end - t_start) * n / steps, t + delta))
        before = loss
        trace.append(t)
    return trace, m


def losses_of(n, floor=0.0):
    g = torch.Generator().manual_seed(0)
    return [floor + math.exp(-i / 60) + 0.1 * torch.rand((), generator=g).item() for i in range(n)]


def test_taid_is_the_plain_trace_bit_for_bit():
    losses = losses_of(300)
    for alpha in (5e-4, 0.05):
        controller = TAIDController(300, alpha=alpha)
        trace, m = plain_taid(losses, 300, alpha=alpha)
        got = [controller.update(torch.tensor(x, dtype=torch.float64)) for x in losses]
        assert got == trace and controller.momentum == m
        assert got[0] == 0.4 and all(a <= b for a, b in zip(got, got[1:], strict=False))
    assert got[-1] <= 1.0 and got[150] > 0.4 + 0.6 * 150 / 300, "the controller is ahead of its ramp"


def test_taid_moves_otherwise_when_driven_by_the_cross_entropy():
    """The same losses with the target's entropy added: relative changes shrink, and so does the momentum."""
    kl, ce = TAIDController(300), TAIDController(300)
    for step in range(300):
        loss = math.exp(-step / 60)
        kl.update(loss)
        ce.update(loss + 1.9)
    assert kl.momentum > 2 * abs(ce.momentum) and kl.t >= ce.t


def test_taid_survives_a_loss_that_jumps_from_zero():
    controller = TAIDController(10)
    for loss in (0.0, 5.0, 0.0, 1e-9):
        controller.update(loss)
    assert 0.4 <= controller.t <= 1


def test_taid_resumes():
    losses = losses_of(50)
    whole, first, second = (TAIDController(50, alpha=0.02) for _ in range(3))
    expected = [whole.update(x) for x in losses]
    for x in losses[:20]:
        first.update(x)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [second.update(x) for x in losses[20:]] == expected[20:]


def test_taid_trains_with_the_library_and_reaches_the_teacher():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 8, generator=g)
    teacher = ps.LogitsTeacher(hidden @ torch.randn(8, 30, generator=g))
    head = torch.nn.Parameter(0.1 * torch.randn(30, 8, generator=g))
    optimizer, controller = torch.optim.Adam([head], lr=0.03), TAIDController(80, alpha=0.01)
    gap = []
    for _ in range(80):
        t = controller.t
        target = ps.Mix([(1 - t, ps.Student()), (t, teacher)])
        loss = ps.linear_distill_loss(hidden, head, target, divergence="soft_cross_entropy")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        controller.update(loss)
        gap.append(ps.linear_distill_loss(hidden, head.detach(), teacher).item())
    assert gap[-1] < 0.1 * gap[0] and controller.t > 0.95


def test_ramps():
    line = Ramp(0.0, 0.4, 10, after=5)
    assert [line(s) for s in (0, 5, 10, 15, 99)] == [0.0, 0.0, 0.2, 0.4, 0.4]
    wave = Ramp(1.0, 0.0, 4, shape="cosine")
    assert [round(wave(s), 6) for s in range(5)] == [1.0, 0.853553, 0.5, 0.146447, 0.0]
    fall = Ramp(2.0, 2.0 * 0.9**7, 7, shape="exponential")
    assert all(fall(s) == pytest.approx(2.0 * 0.9**s) for s in range(8)) and fall(20) == 2.0 * 0.9**7
    with pytest.raises(ValueError, match="exponential ramp from 0"):
        Ramp(0.0, 1.0, 3, shape="exponential")
    with pytest.raises(ValueError, match="shape='step'"):
        Ramp(0.0, 1.0, 3, shape="step")


def test_stages_follow_each_other_and_the_last_goes_on():
    stages = Stages([Stage("latent", 3, {"hidden": 1.0}), Stage("soft", 2), Stage("hard", 1)])
    seen = [(stage.name, done) for stage, done in map(stages.at, range(8))]
    assert seen == [
        ("latent", 0), ("latent", 1), ("latent", 2), ("soft", 0), ("soft", 1), ("hard", 0), ("hard", 1), ("hard", 2),
    ]  # fmt: skip
    assert stages.steps == 6 and stages.at(0)[0].options == {"hidden": 1.0}
    with pytest.raises(ValueError, match="0 stages"):
        Stages([])


def test_the_balancer_is_the_plain_expression_with_detached_ratios():
    g = torch.Generator().manual_seed(2)
    x = torch.randn(4, 5, generator=g, dtype=torch.float64).requires_grad_()
    ce, logits, hidden = x[0].square().sum(), x[1:3].exp().mean(), (x[1] * x[3]).square().sum()
    total = balanced_total(ce, logits, hidden, scale=0.7)
    a = logits.item() / hidden.item()
    kd_value = logits.item() + a * hidden.item()
    expected = ce + 0.7 * ce.item() / kd_value * (logits + a * hidden)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    slopes = (torch.autograd.grad(value, x, retain_graph=True)[0] for value in (total, expected))
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=0)
    torch.testing.assert_close(balanced_total(None, logits), logits)
    zero = (x * 0).sum()
    assert loss_ratio(ce, zero) == 1 and balanced_total(None, logits, zero) == logits
    assert not loss_ratio(ce, logits).requires_grad
