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
    "sawtooth",
    "two values",
    "one high block",
    "far",
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
    if kind == "sawtooth":
        return sawtooth(v).expand(n, v).clone()
    if kind == "two values":
        return (x > 0).float()
    if kind == "one high block":  # everything that counts is in one block of the kernel, the rest far below
        x[:, -700:] += 300
        return x - 150
    if kind == "far":  # beyond what the fast exponential takes
        return x * 1e6
    return x


def sawtooth(v: int) -> torch.Tensor:
    """[v]: ascends in the very order in which the C++ kernel visits blocks of 1,024, and inside them."""
    blocks = (v + 1023) // 1024
    step = max(1, int(blocks * 0.618))
    while math.gcd(step, blocks) != 1:
        step += 1
    rank = torch.empty(blocks)
    rank[torch.arange(blocks) * step % blocks] = torch.arange(blocks).float()
    at = torch.arange(v)
    return (rank[at // 1024] * 1024 + at % 1024) / 64


def backends(device, dtype) -> list[str]:
    found = [name for name, refusal in dispatch.explain(Facts("topk", device, dtype)) if refusal is None]
    assert device.type != "cpu" or "cpp" in found, "build the extension first"
    return found


def log_sum_exp(z: torch.Tensor) -> torch.Tensor:
    """z fp64 [..., V] -> [...], the sum without rounding: torch's own in fp64 is no truth for fp64."""
    top = z.amax(-1, keepdim=True) if z.shape[-1] else z.new_full((*z.shape[:-1], 1), -math.inf)
    exps = (z - top.masked_fill(top.isinf(), 0.0)).exp()
    sums = [math.fsum(row) if not math.isnan(sum(row)) else math.nan for row in exps.flatten(0, -2).tolist()]
    return torch.tensor(sums, dtype=z.dtype).reshape(top.shape[:-1]).log() + top[..., 0].masked_fill(
        top[..., 0].isinf(), 0.0
    )


def check(x: torch.Tensor, k: int, backend: str, vocab_size: int | None = None) -> None:
    got = ps.topk(x, k, vocab_size=vocab_size, backend=backend).to("cpu")  # which sorts NaN of either sign alike
    z = x[..., :vocab_size].double().cpu()
    values, ids = z.sort(dim=-1, descending=True, stable=True)
    assert got.ids.dtype == torch.int32 and torch.equal(got.ids.long(), ids[..., :k])
    lse = log_sum_exp(z)
    # log-probabilities are differences from the log-sum-exp, whose own rounding is part of them
    scale = lse[lse.isfinite()].abs().max().item() if lse.isfinite().any() else 0.0
    eps = 2.3e-16 if x.dtype == torch.float64 else 1.2e-7
    tolerance = dict(rtol=16 * eps, atol=(32 + scale) * eps)
    close = dict(equal_nan=True, check_dtype=False, **tolerance)
    torch.testing.assert_close(got.lse, lse, **close)
    torch.testing.assert_close(got.log_probs, values[..., :k] - lse[..., None], **close)
    rest = log_sum_exp(values[..., k:])
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
    st.integers(1, 300) | st.integers(900, 9000), st.integers(1, 3), st.sampled_from(DTYPES), st.sampled_from([1, 2]),
    st.integers(1, 8), st.integers(0, 2**31), st.data(),
)  # fmt: skip
def test_exact_by_hypothesis(v, n, dtype, step, distinct, seed, data):
    """Few distinct values, so that ties are everywhere; any k, width, padding and stride."""
    g = torch.Generator().manual_seed(seed)
    chosen = VALUES[torch.randperm(len(VALUES), generator=g)[:distinct]]
    wide = torch.full((n * step, v + 3), 9.0, dtype=dtype)
    wide[::step, :v] = chosen[torch.randint(0, distinct, (n, v), generator=g)].to(dtype)
    vocab = data.draw(st.integers(1, v))
    check(wide[::step], data.draw(st.integers(1, min(vocab, 1024))), "cpp", vocab)


@pytest.mark.parametrize("kind", ["gaussian", "ascending", "descending", "equal", "third_banned", "sawtooth", "nan"])
def test_real_vocabularies(kind):
    """A multiple of nothing, and the largest; every k at which a buffer has another size."""
    for v, ks in ((151_937, (1, 2, 63, 64, 65, 512, 1000, 1024)), (1 << 20, (64, 1024))):
        x = rows(kind, 2, v)
        for k in ks:
            check(x, k, "cpp")
        check(x.bfloat16(), 64, "cpp")


def test_k_of_the_whole_row():
    for v in (1, 2, 63, 64, 65, 512, 1000, 1024):
        for kind in ("gaussian", "equal", "third_banned", "nan"):
            check(rows(kind, 3, v), v, "cpp")


@pytest.fixture
def isa():
    """isa(name) makes the C++ kernels run that instruction set until the test ends."""
    from potstill import _cpp

    before = _cpp.isa()
    yield _cpp.use_isa
    _cpp.use_isa(before)


def test_every_instruction_set_finds_the_same(isa):
    from potstill import _cpp

    for dtype in DTYPES:
        for kind in ("gaussian", "two values", "sawtooth", "nan", "far"):
            x, ids = rows(kind, 3, 20_011).to(dtype), torch.tensor([0, 20_010, 7])
            found = []
            for name in _cpp.usable_isas():
                isa(name)
                check(x, 65, "cpp")
                found.append((ps.topk(x, 65, ids=ids), ps.sample(x, 9, seed=1)))
            for top, _ in found:
                assert torch.equal(top.ids, found[0][0].ids) and torch.equal(top.token_ranks, found[0][0].token_ranks)
            for _, drawn in found:
                assert (drawn.ids != found[0][1].ids).sum() <= 2
    assert set(_cpp.usable_isas()) >= {"base"}


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
    x, ids, threads = rows("gaussian", 33, 20_000), torch.arange(33), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(ps.topk(x, 17, ids=ids, temperatures=(2.0,)))
    finally:
        torch.set_num_threads(threads)
    for more in found[1:]:
        for name in ("ids", "log_probs", "log_rest", "lse", "token_log_probs", "token_ranks"):
            assert torch.equal(getattr(found[0], name), getattr(more, name)), name
        assert torch.equal(found[0].log_rest_at[2.0], more.log_rest_at[2.0])


@pytest.mark.parametrize("k", [0, -1, 11, 1025, 2.0])
def test_bad_k_is_named(k):
    with pytest.raises(ValueError, match=rf"k={k} is not a whole number in 1\.\.10"):
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
