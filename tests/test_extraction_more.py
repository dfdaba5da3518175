"""What topk returns on request: the realised token, the rest at other temperatures, results in given buffers."""

from __future__ import annotations

import math
from dataclasses import replace

import potstill as ps
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TEMPERATURES = (0.25, 0.5, 2.0, 3.0, 20.0)


def check(x: torch.Tensor, k: int, ids: torch.Tensor, backend: str, vocab_size: int | None = None) -> None:
    got = ps.topk(x, k, vocab_size=vocab_size, ids=ids, temperatures=TEMPERATURES, backend=backend)
    z = x[..., :vocab_size].double() if vocab_size else x.double()
    plain = ps.topk(x, k, vocab_size=vocab_size, backend=backend)
    for name in ("ids", "log_probs", "log_rest", "lse"):
        torch.testing.assert_close(getattr(got, name), getattr(plain, name), rtol=0, atol=0, equal_nan=True)
    given = ids >= 0
    value = z.gather(-1, ids.clamp(min=0)[..., None])
    rank = torch.where(given, (z > value).sum(-1), -1)
    assert got.token_ranks.dtype == torch.int32 and torch.equal(got.token_ranks.long(), rank)
    lse = z.logsumexp(-1)
    eps = 2.3e-16 if x.dtype == torch.float64 else 1.2e-7
    size = z[z.isfinite()].abs().max().item() if z.isfinite().any() else 0.0
    expected = torch.where(given, value[..., 0] - lse, -math.inf)
    close = dict(equal_nan=True, check_dtype=False, rtol=16 * eps)
    torch.testing.assert_close(got.token_log_probs, expected, atol=(32 + size) * eps, **close)
    assert list(got.log_rest_at) == list(TEMPERATURES)
    for t, rest in got.log_rest_at.items():
        outside = (z / t).scatter(-1, got.ids.long(), -math.inf).logsumexp(-1)
        # z / T is rounded to the computing type, of size z / T
        torch.testing.assert_close(rest, outside - (z / t).logsumexp(-1), atol=(32 + 2 * size / t) * eps, **close)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_and_temperatures(dtype, backend):
    g = torch.Generator().manual_seed(0)
    for v, k in ((5, 5), (1023, 3), (1025, 64), (5003, 1000)):
        x = (torch.randn(6, v, generator=g) * 3).to(dtype)
        ids = torch.randint(0, v, (6,), generator=g)
        ids[2] = -100
        ids[3] = x[3].argmax()
        check(x, k, ids, backend)
        banned = x.masked_fill(torch.rand(6, v, generator=g) < 1 / 3, -math.inf)
        check(banned, k, ids, backend)
        check(torch.ones_like(x), k, ids, backend)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2200), st.sampled_from(DTYPES), st.sampled_from([1, 2]), st.integers(0, 2**31), st.data())
def test_tokens_by_hypothesis(v, dtype, step, seed, data):
    """Few distinct values, padding and strides: ranks count what is strictly above, ties do not count."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.full((3 * step, v + 3), 9.0, dtype=dtype)
    wide[::step, :v] = torch.tensor([0.0, -0.0, 1.0, -7.5, -math.inf, 4.0])[
        torch.randint(0, data.draw(st.integers(1, 6)), (3, v), generator=g)
    ].to(dtype)
    vocab = data.draw(st.integers(1, v))
    check(wide[::step], data.draw(st.integers(1, min(vocab, 1024))), torch.randint(0, vocab, (3,)), "cpp", vocab)


def test_the_rest_at_a_temperature_has_no_cancellation():
    """A rest of e^-70 at T = 1/2 beside a top entry of nearly 1: 1 - sum p would be 0."""
    x = torch.full((1, 3000), -35.0)
    x[0, 7] = 0.0
    got = ps.topk(x, 1, temperatures=(0.5, 1.0))
    assert got.log_rest_at[0.5].item() == pytest.approx(math.log(2999) - 70.0, rel=1e-6)
    assert torch.equal(got.log_rest_at[1.0], got.log_rest)


def test_nan_rows_say_so():
    x = torch.randn(3, 3000)
    x[1, 2222] = math.nan
    for backend in ("cpp", "torch"):
        got = ps.topk(x, 4, ids=torch.tensor([5, 5, 2222]), temperatures=(2.0,), backend=backend)
        assert got.ids[1, 0] == 2222
        for value in (got.token_log_probs, got.log_rest_at[2.0], got.lse, got.log_rest):
            assert value.isnan().tolist() == [False, True, False]
        assert got.token_ranks[1] == (x[1] > x[1, 5]).sum()


def test_linear_topk_takes_them_too():
    hidden, weight = torch.randn(4, 9, 16), torch.randn(140, 16)
    head, ids = ps.Head(weight, logit_scale=0.3, softcap=4.0, vocab_size=131), torch.randint(0, 131, (4, 9))
    got = ps.linear_topk(hidden, head, 12, ids=ids, temperatures=[2.0], chunk_rows=8)
    z = 4.0 * torch.tanh(0.3 * (hidden @ weight.T) / 4.0)
    expected = ps.topk(z, 12, vocab_size=131, ids=ids, temperatures=[2.0])
    assert got.token_ranks.shape == (4, 9)
    assert (got.token_ranks - expected.token_ranks).abs().max() <= 1
    torch.testing.assert_close(got.token_log_probs, expected.token_log_probs)
    torch.testing.assert_close(got.log_rest_at, expected.log_rest_at)
    empty = ps.linear_topk(torch.empty(0, 16), head, 2, ids=ids[:0, 0], temperatures=[2.0])
    assert empty.token_ranks.shape == (0,) and empty.log_rest_at[2.0].shape == (0,)


def buffers() -> ps.TopK:
    """Room for k = 3 of [2, 5] rows, filled with what nothing should look like."""
    row, entry = torch.full((2, 5), 7.0), torch.full((2, 5, 3), 7.0)
    return ps.TopK(
        entry.int(), entry.clone(), row.clone(), row.clone(), token_log_probs=row.clone(), token_ranks=row.int(),
        log_rest_at={2.0: row.clone()},
    )  # fmt: skip


def test_out_receives_the_results():
    x, ids, room = torch.randn(2, 5, 40), torch.randint(0, 40, (2, 5)), buffers()
    kept = room.log_probs
    got = ps.topk(x, 3, ids=ids, temperatures=(2.0,), out=room)
    expected = ps.topk(x, 3, ids=ids, temperatures=(2.0,))
    assert got is room and got.log_probs is kept
    for name in ("ids", "log_probs", "log_rest", "lse", "token_log_probs", "token_ranks"):
        assert torch.equal(getattr(room, name), getattr(expected, name)), name
    assert torch.equal(room.log_rest_at[2.0], expected.log_rest_at[2.0])
    hidden, weight, other = torch.randn(2, 5, 8), torch.randn(40, 8), buffers()
    assert ps.linear_topk(hidden, weight, 3, out=other) is other
    assert torch.equal(other.ids, ps.linear_topk(hidden, weight, 3).ids)
    assert (other.token_ranks == 7).all(), "what was not asked for was written"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("ids", {"ids": torch.full((2, 5, 3), 7)}),
        ("log_probs", {"log_probs": torch.full((2, 5, 3), 7.0, dtype=torch.float64)}),
        ("lse", {"lse": None}),
        ("token_ranks", {"token_ranks": torch.full((2, 5), 7)}),
        (r"log_rest_at\[2.0\]", {"log_rest_at": {}}),
        ("log_rest", {"log_rest": torch.empty(2, 5, device="meta")}),
    ],
)
def test_out_that_does_not_fit_is_left_alone(name, change):
    room = replace(buffers(), **change)
    with pytest.raises(ValueError, match=rf"out\.{name} is .*it must be"):
        ps.topk(torch.randn(2, 5, 40), 3, ids=torch.zeros(2, 5).long(), temperatures=(2.0,), out=room)
    for value in (room.ids, room.log_probs, room.token_log_probs, room.token_ranks):
        assert (value == 7).all()


def test_out_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"out.ids is .*\[2, 5, 3\].*\[2, 4, 3\]"):
        ps.topk(torch.randn(2, 4, 40), 3, out=buffers())
    with pytest.raises(TypeError, match="out must be a TopK"):
        ps.topk(torch.randn(2, 4, 40), 3, out=torch.empty(2, 4, 3))


def test_bad_input_is_named():
    x, ids = torch.randn(2, 10), torch.tensor([0, 9])
    with pytest.raises(ValueError, match=r"ids holds 10; accepted are 0\.\.9 and -100"):
        ps.topk(x, 1, ids=ids + 1)
    with pytest.raises(ValueError, match=r"ids holds 9; accepted are 0\.\.7"):
        ps.topk(x, 1, ids=ids, vocab_size=8)
    with pytest.raises(ValueError, match=r"ids has shape \[2, 1\]; the rows have \[2\]"):
        ps.topk(x, 1, ids=ids[:, None])
    with pytest.raises(TypeError, match="ids must be an int64 or int32 tensor"):
        ps.topk(x, 1, ids=ids.double())
    with pytest.raises(ValueError, match="ids is on meta; the rows are on cpu"):
        ps.topk(x, 1, ids=ids.to("meta"))
    for t in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature"):
            ps.topk(x, 1, temperatures=(t,))
    with pytest.raises(ValueError, match="at least one entry"):
        ps.topk(torch.empty(3, 0), 1)
    assert ps.topk(x, 1, ids=ids.int()).token_ranks.shape == (2,)
