"""Restricted vocabularies: two rows of a head equal the full logits; BCE with soft targets and its KL."""

from __future__ import annotations

import potstill as ps
import pytest
import torch
import torch.nn.functional as F
from potstill.methods.restricted import binary_logits, binary_loss, restrict, yes_probability

N, V, D, E = 6, 30, 5, 4
YES, NO = 17, 3


def sides(seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias, t_hidden, t_weight = (
        torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((N, D), (V, D), (V,), (N, E), (V, E))
    )
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), t_hidden, t_weight


def test_a_restricted_head_equals_the_full_logits(agree):
    hidden, weight, bias, t_hidden, t_weight = sides()
    head = ps.Head(weight, bias, logit_scale=0.7, softcap=2.5, vocab_size=V - 2)
    z = 2.5 * torch.tanh(0.7 * (hidden @ weight.t() + bias) / 2.5)
    agree(binary_logits(hidden, head, YES, NO).sum(), (z[:, YES] - z[:, NO]).sum(), [hidden, weight, bias])
    ids = torch.tensor([9, 3, 17, 27])
    teacher = ps.HiddenTeacher(t_hidden, restrict(t_weight, ids))
    p = (t_hidden @ t_weight.t())[:, ids].softmax(-1)
    expected = (p * (p.log() - z[:, ids].log_softmax(-1))).sum(-1).mean()
    agree(ps.linear_distill_loss(hidden, restrict(head, ids), teacher), expected, [hidden, weight, bias])
    yes = yes_probability(t_hidden, t_weight, YES, NO)
    torch.testing.assert_close(yes, (t_hidden @ t_weight.t())[:, [YES, NO]].softmax(-1)[:, 0])
    assert not yes.requires_grad


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_binary_loss(reduction, agree):
    g = torch.Generator().manual_seed(1)
    z = (torch.randn(N, 3, generator=g, dtype=torch.float64) * 5).requires_grad_()
    p = torch.rand(N, 3, generator=g, dtype=torch.float64)
    p[0], p[1] = 0.0, 1.0
    w = torch.rand(N, 3, generator=g, dtype=torch.float64)
    w[2, 1] = 0
    rows = w * F.binary_cross_entropy_with_logits(z, p, reduction="none")
    expected = {"mean": rows.sum() / w.sum(), "sum": rows.sum(), "none": rows}[reduction]
    got = binary_loss(z, p, token_weights=w, reduction=reduction)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)
    agree(got.sum(), expected.sum(), [z])
    kl = binary_loss(z, p, token_weights=w, reduction=reduction, entropy=False)
    entropy = -w * (torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p))
    entropy = {"mean": entropy.sum() / w.sum(), "sum": entropy.sum(), "none": entropy}[reduction]
    agree(kl.sum(), (expected - entropy).sum(), [z])


def test_kl_is_zero_where_both_agree_and_cross_entropy_is_not():
    z = torch.randn(N, dtype=torch.float64, requires_grad=True)
    p = z.detach().sigmoid()
    assert binary_loss(z, p, entropy=False).abs() < 1e-12 and binary_loss(z, p) > 0.3
    for entropy in (True, False):
        assert torch.autograd.grad(binary_loss(z, p, entropy=entropy), z)[0].abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounded_input_is_no_worse_than_plain_torch(dtype, no_worse):
    hidden, weight, bias, *_ = (x.detach().to(dtype) for x in sides())
    p = torch.rand(N, generator=torch.Generator().manual_seed(2)).to(dtype)

    def plain(hidden, weight, bias, p):
        z = F.linear(hidden, weight, bias)
        return F.binary_cross_entropy_with_logits(z[:, YES] - z[:, NO], p)

    truth = plain(hidden.double(), weight.double(), bias.double(), p.double())
    got = binary_loss(binary_logits(hidden, ps.Head(weight, bias), YES, NO), p)
    no_worse(got, plain(hidden, weight, bias, p), truth)


def test_refusals():
    _, weight, *_ = sides()
    for ids in ([V], [-1], []):
        with pytest.raises(ValueError, match="ids in 0..29"):
            restrict(weight, ids)
    with pytest.raises(ValueError, match="name an entry twice"):
        restrict(weight, [4, 4])
    with pytest.raises(ValueError, match="logits has"):
        binary_loss(torch.zeros(3), torch.zeros(2))
