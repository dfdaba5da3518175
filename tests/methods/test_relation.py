"""Relation losses: dense fp64 formulas, both forms of a Gram distance, masks, precision, and that nothing is N x N."""

from __future__ import annotations

import math

import potstill as ps
import pytest
import torch
import torch.nn.functional as F
from potstill.methods import self_relation
from potstill.methods.relation import attention_kl, attention_mse, gram_loss, relation_kl, span_product_loss

B, N, D, E = 2, 11, 4, 6


def states(seed=0, n=N):
    g = torch.Generator().manual_seed(seed)
    s, t = (torch.randn(B, n, d, generator=g, dtype=torch.float64) for d in (D, E))
    mask = torch.ones(B, n, dtype=torch.bool)
    mask[0, 2], mask[1, 7:] = False, False
    return s.requires_grad_(), t, mask


def plain_gram(s, t, distance, normalize):
    """One sequence, with both matrices whole."""
    if normalize:
        s, t = F.normalize(s, dim=-1), F.normalize(t, dim=-1)
    a, b = s @ s.t(), t @ t.t()
    if distance == "cosine":
        return 1 - (a * b).sum() / (a.norm() * b.norm())
    return (a - b).square().sum() if distance == "squared" else (a - b).abs().sum()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "distance, form", [("squared", "tiles"), ("squared", "moments"), ("l1", "tiles"), ("cosine", "tiles"),
                       ("cosine", "moments")],
)  # fmt: skip
def test_gram_value_and_gradient(distance, form, normalize, agree):
    s, t, mask = states()
    each = [plain_gram(s[b][mask[b]], t[b][mask[b]], distance, normalize) for b in range(B)]
    words = dict(distance=distance, form=form, normalize=normalize, token_weights=mask, tile_rows=4)
    agree(gram_loss(s, t, entries="sum", reduction="sum", **words), sum(each), [s])
    pairs = [1 if distance == "cosine" else mask[b].sum() ** 2 for b in range(B)]
    agree(gram_loss(s, t, **words), sum(x / n for x, n in zip(each, pairs, strict=True)) / B, [s])
    assert gram_loss(s, t, reduction="none", **words).shape == (B,)


def test_weights_multiply_rows_and_dead_rows_hold_anything(agree):
    s, t, mask = states()
    w = mask * torch.linspace(0.5, 2, N, dtype=torch.float64)
    bad = s.detach().clone()
    bad[0, 2] = math.nan
    bad.requires_grad_()
    got = gram_loss(bad, t, token_weights=w, entries="sum", reduction="sum")
    assert got == gram_loss(s, t, token_weights=w, entries="sum", reduction="sum")
    (grad,) = torch.autograd.grad(got, bad)
    assert grad.isfinite().all() and (grad[0, 2] == 0).all()
    dense = sum(plain_gram(s[b] * w[b, :, None], t[b] * w[b, :, None], "squared", False) for b in range(B))
    agree(gram_loss(s, t, token_weights=w, entries="sum", reduction="sum"), dense, [s])


@pytest.mark.parametrize("distance", ["squared", "l1", "cosine"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", ["tiles", "moments"])
def test_rounded_input_is_no_worse_than_plain_torch(distance, dtype, form, no_worse):
    if distance == "l1" and form == "moments":
        pytest.skip("no such form")
    s, t, _ = states(1, n=60)
    s, t = s.detach()[0].to(dtype).requires_grad_(), t[0].to(dtype)
    exact = s.detach().double().requires_grad_()
    truth = plain_gram(exact, t.double(), distance, False)
    plain = plain_gram(s, t, distance, False)
    got = gram_loss(s, t, distance=distance, form=form, entries="sum", tile_rows=16)
    no_worse(got, plain, truth)
    (g,), (p,), (e,) = (torch.autograd.grad(x, y) for x, y in ((got, s), (plain, s), (truth, exact)))
    no_worse(g, p, e, floor=torch.finfo(dtype).eps)


@pytest.mark.parametrize("form", ["tiles", "moments"])
def test_near_equal_states_do_not_cancel(form):
    g = torch.Generator().manual_seed(0)
    t = torch.randn(96, 8, generator=g)
    s = (t + 1e-4 * torch.randn(96, 8, generator=g)).requires_grad_()
    exact = s.detach().double().requires_grad_()
    truth = plain_gram(exact, t.double(), "squared", False)
    got = gram_loss(s, t, entries="sum", form=form)
    assert abs(got / truth - 1) < 2e-3
    fp32 = (s.t() @ s).square().sum() + (t.t() @ t).square().sum() - 2 * (s.t() @ t).square().sum()
    assert abs(fp32 / truth - 1) > 0.1, "the identity in fp32 does"
    a, b = torch.autograd.grad(got, s)[0], torch.autograd.grad(truth, exact)[0]
    assert (a - b).abs().max() < 2e-3 * b.abs().max()


@pytest.mark.parametrize("distance, form", [("squared", "auto"), ("cosine", "auto"), ("l1", "auto"),
                                            ("squared", "tiles"), ("cosine", "tiles")])  # fmt: skip
def test_no_square_matrix_is_made(distance, form, largest):
    n = 2048
    s, t = torch.randn(n, 16, requires_grad=True), torch.randn(n, 24)
    with largest() as made:
        gram_loss(s, t, distance=distance, form=form, normalize=True, tile_rows=64).backward()
    assert s.grad is not None and 0 < made[0] < 4 * n * n / 8


def test_equal_rotated_and_empty():
    s, _, _ = states()
    rotation = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))[0]
    for distance in ("squared", "l1", "cosine"):
        assert gram_loss(s, s.detach() @ rotation, distance=distance).abs() < 1e-12, "a rotation changes no relation"
        zero = torch.zeros(B, N, D, dtype=torch.float64, requires_grad=True)
        loss = gram_loss(zero, s, distance=distance)
        assert loss > 0 and torch.autograd.grad(loss, zero)[0].isfinite().all()
        none = gram_loss(s, s, distance=distance, token_weights=torch.zeros(B, N))
        assert none == 0 and (torch.autograd.grad(none, s)[0] == 0).all()
    with pytest.raises(ValueError, match="no identity over D x D"):
        gram_loss(s, s, distance="l1", form="moments")


def test_attention_maps(agree):
    g = torch.Generator().manual_seed(5)
    shape = (B, 3, N, N)
    scores = torch.randn(*shape, generator=g, dtype=torch.float64, requires_grad=True)
    causal = torch.ones(N, N, dtype=torch.bool).tril()
    a = scores.masked_fill(~causal, -math.inf).softmax(-1)
    t = torch.randn(*shape, generator=g, dtype=torch.float64).masked_fill(~causal, -math.inf).softmax(-1)
    agree(attention_mse(a, t), ((a - t).square() * causal).sum() / (causal.sum() * B * 3), [scores])
    half = causal & (torch.arange(N) % 2 == 0)
    agree(attention_mse(a, t, keep=half), ((a - t).square() * half).sum() / (half.sum() * B * 3), [scores])
    s_log, t_log = (torch.where(causal, x.clamp(min=1e-300).log(), 0.0) for x in (a, t))
    agree(attention_kl(a, t), (t * (t_log - s_log)).sum(-1).mean(), [scores])
    weights = torch.zeros(B, 3, N)
    weights[..., :4] = 1
    agree(attention_kl(a, t, token_weights=weights), (t * (t_log - s_log)).sum(-1)[..., :4].mean(), [scores])
    assert attention_kl(t, t).abs() < 1e-12


@pytest.fixture(params=["short", "long"])
def either_form(request, monkeypatch):
    """Both ways to run a relation: many heads in a product, and one at a time."""
    monkeypatch.setattr(self_relation, "LONG", 0 if request.param == "long" else 1 << 20)
    monkeypatch.setitem(self_relation.ENTRIES, "cpu", 3 * N * N)  # three heads, then what is left


@pytest.mark.parametrize("heads", [1, 2])
def test_relation_kl(heads, agree, either_form):
    s, t, mask = states()
    g = torch.Generator().manual_seed(6)
    keys = torch.randn(B, N, D, generator=g, dtype=torch.float64, requires_grad=True)
    t_keys = torch.randn(B, N, E, generator=g, dtype=torch.float64)

    def plain(k, tk):
        rows = []
        for b in range(B):
            for h in range(heads):
                q, y, tq, ty = (x[b][mask[b]].reshape(-1, heads, x.shape[-1] // heads)[:, h] for x in (s, k, t, tk))
                lq, lp = ((x @ z.t() / x.shape[1] ** 0.5).log_softmax(-1) for x, z in ((q, y), (tq, ty)))
                rows.append((lp.exp() * (lp - lq)).sum(-1))
        return torch.cat(rows).mean()

    agree(relation_kl(s, t, heads=heads, token_mask=mask), plain(s, t), [s])
    found = relation_kl(s, t, student_keys=keys, teacher_keys=t_keys, heads=heads, token_mask=mask)
    agree(found, plain(keys, t_keys), [s, keys])
    none = relation_kl(s, t, token_mask=torch.zeros_like(mask))
    assert none == 0 and (torch.autograd.grad(none, s)[0] == 0).all()
    whole = relation_kl(s, t, heads=heads, divergence="reverse_kl")
    mask = torch.ones_like(mask)
    agree(whole, relation_kl(s, t, heads=heads, token_mask=mask, divergence="reverse_kl"), [s])
    with pytest.raises(ValueError, match="cannot be cut into 3"):
        relation_kl(s, t, heads=3)


def test_positions_out_of_a_relation_may_hold_anything(either_form):
    s, t, mask = states()
    bad = s.detach().masked_fill(~mask[..., None], math.nan).requires_grad_()
    found = relation_kl(bad, t.masked_fill(~mask[..., None], math.nan), heads=2, token_mask=mask)
    torch.testing.assert_close(found, relation_kl(s, t, heads=2, token_mask=mask), rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(found, bad)
    assert grad.isfinite().all() and (grad[~mask] == 0).all() and (grad[mask] != 0).any()


@pytest.mark.parametrize("distance", ["l1", "squared"])
def test_span_products(distance, agree):
    g = torch.Generator().manual_seed(7)
    v, length = 50, 12
    hidden = torch.randn(B, length, D, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(v, D, generator=g, dtype=torch.float64, requires_grad=True)
    t_hidden = torch.randn(B, length, E, generator=g, dtype=torch.float64)
    t_weight = torch.randn(v, E, generator=g, dtype=torch.float64)
    spans = torch.tensor([[0, 0, 0, -1, 1, 1, 2, 3, 3, 3, 3, -1], [-1, -1, 0, 0, 1, 2, 2, 2, -1, -1, 5, 5]])
    p = (3 * torch.tanh(hidden @ weight.t() / 3) / 1.5).softmax(-1)
    q = ((t_hidden @ t_weight.t()) / 1.5).softmax(-1)
    rows = []
    for b in range(B):
        for i in range(length - 1):
            if spans[b, i] == spans[b, i + 1] >= 0:
                gap = p[b, i] * p[b, i + 1] - q[b, i] * q[b, i + 1]
                rows.append(gap.abs().sum() if distance == "l1" else gap.square().sum())
    assert len(rows) == 10
    teacher = ps.HiddenTeacher(t_hidden, ps.Head(t_weight))
    words = dict(distance=distance, temperature=1.5, chunk_rows=3)
    head = ps.Head(weight, softcap=3.0)
    agree(span_product_loss(hidden, head, teacher, spans, **words), torch.stack(rows).mean(), [hidden, weight])
    none = span_product_loss(hidden, head, teacher, spans * 0 - 1, **words)
    assert none == 0 and (torch.autograd.grad(none, weight)[0] == 0).all()


def test_span_products_and_self_relations_in_pieces(largest):
    hidden, weight = torch.randn(1, 256, 4, requires_grad=True), torch.randn(2000, 4, requires_grad=True)
    teacher = ps.HiddenTeacher(torch.randn(1, 256, 4), ps.Head(torch.randn(2000, 4)))
    with largest() as made:
        span_product_loss(hidden, weight, teacher, torch.zeros(1, 256, dtype=torch.int64), chunk_rows=16).backward()
    assert 0 < made[0] < 4 * 256 * 2000 / 4
    s, t = torch.randn(1, 2048, 8, requires_grad=True), torch.randn(1, 2048, 12)
    with largest() as made:
        relation_kl(s, t).backward()
    assert 0 < made[0] <= 4 * 256 * 2048, "chunks of 256 rows"


@pytest.mark.parametrize("loss", ["relation_kl", "span_products", "attention_mse", "attention_kl"])
def test_bf16_is_no_worse_than_plain_torch(loss, no_worse, either_form, bf16_products):
    """Over eight draws: the rounding of a single one may happen to cost plain torch nothing."""
    drawn = [of_bf16(loss, seed) for seed in range(8)]
    no_worse(*(torch.stack([value for value, _ in same]) for same in zip(*drawn, strict=True)))
    for (_, grad), (_, rounded_grad), (_, true_grad) in drawn:
        no_worse(grad, rounded_grad, true_grad, floor=2.0**-8)


def of_bf16(loss, seed):
    """(value, gradient) of ours in bf16, of plain torch in bf16 and in fp64."""
    g = torch.Generator().manual_seed(seed)
    s, w, ts, tw = (
        torch.randn(*shape, generator=g).bfloat16() for shape in ((1, 24, 16), (40, 16), (1, 24, 8), (40, 8))
    )
    maps = [(torch.randn(2, 24, 24, generator=g) * 2).softmax(-1).bfloat16() for _ in range(2)]

    def plain(s, w, ts, tw, a, t):
        if loss == "attention_mse":
            return (a - t).square().mean()
        if loss == "attention_kl":
            return (t * (t.log() - a.log())).sum(-1).mean()
        if loss == "relation_kl":
            lq, lp = ((x[0] @ x[0].t() / x.shape[-1] ** 0.5).log_softmax(-1) for x in (s, ts))
            return (lp.exp() * (lp - lq)).sum(-1).mean()
        p, q = ((x[0] @ y.t()).softmax(-1) for x, y in ((s, w), (ts, tw)))
        return (p[:-1] * p[1:] - q[:-1] * q[1:]).abs().sum(-1).mean()

    def ours(s, w, ts, tw, a, t):
        if loss.startswith("attention"):
            return (attention_mse if loss == "attention_mse" else attention_kl)(a, t)
        if loss == "relation_kl":
            return relation_kl(s, ts)
        return span_product_loss(s, w, ps.HiddenTeacher(ts, ps.Head(tw)), torch.zeros(1, 24, dtype=torch.int64))

    given = [s, w, ts, tw, *maps]
    found = []
    for f, dtype in ((ours, torch.bfloat16), (plain, torch.bfloat16), (plain, torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in given]
        value = f(*leaves)
        moves = leaves[4] if loss.startswith("attention") else leaves[0]
        found.append((value.detach(), torch.autograd.grad(value, moves)[0]))
    return found
