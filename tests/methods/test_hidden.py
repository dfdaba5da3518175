"""Hidden-state losses: value and gradient against plain torch in fp64, 16-bit, masks, projectors, layers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from potstill.methods import hidden
from potstill.methods.hidden import frobenius, hidden_loss, nearest_layers, normalized_mse, over_layers, uniform_pairs

B, T, D, E = 2, 5, 7, 9

PLAIN = {
    "mse": lambda s, t: (s - t).square().mean(-1),
    "l1": lambda s, t: (s - t).abs().mean(-1),
    "smooth_l1": lambda s, t: F.smooth_l1_loss(s, t, reduction="none", beta=0.7).mean(-1),
    "cosine": lambda s, t: 1 - F.cosine_similarity(s, t, dim=-1),
    "log_sigmoid_cosine": lambda s, t: -F.logsigmoid(F.cosine_similarity(s, t, dim=-1)),
}


def states(seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    s, t = (torch.randn(B, T, d, generator=g, dtype=torch.float64) for d in (D, E))
    projector = torch.randn(E, D, generator=g, dtype=torch.float64) / D**0.5
    weights = torch.rand(B, T, generator=g, dtype=torch.float64) + 0.1
    weights[0, 3] = 0
    return s.to(dtype).requires_grad_(), t.to(dtype), projector.to(dtype).requires_grad_(), weights


@pytest.mark.parametrize("reduction", ["mean", "sum", "sequence_mean", "none"])
@pytest.mark.parametrize("distance", PLAIN)
def test_value_and_gradient(distance, reduction, agree):
    s, t, projector, w = states()
    rows = PLAIN[distance](s @ projector.t(), t)
    expected = {
        "mean": (w * rows).sum() / w.sum(), "sum": (w * rows).sum(), "none": w * rows,
        "sequence_mean": ((w * rows).sum(-1) / w.sum(-1)).mean(),
    }[reduction]  # fmt: skip
    got = hidden_loss(s, t, distance=distance, beta=0.7, student_projector=projector, token_weights=w,
                      reduction=reduction)  # fmt: skip
    pull = torch.ones_like(got)
    agree((got * pull).sum(), (expected * pull).sum(), [s, projector])
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("distance", ["mse", "l1", "smooth_l1"])
def test_a_sum_over_features_is_D_means(distance, agree):
    s, t, projector, _ = states()
    words = dict(distance=distance, student_projector=projector)
    agree(hidden_loss(s, t, features="sum", **words), E * hidden_loss(s, t, **words), [s, projector])


@pytest.mark.parametrize("distance", ["cosine", "log_sigmoid_cosine"])
def test_the_time_axis(distance, agree):
    """DM-Codec's: one cosine a feature over the positions of the sequence, softplus(-cos)."""
    s, t, projector, _ = states()
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 2:] = False
    rows = []
    for b in range(B):
        x, y = (s[b] @ projector.t())[mask[b]], t[b][mask[b]]
        cos = torch.stack([x[:, d] @ y[:, d] / x[:, d].norm() / y[:, d].norm() for d in range(E)])
        rows.append(1 - cos if distance == "cosine" else F.softplus(-cos))
    words = dict(distance=distance, axis="time", student_projector=projector)
    agree(hidden_loss(s, t, token_weights=mask, **words), torch.stack(rows).mean(), [s, projector])
    assert hidden_loss(s, t, reduction="none", **words).shape == (B, E)


def test_normalized_mse_and_frobenius(agree):
    s, t, projector, w = states()
    x = s @ projector.t()
    keep = w > 0
    expected = F.mse_loss(x[keep], t[keep]) / (t[keep].square().mean() + 2.0**-7)
    agree(normalized_mse(s, t, eps=2.0**-7, student_projector=projector, token_weights=keep), expected, [s, projector])
    agree(frobenius(s, t, student_projector=projector, token_weights=keep), (x[keep] - t[keep]).norm(), [s, projector])
    agree(
        hidden_loss(s, t, features="sum", reduction="sum", student_projector=projector), (x - t).square().sum(),
        [s, projector],
    )  # fmt: skip
    with pytest.raises(TypeError, match="eps"):
        normalized_mse(s, t)
    same = t.clone().requires_grad_()
    loss = frobenius(same, t)
    assert loss == 0 and (torch.autograd.grad(loss, same)[0] == 0).all()


def test_a_projector_on_the_teachers_side_learns_and_the_teacher_does_not(agree):
    s, t, _, w = states()
    t.requires_grad_()
    projector = torch.nn.Linear(E, D, dtype=torch.float64)
    expected = (w * (s - projector(t.detach())).square().mean(-1)).sum() / w.sum()
    leaves = [s, projector.weight, projector.bias]
    agree(hidden_loss(s, t, teacher_projector=projector, token_weights=w), expected, leaves)
    assert torch.autograd.grad(hidden_loss(s, t, teacher_projector=projector), t, allow_unused=True) == (None,)


@pytest.mark.parametrize("distance", PLAIN)
def test_rows_left_out_may_hold_anything(distance):
    s, t, projector, w = states()
    bad_s, bad_t = s.detach().clone(), t.clone()
    bad_s[0, 3], bad_t[0, 3] = math.nan, math.inf
    bad_s.requires_grad_()
    words = dict(distance=distance, student_projector=projector, token_weights=w)
    for loss in (hidden_loss, frobenius, lambda s, t, **o: normalized_mse(s, t, eps=1e-6, **o)):
        options = words if loss is hidden_loss else {k: v for k, v in words.items() if k != "distance"}
        bad, good = loss(bad_s, bad_t, **options), loss(s, t, **options)
        assert bad == good
        found = torch.autograd.grad(bad, [bad_s, projector])
        torch.testing.assert_close(found, torch.autograd.grad(good, [s, projector]))
        assert (found[0][0, 3] == 0).all()


def test_no_row_at_all_is_zero_with_zero_gradients():
    s, t, projector, w = states()
    for distance in PLAIN:
        loss = hidden_loss(s, t, distance=distance, student_projector=projector, token_weights=w * 0)
        assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, [s, projector]))
    loss = normalized_mse(s, t, eps=0.5, student_projector=projector, token_weights=w * 0)
    assert loss == 0 and (torch.autograd.grad(loss, s)[0] == 0).all()


def test_zero_vectors_have_no_direction():
    s, t = torch.zeros(3, D, dtype=torch.float64, requires_grad=True), torch.ones(3, D, dtype=torch.float64)
    assert hidden_loss(s, t, distance="cosine") == 1
    assert hidden_loss(s, t, distance="log_sigmoid_cosine").item() == pytest.approx(math.log(2))
    for distance in ("cosine", "log_sigmoid_cosine"):
        assert torch.autograd.grad(hidden_loss(s, t, distance=distance), s)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("distance", PLAIN)
def test_rounded_input_is_no_worse_than_plain_torch(distance, dtype, no_worse):
    if distance == "smooth_l1" and dtype == torch.float16 and torch.__version__.startswith("2.6."):
        pytest.skip("torch 2.6 has no gradient of its own to compare with")
    s, t, _, _ = states(dtype=dtype)
    t = t[..., :D]
    exact = s.detach().double().requires_grad_()
    truth = PLAIN[distance](exact, t.double()).mean()
    plain = PLAIN[distance](s, t).mean()
    got = hidden_loss(s, t, distance=distance, beta=0.7)
    assert got.dtype == torch.float32
    no_worse(got, plain, truth)
    (g,), (p,), (e,) = (torch.autograd.grad(x, y) for x, y in ((got, s), (plain, s), (truth, exact)))
    no_worse(g, p, e, floor=torch.finfo(dtype).eps)


def test_cosine_of_near_equal_states_keeps_its_digits():
    """1 - cos in fp32 loses everything below 1e-7; half the squared distance of the unit vectors does not."""
    g = torch.Generator().manual_seed(0)
    t = torch.randn(64, 128, generator=g)
    s = t + 1e-5 * torch.randn(64, 128, generator=g)
    truth = (1 - F.cosine_similarity(s.double(), t.double(), dim=-1)).mean()
    assert abs(hidden_loss(s, t, distance="cosine") / truth - 1) < 0.02
    assert abs((1 - F.cosine_similarity(s, t, dim=-1)).mean() / truth - 1) > 0.5


def test_layers(agree):
    g = torch.Generator().manual_seed(3)
    students = [torch.randn(B, T, D, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    teachers = [torch.randn(B, T, E, generator=g, dtype=torch.float64) for _ in range(6)]
    maps = [torch.randn(E, D, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    learned = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)
    assert uniform_pairs(2, 6) == [(0, 2), (1, 5)]
    found = over_layers(
        hidden_loss, students, teachers, uniform_pairs(2, 6), weights=learned, total="sum", student_projectors=maps,
        distance="l1",
    )  # fmt: skip
    parts = [(students[i] @ maps[i].t() - teachers[j]).abs().mean() for i, j in ((0, 2), (1, 5))]
    agree(found, learned[0] * parts[0] + learned[1] * parts[1], [*students, *maps, learned])
    tail = over_layers(normalized_mse, students, teachers, [(1, 5)], student_projectors=maps[1:], eps=0.0)
    assert torch.autograd.grad(tail, students[0], allow_unused=True) == (None,)
    with pytest.raises(ValueError, match="say which belong together"):
        over_layers(hidden_loss, students, teachers)
    with pytest.raises(ValueError, match="no multiple"):
        uniform_pairs(4, 6)


def test_the_nearest_layers_of_each_token(agree):
    g = torch.Generator().manual_seed(4)
    student = torch.randn(B, T, D, generator=g, dtype=torch.float64, requires_grad=True)
    teachers = [torch.randn(B, T, E, generator=g, dtype=torch.float64) for _ in range(5)]
    w = torch.randn(D, E, generator=g, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 4] = False
    total, chosen = 0, set()
    for b, i in mask.nonzero().tolist():
        d = [(student[b, i] - w @ layer[b, i]).square().mean() for layer in teachers]
        order = sorted(range(5), key=lambda j: d[j].item())[:2]
        chosen |= {tuple(order)}
        total = total + 0.25 * d[order[0]] + 0.75 * d[order[1]]
    assert len(chosen) > 1, "tokens differ in their nearest layers"
    got = nearest_layers(student, teachers, 2, teacher_projector=w, weights=[0.25, 0.75], token_weights=mask)
    agree(got, total / mask.sum(), [student, w])
    with pytest.raises(ValueError, match="k=6 is outside"):
        nearest_layers(student, teachers, 6, teacher_projector=w)


def test_refusals_say_what_to_do():
    s, t, projector, w = states()
    with pytest.raises(ValueError, match="7 features and the teacher's 9; give student_projector"):
        hidden_loss(s, t)
    with pytest.raises(ValueError, match="all but the last size must agree"):
        hidden_loss(s, t[:, 1:])
    with pytest.raises(ValueError, match="distance='mae' is not known"):
        hidden_loss(s, t, distance="mae", student_projector=projector)
    with pytest.raises(ValueError, match="the rows have"):
        hidden_loss(s, t, student_projector=projector, token_weights=w[0])
    assert hidden_loss(s, t, distance=hidden.cosine, student_projector=projector).dim() == 0
