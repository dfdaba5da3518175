"""topk and linear_topk: exact against a stable fp64 sort, on every kind of row that has broken a top-k before."""

from __future__ import annotations

import math

import potstill as ps
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from potstill import dispatch
from potstill.dispatch import Facts

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KINDS = (
    "gaussian",
    "heavy",
    "ascending",
    "descending",
    "equal",
    "third_banned",
    "almost_all_banned",
    "nan",
    "inf",
    "zeros",
)


def rows(kind: str, n: int, v: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, v, generator=g) * 3
    if kind == "heavy":
        return x / torch.randn(n, v, generator=g)
    if kind in ("ascending", "descending"):
        ramp = torch.arange(v).float().expand(n, v) / 64
        return ramp.clone() if kind == "ascending" else -ramp
    if kind == "equal":
        return torch.ones(n, v)
    if kind == "third_banned":
        return x.masked_fill(torch.rand(n, v, generator=g) < 1 / 3, -math.inf)
    if kind == "almost_all_banned":
        y = torch.full((n, v), -math.inf)
        y[1:, v // 2] = 1.0  # and row 0 has nothing at all
        return y
    if kind in ("nan", "inf"):
        x[0, v // 2] = x[-1, v // 3] = math.nan if kind == "nan" else math.inf
    if kind == "zeros":
        return torch.where(x > 0, 0.0, -0.0)
    return x


def backends(device, dtype) -> list[str]:
    found = [name for name, refusal in dispatch.explain(Facts("topk", device, dtype)) if refusal is None]
    assert device.type != "cpu" or "cpp" in found, "build the extension first"
    return found


def check(x: torch.Tensor, k: int, backend: str, vocab_size: int | None = None) -> None:
    got = ps.topk(x, k, vocab_size=vocab_size, backend=backend)
    z = x[..., :vocab_size].double()
    values, ids = z.sort(dim=-1, descending=True, stable=True)
    assert got.ids.dtype == torch.int32 and torch.equal(got.ids.long(), ids[..., :k])
    lse = z.logsumexp(-1)
    # log-probabilities are differences from the log-sum-exp, whose own rounding is part of them
    scale = lse[lse.isfinite()].abs().max().item() if lse.isfinite().any() else 0.0
    eps = 2.3e-16 if x.dtype == torch.float64 else 1.2e-7
    tolerance = dict(rtol=16 * eps, atol=(32 + scale) * eps)
    close = dict(equal_nan=True, check_dtype=False, **tolerance)
    torch.testing.assert_close(got.lse, lse, **close)
    torch.testing.assert_close(got.log_probs, values[..., :k] - lse[..., None], **close)
    rest = values[..., k:].logsumexp(-1) if k < z.shape[-1] else torch.full_like(lse, -math.inf)
    torch.testing.assert_close(got.log_rest, rest - lse, **close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_exact(kind, dtype, device):
    for v in (1023, 1024, 1025, 5003):
        x = rows(kind, 3, v).to(device, dtype)
        for k in (1, 2, 64, 1000):
            for backend in backends(device, dtype):
                check(x, k, backend)


VALUES = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.5, -math.inf, 60000.0, 1e-7])


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 300), st.integers(1, 3), st.sampled_from(DTYPES), st.sampled_from([1, 2]), st.integers(1, 8),
    st.integers(0, 2**31), st.data(),
)  # fmt: skip
def test_exact_by_hypothesis(v, n, dtype, step, distinct, seed, data):
    """Few distinct values, so that ties are everywhere; any k, width, padding and stride."""
    g = torch.Generator().manual_seed(seed)
    chosen = VALUES[torch.randperm(len(VALUES), generator=g)[:distinct]]
    wide = torch.full((n * step, v + 3), 9.0, dtype=dtype)
    wide[::step, :v] = chosen[torch.randint(0, distinct, (n, v), generator=g)].to(dtype)
    vocab = data.draw(st.integers(1, v))
    check(wide[::step], data.draw(st.integers(1, vocab)), "cpp", vocab)


def test_a_real_vocabulary():
    x = rows("gaussian", 2, 151_936)
    for k in (1, 64, 1024):
        check(x, k, "cpp")
        check(x.bfloat16(), k, "cpp")


def test_the_rest_has_no_cancellation():
    """A rest of 1e-12 beside a top entry of nearly 1: 1 - sum p is 0 in fp32, log_rest is exact."""
    x = torch.full((1, 3000), -35.0)
    x[0, 7] = 0.0
    got = ps.topk(x, 1)
    assert got.log_rest.item() == pytest.approx(math.log(2999) - 35.0, rel=1e-6)
    full = ps.topk(torch.randn(2, 50), 50)
    assert (full.log_rest == -math.inf).all()


def test_linear_topk_holds_one_chunk_and_equals_topk(monkeypatch):
    from potstill import gemm

    seen = []
    original = gemm.logits_into
    monkeypatch.setattr(gemm, "logits_into", lambda out, *a: (seen.append(out.shape[0]), original(out, *a))[1])
    hidden, weight, bias = torch.randn(4, 9, 16), torch.randn(140, 16), torch.randn(140)
    head = ps.Head(weight, bias, logit_scale=0.3, softcap=4.0, vocab_size=131)
    got = ps.linear_topk(hidden, head, 12, chunk_rows=8)
    assert max(seen) == 8 and sum(seen) == 36
    z = 4.0 * torch.tanh(0.3 * (hidden @ weight.T + bias) / 4.0)
    expected = ps.topk(z, 12, vocab_size=131)
    assert got.ids.shape == (4, 9, 12) and got.log_rest.shape == (4, 9)
    assert torch.equal(got.ids, expected.ids)
    torch.testing.assert_close(got.log_probs, expected.log_probs)
    torch.testing.assert_close(got.log_rest, expected.log_rest)


def test_no_rows():
    got = ps.topk(torch.empty(0, 40), 3)
    assert got.ids.shape == (0, 3) and got.lse.shape == (0,)
    assert ps.linear_topk(torch.empty(0, 4), torch.randn(9, 4), 2).ids.shape == (0, 2)


def test_threads_do_not_change_a_bit():
    x, threads = rows("gaussian", 33, 2000), torch.get_num_threads()
    try:
        one = ps.topk(x, 17)
        torch.set_num_threads(3)
        more = ps.topk(x, 17)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one.ids, more.ids) and torch.equal(one.log_probs, more.log_probs)
    assert torch.equal(one.log_rest, more.log_rest)


@pytest.mark.parametrize("k", [0, -1, 11, 1025, 2.0])
def test_bad_k_is_named(k):
    with pytest.raises(ValueError, match=rf"k={k} is outside 1\.\.10"):
        ps.topk(torch.randn(2, 10), k)


def test_bad_input_is_named():
    with pytest.raises(TypeError, match=r"logits.*int64.*\[2, 3\]"):
        ps.topk(torch.zeros(2, 3, dtype=torch.long), 1)
    with pytest.raises(ValueError, match=r"vocab_size=11.*1\.\.10"):
        ps.topk(torch.randn(2, 10), 1, vocab_size=11)
    with pytest.raises(ValueError, match="D = 4"):
        ps.linear_topk(torch.randn(2, 3), torch.randn(9, 4), 2)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        x = torch.randn(2, 10, requires_grad=True)
        torch.ops.potstill.topk(x, 3, [10.0, 1.0, 0.0], None, [], "auto")[1].sum().backward()
