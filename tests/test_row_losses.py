"""Row losses against plain torch under autograd: value, gradient, ties, equality, missing entries."""

from __future__ import annotations

import math

import potstill as ps
import pytest
import torch
import torch.nn.functional as F
from potstill import divergences, row_losses

N, V, K = 5, 41, 9


def centred(z):
    return z - z.mean(-1, keepdim=True)


def plain_adaptive(zs, zt, head_mass=0.5):
    """Row by row, with a loop for the head."""
    rows = []
    for s, t in zip(zs.log_softmax(-1), zt.log_softmax(-1), strict=True):
        p, q = t.exp(), s.exp()
        head, mass = torch.zeros_like(p), 0.0
        for j in p.argsort(descending=True):
            if mass >= head_mass:
                break
            head[j], mass = 1.0, mass + p[j].item()
        gap = (p - q).abs().detach()
        share = (gap * head).sum() / gap.sum()
        rows.append(share * (p * (t - s)).sum() + (1 - share) * (q * (s - t)).sum())
    return torch.stack(rows)


def plain_ranking(zs, zt, f):
    rows = []
    for s, t in zip(zs, zt, strict=True):
        pairs = [f(s[i] - s[j]) for i in range(len(s)) for j in range(len(s)) if t[i] > t[j]]
        rows.append(torch.stack(pairs).mean())
    return torch.stack(rows)


PLAIN = {
    "mse_logits": lambda s, t: (s - t).square().mean(-1),
    "mse_centred": lambda s, t: centred(s - t).square().mean(-1),
    "cosine_logits": lambda s, t: 1 - F.cosine_similarity(centred(s), centred(t), dim=-1),
    "adaptive_kl": plain_adaptive,
    "ranking_hinge": lambda s, t: plain_ranking(s, t, lambda d: (-d).clamp(min=0)),
    "ranking_logistic": lambda s, t: plain_ranking(s, t, lambda d: F.softplus(-d)),
}


def test_every_row_loss_is_here():
    assert set(PLAIN) == set(row_losses.TABLE)
    assert all(getattr(divergences, name) is loss for name, loss in row_losses.TABLE.items())


def logits(spread=2.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(N, V, generator=g, dtype=torch.float64) * spread for _ in range(2)]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", [n for n, loss in row_losses.TABLE.items() if "dense" in loss.takes])
def test_dense_value_and_gradient(name, temperature):
    zs, zt = logits()
    zs.requires_grad_()
    weights = torch.rand(N, dtype=torch.float64) + 0.1
    expected = (PLAIN[name](zs / temperature, zt / temperature) * weights).sum() / weights.sum()
    words = dict(divergence=name, temperature=temperature, token_weights=weights, chunk_rows=2)
    got = ps.distill_loss(zs, ps.LogitsTeacher(zt), **words)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    (truth,) = torch.autograd.grad(expected, zs)
    torch.testing.assert_close(torch.autograd.grad(got, zs)[0], truth, rtol=1e-8, atol=1e-12)
    linear = ps.linear_distill_loss(zs, torch.eye(V, dtype=torch.float64), ps.LogitsTeacher(zt), **words)
    torch.testing.assert_close(torch.autograd.grad(linear, zs)[0], truth, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", [n for n, loss in row_losses.TABLE.items() if "sparse" in loss.takes])
def test_sparse_value_and_gradient_and_short_rows(name):
    zs, zt = logits(seed=1)
    zs.requires_grad_()
    top = ps.topk(zt, K)
    ids, lp = top.ids.clone(), top.log_probs.clone()
    ids[1, 6:], lp[1, 6:] = -1, -math.inf
    rows = []
    for i in range(N):
        k = 6 if i == 1 else K
        rows.append(PLAIN[name](zs[i : i + 1, ids[i, :k].long()], lp[i : i + 1, :k])[0])
    expected = torch.stack(rows).mean()
    got = ps.distill_loss(zs, ps.TopK(ids, lp), divergence=name)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    (truth,) = torch.autograd.grad(expected, zs)
    torch.testing.assert_close(torch.autograd.grad(got, zs)[0], truth, rtol=1e-8, atol=1e-12)


def test_pitfall_14_adaptive_kl_where_student_is_teacher():
    zs, _ = logits()
    zs.requires_grad_()
    loss = ps.distill_loss(zs, ps.LogitsTeacher(zs.detach()), divergence="adaptive_kl")
    assert abs(loss.item()) < 1e-12 and torch.autograd.grad(loss, zs)[0].abs().max() < 1e-12


def test_pitfall_14_total_variation_at_a_tie_has_no_gradient():
    zs = torch.zeros(2, V, dtype=torch.float64, requires_grad=True)
    loss = ps.distill_loss(zs, ps.LogitsTeacher(torch.ones(2, V, dtype=torch.float64)), divergence="total_variation")
    assert loss == 0 and (torch.autograd.grad(loss, zs)[0] == 0).all()


def test_invariances():
    zs, zt = logits()
    shifted = zt + torch.linspace(1, 3, N, dtype=torch.float64)[:, None]
    for name in ("mse_centred", "cosine_logits"):
        a, b = (ps.distill_loss(zs, ps.LogitsTeacher(z), divergence=name) for z in (zt, shifted))
        torch.testing.assert_close(a, b)
    a, b = (ps.distill_loss(zs, ps.LogitsTeacher(z), divergence="mse_logits") for z in (zt, shifted))
    assert (a - b).abs() > 0.1
    flat = torch.zeros(N, V, dtype=torch.float64, requires_grad=True)
    loss = ps.distill_loss(flat, ps.LogitsTeacher(zt), divergence="cosine_logits")
    assert loss == 0 and torch.autograd.grad(loss, flat)[0].isfinite().all()


def test_the_hinge_has_a_margin_and_large_k_is_split(monkeypatch):
    zs, zt = logits(seed=3)
    top = ps.topk(zt, K)
    hinge = divergences.ranking_hinge(margin=0.7)
    k = zs.gather(1, top.ids.long())
    expected = plain_ranking(k, top.log_probs, lambda d: (0.7 - d).clamp(min=0)).mean()
    torch.testing.assert_close(ps.distill_loss(zs, top, divergence=hinge), expected)
    monkeypatch.setattr(row_losses, "PAIRS", 2 * K * K)
    torch.testing.assert_close(ps.distill_loss(zs, top, divergence=hinge), expected)
    with pytest.raises(ValueError, match="margin=-1"):
        divergences.ranking_hinge(margin=-1)


def test_dead_rows_may_hold_anything():
    zs, zt = logits()
    zt[2] = math.nan
    labels = torch.zeros(N, dtype=torch.long)
    labels[2] = -100
    zs.requires_grad_()
    for name in ("mse_logits", "cosine_logits", "adaptive_kl"):
        loss = ps.distill_loss(zs, ps.LogitsTeacher(zt), labels, divergence=name)
        (grad,) = torch.autograd.grad(loss, zs)
        assert loss.isfinite() and grad.isfinite().all() and (grad[2] == 0).all()
