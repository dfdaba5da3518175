"""token_logprobs: values and gradients against fp64 autograd, memory of one chunk, the autograd contract."""

from __future__ import annotations

import math

import potstill as ps
import pytest
import torch
from potstill import gemm

V, D = 131, 16


def case(dtype: torch.dtype, seed: int = 0, rows: int = 12) -> tuple[torch.Tensor, ...]:
    """hidden [rows, D], weight [V + 9, D], bias, ids with ignored rows, subset [V]."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(s, generator=g).to(dtype) for s in ((rows, D), (V + 9, D), (V + 9,)))
    ids = torch.randint(0, V, (rows,), generator=g)
    ids[::5] = -100
    return hidden, weight, bias, ids, torch.rand(V, generator=g) < 0.2


def truth(hidden, weight, bias, ids, subset, scale=1.0, softcap=None):
    """(log_probs, entropy, log_mass) by the formulas of the docstring; ignored rows 0."""
    z = scale * (hidden @ weight.T + bias)[:, :V]
    z = softcap * torch.tanh(z / softcap) if softcap else z
    lp, live = z.log_softmax(-1), ids >= 0
    found = (
        lp.gather(-1, ids.clamp(min=0)[:, None])[:, 0], torch.distributions.Categorical(logits=z).entropy(),
        lp[:, subset].logsumexp(-1),
    )  # fmt: skip
    return tuple(torch.where(live, x, 0.0) for x in found)


def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("head", [{}, {"logit_scale": 0.7}, {"logit_scale": 0.3, "softcap": 5.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients(dtype, head, backend, no_worse):
    hidden, weight, bias, ids, subset = case(dtype)
    coefficients = torch.randn(3, len(ids), generator=torch.Generator().manual_seed(9)).double()

    def both(kind, function):
        x = leaves(hidden.to(kind), weight.to(kind), bias.to(kind))
        found = function(*x)
        total = sum((c * y.double()).sum() for c, y in zip(coefficients, found, strict=True))
        return [*found, *torch.autograd.grad(total, x)]

    scale, softcap = head.get("logit_scale", 1.0), head.get("softcap")
    exact = both(torch.float64, lambda h, w, b: truth(h, w, b, ids, subset, scale, softcap))
    plain = both(dtype, lambda h, w, b: [x.float() for x in truth(h, w, b, ids, subset, scale, softcap)])
    got = both(
        dtype,
        lambda h, w, b: ps.token_logprobs(
            h, ps.Head(w, b, vocab_size=V, **head), ids, entropy=True, subset=subset, chunk_rows=5, backend=backend
        ),
    )
    for name, g, p, t in zip(("log_probs", "entropy", "log_mass", "dh", "dw", "db"), got, plain, exact, strict=True):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert g.dtype == (dtype if name.startswith("d") else wide), name
        # a 16-bit gradient is rounded once on the way out
        no_worse(
            g, p, t, floor=1e-12 if dtype == torch.float64 else 4e-3 if name[0] == "d" and dtype.itemsize == 2 else 2e-6
        )


def test_alone_it_is_a_tensor_and_padding_gets_nothing():
    hidden, weight, bias, ids, _ = case(torch.float32)
    hidden, weight, bias = leaves(hidden, weight, bias)
    head = ps.Head(weight, bias, vocab_size=V)
    got = ps.token_logprobs(hidden.view(3, 4, D), head, ids.view(3, 4))
    assert isinstance(got, torch.Tensor) and got.shape == (3, 4) and (got.view(-1)[::5] == 0).all()
    got.sum().backward()
    assert (weight.grad[V:] == 0).all() and (bias.grad[V:] == 0).all() and (hidden.grad[::5] == 0).all()
    top = ps.linear_topk(hidden.detach(), head, 3, ids=ids)
    live = ids >= 0
    torch.testing.assert_close(top.token_log_probs[live], got.detach().view(-1)[live])
    frozen = ps.token_logprobs(hidden.detach(), ps.Head(weight.detach()), ids)
    assert not frozen.requires_grad
    named = ps.token_logprobs(hidden, head, ids, entropy=True)
    assert named.log_mass is None and named.entropy.shape == ids.shape


def test_each_result_alone_has_its_gradient():
    hidden, weight, bias, ids, subset = case(torch.float64)
    for i in range(3):
        x, y = leaves(hidden, weight, bias), leaves(hidden, weight, bias)
        got = ps.token_logprobs(x[0], ps.Head(x[1], x[2], vocab_size=V), ids, entropy=True, subset=subset)[i].sum()
        expected = truth(*y, ids, subset)[i].sum()
        for a, b in zip(torch.autograd.grad(got, x), torch.autograd.grad(expected, y), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_subsets_at_the_edges(backend):
    hidden, weight, _, ids, _ = case(torch.float32)
    weight = weight[:V]
    for subset, expected in ((torch.ones(V).bool(), 0.0), (torch.zeros(V).bool(), -math.inf)):
        x = hidden.clone().requires_grad_()
        got = ps.token_logprobs(x, ps.Head(weight), ids, subset=subset, backend=backend)
        live = ids >= 0
        assert (got.log_mass[live] - expected).abs().max() < 1e-6 or (got.log_mass[live] == expected).all()
        if expected == 0:
            got.log_mass.sum().backward()
            assert x.grad.abs().max() < 1e-5  # the whole vocabulary has mass 1 whatever hidden is


def test_a_subset_of_vanishing_mass_keeps_its_gradient():
    """Mass e^-200: its probabilities underflow, its log and its gradient do not."""
    weight = torch.zeros(50, 1)
    weight[10:] = -200.0
    x, subset = torch.ones(1, 1, requires_grad=True), torch.arange(50) >= 10
    got = ps.token_logprobs(x, ps.Head(weight), torch.tensor([0]), subset=subset)
    assert got.log_mass.item() == pytest.approx(-200 + math.log(40 / 10), abs=1e-3)
    got.log_mass.sum().backward()
    assert x.grad.item() == pytest.approx(-200, rel=1e-5)


def test_one_chunk_of_logits(monkeypatch):
    seen = []
    original = gemm.logits_into
    monkeypatch.setattr(gemm, "logits_into", lambda out, *a: (seen.append(out.shape[0]), original(out, *a))[1])
    hidden, weight, bias, ids, subset = case(torch.float32, rows=40)
    x = leaves(hidden, weight, bias)
    ps.token_logprobs(
        x[0], ps.Head(x[1], x[2], vocab_size=V), ids, subset=subset, chunk_rows=8
    ).log_mass.sum().backward()
    assert seen == [8] * 10


def test_second_derivative_raises():
    hidden, weight, *_, ids, _ = case(torch.float32)
    x = hidden.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ps.token_logprobs(x, weight[:V], ids).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


def test_compiled_equals_eager():
    hidden, weight, bias, ids, subset = case(torch.float32)

    def loss(h, w, b):
        got = ps.token_logprobs(h, ps.Head(w, b, vocab_size=V), ids, entropy=True, subset=subset)
        return (got.log_probs - 0.1 * got.entropy + got.log_mass).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x, y = leaves(hidden, weight, bias), leaves(hidden, weight, bias)
    a, b = compiled(*x), loss(*y)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(torch.autograd.grad(a, x), torch.autograd.grad(b, y))


def test_bad_input_is_named():
    hidden, weight, _, ids, _ = case(torch.float32)
    head = ps.Head(weight, vocab_size=V)
    with pytest.raises(ValueError, match=rf"ids holds \d+; accepted are 0..{V - 1} and -100"):
        ps.token_logprobs(hidden, head, ids + V + 100)
    with pytest.raises(ValueError, match=r"ids has shape \[3\]; the rows have \[12\]"):
        ps.token_logprobs(hidden, head, ids[:3])
    with pytest.raises(TypeError, match="ids must be an int64 or int32 tensor"):
        ps.token_logprobs(hidden, head, ids.float())
    with pytest.raises(TypeError, match="subset must be a bool tensor"):
        ps.token_logprobs(hidden, head, ids, subset=torch.ones(V))
    with pytest.raises(ValueError, match=rf"subset has shape \[{V + 9}\]"):
        ps.token_logprobs(hidden, head, ids, subset=torch.ones(V + 9).bool())
    with pytest.raises(ValueError, match="D = 16"):
        ps.token_logprobs(hidden[:, :5], head, ids)
    nothing = ps.token_logprobs(torch.empty(0, D), head, torch.empty(0, dtype=torch.long))
    assert nothing.shape == (0,)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("head", [{}, {"logit_scale": 0.3, "softcap": 5.0}], ids=str)
def test_several_ids_a_row(head, backend):
    """[..., K] ids, some missing and some twice, with entropy and mass beside them; rows without any are left out."""
    hidden, weight, bias, _, subset = case(torch.float64)
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(0, V, (12, 4), generator=g)
    ids[torch.rand(12, 4, generator=g) < 0.3] = -100
    ids[2], ids[5, 1] = -100, ids[5, 0]
    x, y = leaves(hidden, weight, bias), leaves(hidden, weight, bias)
    options = dict(entropy=True, subset=subset, chunk_rows=5, backend=backend)
    got = ps.token_logprobs(x[0].view(3, 4, D), ps.Head(x[1], x[2], vocab_size=V, **head), ids.view(3, 4, 4), **options)
    assert got.log_probs.shape == (3, 4, 4) and got.entropy.shape == got.log_mass.shape == (3, 4)
    scale, softcap = head.get("logit_scale", 1.0), head.get("softcap")
    each = [truth(*y, ids[:, k], subset, scale, softcap)[0] for k in range(4)]
    first = ids.max(1).values  # any id of the row: entropy and mass ask only whether there is one
    want = torch.stack(each, -1), *truth(*y, first, subset, scale, softcap)[1:]
    up = [torch.randn(w.shape, dtype=torch.float64, generator=g) for w in want]
    for a, b in zip((z.reshape(w.shape) for z, w in zip(got, want, strict=True)), want, strict=True):
        torch.testing.assert_close(a, b)
    totals = [sum((u * z.reshape(u.shape)).sum() for u, z in zip(up, found, strict=True)) for found in (got, want)]
    for a, b in zip(torch.autograd.grad(totals[0], x), torch.autograd.grad(totals[1], y), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    alone = ps.token_logprobs(hidden, ps.Head(weight), ids)
    assert alone.shape == (12, 4) and (alone[2] == 0).all()
    assert ps.token_logprobs(hidden, ps.Head(weight), ids[:, :0]).shape == (12, 0)
