"""Liger's JSD loss by ours: the same constructor, call, values and gradients."""

from __future__ import annotations

import pytest
import torch
from potstill.integrations.liger import LigerFusedLinearJSDLoss

N, V, D, DT = 13, 47, 12, 20


def numbers(teacher_rows=V):
    g = torch.Generator().manual_seed(0)
    shapes = [(N, D), (V, D), (N, DT), (teacher_rows, DT), (V,), (teacher_rows,)]
    h, w, th, tw, b, tb = (torch.randn(*s, generator=g) for s in shapes)
    labels = torch.randint(0, V, (N,), generator=g)
    labels[[0, 5]] = -100
    return [x.requires_grad_() for x in (h, w)], (th, tw), labels, b.requires_grad_(), tb


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "words",
    [
        {},
        {"beta": 0.0, "temperature": 2.0},
        {"beta": 1.0, "weight_hard_loss": 0.2, "weight_soft_loss": 0.8, "chunk_size": 5},
        {"beta": 0.9, "weight_hard_loss": 0.0, "return_soft_hard_loss": True},
        {"temperature": 1.5, "return_soft_hard_loss": True},
    ],
)
def test_equal_to_liger(words, bias):
    rival = pytest.importorskip("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss
    pair = []
    for cls in (LigerFusedLinearJSDLoss, rival):
        (h, w), (th, tw), labels, b, tb = numbers()
        loss = cls(**{"compiled": False, **words})
        found = loss(h, w, th, tw, labels, b, tb) if bias else loss(h, w, th, tw, labels)
        parts = found if isinstance(found, tuple) else (found,)
        grads = torch.autograd.grad(parts[0], (h, w, b) if bias else (h, w))
        pair.append([*(x.detach() for x in parts), *grads])
    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-6)


def test_a_padded_teacher_gets_no_mass_and_a_smaller_one_is_refused():
    (h, w), (th, tw), labels, *_ = numbers(teacher_rows=V + 9)
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0)
    torch.testing.assert_close(loss(h, w, th, tw, labels), loss(h, w, th, tw[:V], labels))
    padded = torch.cat([w.detach(), torch.randn(9, D) * 5])
    assert abs(loss(h, w, h.detach(), padded, labels)) < 1e-6, "equal models"
    with pytest.raises(ValueError, match="teacher_weight has 40 rows, student_weight 47"):
        loss(h, w, th, tw[:40], labels)
    ignored = loss(h, w, th, tw, torch.full((N,), -100))
    assert ignored == 0 and (torch.autograd.grad(ignored, h)[0] == 0).all()
