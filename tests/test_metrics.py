"""Metrics beside the loss: each equals its formula at T = 1, reduced as the loss is, with no gradient."""

from __future__ import annotations

import potstill as ps
import pytest
import torch
from potstill import metrics

B, T, V = 2, 4, 37


def data(seed=0):
    g = torch.Generator().manual_seed(seed)
    zs, zt = (torch.randn(B, T, V, generator=g, dtype=torch.float64) * 2 for _ in range(2))
    labels = torch.randint(0, V, (B, T), generator=g)
    labels[0, 1] = -100
    zt[1, 2] = zs[1, 2] * 1.1  # a row where both agree
    return zs.requires_grad_(), zt, labels


def truth(zs, zt):
    lq, lp = zs.log_softmax(-1), zt.log_softmax(-1)
    p, q = lp.exp(), lq.exp()
    return {
        "kl": (p * (lp - lq)).sum(-1), "reverse_kl": (q * (lq - lp)).sum(-1),
        "student_entropy": -(q * lq).sum(-1), "teacher_entropy": -(p * lp).sum(-1),
        "acceptance": torch.minimum(p, q).sum(-1), "agreement": (p.argmax(-1) == q.argmax(-1)).double(),
    }  # fmt: skip


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("form", ["logits", "topk", "mix"])
def test_each_metric_is_its_formula(form, temperature):
    zs, zt, labels = data()
    expected = truth(zs.detach(), zt)
    assert set(expected) == set(metrics.NAMES) - set(metrics.SPARSE_ONLY)
    teacher = ps.LogitsTeacher(zt)
    if form == "mix":
        teacher = ps.Mix([(1.0, teacher)])
    if form == "topk":
        teacher = ps.topk(zt, V)
        teacher = ps.TopK(teacher.ids, teacher.log_probs, teacher.log_rest, log_rest_at={2.0: teacher.log_rest})
    words = dict(temperature=temperature, return_metrics=tuple(expected), chunk_rows=3)
    live = labels != -100
    _, rows = ps.distill_loss(zs, teacher, labels, reduction="none", **words)
    loss, means = ps.distill_loss(zs, teacher, labels, **words)
    linear, again = ps.linear_distill_loss(zs, torch.eye(V, dtype=torch.float64), teacher, labels, **words)
    assert loss.requires_grad and set(rows) == {"distill", "ce", *expected}
    for name, value in expected.items():
        assert rows[name].shape == (B, T) and not rows[name].requires_grad
        torch.testing.assert_close(rows[name], torch.where(live, value, 0.0), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(means[name], value[live].mean(), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(again[name], means[name])
    without = ps.distill_loss(zs, teacher, labels, temperature=temperature)
    torch.testing.assert_close(loss, without)
    torch.testing.assert_close(torch.autograd.grad(loss, zs), torch.autograd.grad(without, zs))


def test_masses_and_bounds_over_a_topk():
    zs, zt, labels = data()
    top = ps.topk(zt, 6)
    names = ("teacher_mass", "student_mass", "kl", "acceptance", "agreement", "teacher_entropy", "student_entropy")
    _, got = ps.distill_loss(zs, top, reduction="none", return_metrics=names)
    full = truth(zs.detach(), zt)
    q = zs.detach().softmax(-1).gather(-1, top.ids.long()).sum(-1)
    torch.testing.assert_close(got["teacher_mass"], 1 - top.log_rest.exp())
    torch.testing.assert_close(got["student_mass"], q)
    torch.testing.assert_close(got["student_entropy"], full["student_entropy"])
    torch.testing.assert_close(got["agreement"], full["agreement"])
    assert (got["kl"] <= full["kl"] + 1e-12).all() and (got["acceptance"] >= full["acceptance"] - 1e-12).all()
    assert (got["teacher_entropy"] <= full["teacher_entropy"] + 1e-12).all()


def test_a_negative_scale_turns_the_order():
    weight, hidden = torch.eye(V), torch.randn(6, V)
    teacher = ps.LogitsTeacher(-3 * hidden)
    _, got = ps.linear_distill_loss(hidden, ps.Head(weight, logit_scale=-2.0), teacher, return_metrics=("agreement",))
    assert got["agreement"] == 1


def test_acceptance_is_what_rejection_sampling_accepts():
    """Draw from the student, accept with min(1, p / q): the rate is within 3 sigma of sum min(p, q)."""
    zs, zt, _ = data()
    q, p = zs.detach()[0, 0].softmax(-1), zt[0, 0].softmax(-1)
    n = 200_000
    drawn = torch.multinomial(q, n, replacement=True, generator=torch.Generator().manual_seed(1))
    accepted = torch.rand(n, generator=torch.Generator().manual_seed(2), dtype=torch.float64) < (p / q)[drawn]
    _, got = ps.distill_loss(zs[0, :1], ps.LogitsTeacher(zt[0, :1]), return_metrics=("acceptance",))
    rate = got["acceptance"].item()
    assert abs(accepted.double().mean().item() - rate) < 3 * (rate * (1 - rate) / n) ** 0.5
