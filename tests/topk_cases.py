"""Rows that have broken a top-k before, and the fp64 truth they are held to."""

import math

import torch
from potstill.rows import Side

KINDS = (
    "gaussian", "heavy", "ascending", "descending", "equal", "steps", "third_banned", "almost_all_banned", "nan",
    "all_nan", "inf", "zeros", "lowest",
)  # fmt: skip


def rows(kind: str, n: int, v: int, seed: int = 0) -> torch.Tensor:
    """[n, v] fp32"""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, v, generator=g) * 3
    ramp = torch.arange(v).float().expand(n, v) / 64
    if kind == "heavy":
        return x / torch.randn(n, v, generator=g)
    if kind in ("ascending", "descending"):
        return ramp.clone() if kind == "ascending" else -ramp
    if kind == "equal":
        return torch.ones(n, v)
    if kind == "steps":  # ties across any k
        return (x / 2).round()
    if kind == "third_banned":
        return x.masked_fill(torch.rand(n, v, generator=g) < 1 / 3, -math.inf)
    if kind == "almost_all_banned":
        y = torch.full((n, v), -math.inf)
        y[1:, v // 2] = 1.0  # and row 0 has nothing at all
        return y
    if kind in ("nan", "inf"):
        x[0, v // 2] = x[-1, v // 3] = math.nan if kind == "nan" else math.inf
        x[0, v // 4] = -x[0, v // 2]  # of either sign
    if kind == "all_nan":
        x[0] = math.nan
    if kind == "zeros":
        return torch.where(x > 0, 0.0, -0.0)
    if kind == "lowest":  # what masks are often filled with
        return torch.where(x > 3, x, torch.finfo(torch.float32).min)
    return x


def check(found, x: torch.Tensor, k: int, vocab: int | None = None, what: str = "") -> None:
    """ids exactly, and the rest within a few roundings, of a stable fp64 sort. found: ids, log_probs, log_rest, lse."""
    ids, log_probs, log_rest, lse = found[:4]
    z = x[:, :vocab].double() + 0.0  # one zero and one NaN: a radix sort tells the signs apart
    z = torch.where(z.isnan(), math.nan, z)
    values, order = z.sort(dim=-1, descending=True, stable=True)
    assert ids.dtype == torch.int32 and torch.equal(ids.long(), order[:, :k]), what
    truth = z.logsumexp(-1)
    scale = truth[truth.isfinite()].abs().max().item() if truth.isfinite().any() else 0.0
    # log-probabilities are differences from the log-sum-exp, whose own rounding is part of them
    close = dict(equal_nan=True, check_dtype=False, rtol=16 * 1.2e-7, atol=(32 + scale) * 1.2e-7)
    torch.testing.assert_close(lse, truth, **close)
    torch.testing.assert_close(log_probs, values[:, :k] - truth[:, None], **close)
    rest = values[:, k:].logsumexp(-1) if k < z.shape[1] else torch.full_like(truth, -math.inf)
    torch.testing.assert_close(log_rest, rest - truth, **close)


def check_side(found, x: torch.Tensor, k: int, side: Side) -> None:
    """Scale and softcap: tanh differs by a rounding between libraries, so values are compared, not ids."""
    ids, log_probs, log_rest, lse = found[:4]
    z = x[:, : side.vocab_size].float() * side.scale
    z = side.softcap * torch.tanh(z / side.softcap) if side.softcap else z
    got = z.gather(1, ids.long())
    assert (ids.long().sort(-1).values.diff(dim=-1) > 0).all()  # k different ones
    torch.testing.assert_close(got, z.sort(dim=-1, descending=True).values[:, :k], rtol=4e-7, atol=0)
    close = dict(check_dtype=False, rtol=2e-6, atol=8e-6)
    torch.testing.assert_close(lse, z.double().logsumexp(-1), **close)
    torch.testing.assert_close(log_probs, got - lse[:, None], **close)
    torch.testing.assert_close(log_rest, z.double().scatter(1, ids.long(), -math.inf).logsumexp(-1) - lse, **close)


def check_with(found, x: torch.Tensor, k: int, tokens: torch.Tensor | None, temperatures: list[float]) -> None:
    """What topk_with adds: the token's log-probability and rank, the rest at each temperature."""
    check(found, x, k)
    token_log_probs, ranks, at = found[4:]
    z, close = x.double(), dict(check_dtype=False, rtol=4e-6, atol=1e-5)
    if tokens is None:
        assert token_log_probs.shape == ranks.shape == (0,)
    else:
        own = z.gather(1, tokens.clamp_min(0)[:, None])
        expected = torch.where(tokens < 0, -math.inf, own[:, 0] - z.logsumexp(-1))
        torch.testing.assert_close(token_log_probs, expected, **close)
        assert ranks.dtype == torch.int32
        assert ranks.tolist() == torch.where(tokens < 0, -1, (z > own).sum(1)).tolist()
    assert at.shape == ((len(x), len(temperatures)) if temperatures else (0, 0))
    for t, temperature in enumerate(temperatures):
        scaled = z / temperature
        rest = scaled.scatter(1, found[0].long(), -math.inf).logsumexp(-1) - scaled.logsumexp(-1)
        torch.testing.assert_close(at[:, t], rest, **close)
