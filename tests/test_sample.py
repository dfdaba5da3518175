"""sample and linear_sample: the law of the draws, their numbering, and what a row without a distribution gives."""

from __future__ import annotations

import math
from dataclasses import fields

import potstill as ps
import pytest
import torch
from potstill.reference.sample import uniforms

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def same(a: ps.TopK, b: ps.TopK) -> bool:
    return all(
        torch.equal(x, y)
        for f in fields(a)
        if isinstance(x := getattr(a, f.name), torch.Tensor) and isinstance(y := getattr(b, f.name), torch.Tensor)
    )


def histogram(top: ps.TopK, vocab: int) -> torch.Tensor:
    """How often each id was drawn, over all rows: [vocab]."""
    kept = top.ids >= 0
    return torch.zeros(vocab, dtype=torch.int64).index_add(0, top.ids[kept].long(), top.counts[kept].long())


def check_form(top: ps.TopK, z: torch.Tensor, n: int) -> None:
    """Unique ids in descending count then ascending id, n draws in all, padded; log-probabilities over everything."""
    assert top.ids.dtype == top.counts.dtype == torch.int32
    lead = z.double().logsumexp(-1)
    for ids, counts, log_probs, row, lse in zip(top.ids, top.counts, top.log_probs, z.double(), lead, strict=True):
        used = int((counts > 0).sum())
        pairs = [(-int(c), int(i)) for i, c in zip(ids[:used], counts[:used], strict=True)]
        assert pairs == sorted(set(pairs)) and len({i for _, i in pairs}) == used
        assert int(counts.sum()) == n and (counts[used:] == 0).all()
        assert (ids[used:] == -1).all() and (log_probs[used:] == -math.inf).all()
        torch.testing.assert_close(log_probs[:used].double(), row[ids[:used].long()] - lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_the_draws_follow_the_distribution(backend, temperature):
    """Chi-square over every id: 3,000 rows of 20 draws each; 5 standard deviations is one run in millions."""
    z = torch.tensor([2.0, -1.0, 0.5, -math.inf, 1.0, 0.0, 3.0, -2.0, 0.25, -0.5, 1.5])
    top = ps.sample(z.expand(3000, -1), 20, seed=7, temperature=temperature, backend=backend)
    check_form(top[:50], z.expand(50, -1), 20)
    assert top.sample_temperature == temperature and top.log_rest is None
    seen, p = histogram(top, 11).double(), torch.softmax(z.double() / temperature, -1)
    assert seen[3] == 0 and seen.sum() == 60_000
    live = p > 0
    chi = ((seen - 60_000 * p)[live] ** 2 / (60_000 * p[live])).sum().item()
    assert chi < 9 + 5 * math.sqrt(18), chi


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_importance_weights_are_unbiased(backend):
    """The proposal is flatter than the model; weighted back, the mean of f under the model comes out."""
    z, f = torch.randn(500, generator=torch.Generator().manual_seed(1)) * 2, torch.linspace(-1, 1, 500)
    top = ps.sample(z.expand(4000, -1), 50, seed=3, temperature=2.0, backend=backend)
    proposal = torch.log_softmax(z / top.sample_temperature, -1)
    ids = top.ids.clamp(min=0).long()
    weights = top.counts / 50 * (top.log_probs - proposal[ids]).exp()
    estimates = (weights * f[ids]).sum(-1).double()
    truth = (torch.softmax(z, -1) * f).sum().item()
    assert abs(estimates.mean().item() - truth) < 5 * estimates.std().item() / math.sqrt(4000)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backends_draw_the_same(dtype):
    """The same uniforms: only one within rounding of an edge may fall to the neighbour."""
    z = (torch.randn(40, 5003, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    for temperature in (1.0, 0.7, 2.0):
        a, b = (ps.sample(z, 64, seed=11, temperature=temperature, backend=x) for x in ("cpp", "torch"))
        check_form(a, z, 64)
        moved = (histogram(a, 5003) - histogram(b, 5003)).abs().sum().item() / 2
        assert moved <= 5, moved  # of 2,560
        torch.testing.assert_close(a.lse, b.lse, rtol=1e-5, atol=1e-5)


def test_seed_rows_threads_and_chunks():
    z = torch.randn(33, 3001, generator=torch.Generator().manual_seed(0)) * 3
    whole, threads = ps.sample(z, 17, seed=5), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert same(ps.sample(z, 17, seed=5), whole)
    finally:
        torch.set_num_threads(threads)
    assert same(ps.sample(z[20:], 17, seed=5, row_offset=20), whole[20:])
    assert not torch.equal(ps.sample(z, 17, seed=6).ids, whole.ids)
    repeated = ps.sample(z[:1].expand(8, -1), 17, seed=5)
    assert len({tuple(x.tolist()) for x in repeated.ids}) == 8, "rows share their uniforms"
    hidden, head = torch.randn(3, 11, 16), ps.Head(torch.randn(140, 16), torch.randn(140), softcap=4.0, vocab_size=131)
    first, *others = (ps.linear_sample(hidden, head, 9, seed=2, temperature=0.9, chunk_rows=c) for c in (33, 8, 1))
    assert first.ids.shape == (3, 11, 9) and first.ids.max() < 131
    for other in others:
        assert (first.ids != other.ids).sum() <= 2  # products of another height may round another way
    part = ps.linear_sample(hidden[1:], head, 9, seed=2, temperature=0.9, row_offset=11)
    assert (first.ids[1:] != part.ids).sum() <= 2


def test_uniforms_are_uniform():
    u = uniforms(400, 500, 123, 0, torch.device("cpu"))
    assert 0 <= u.min() and u.max() < 1 and len(u.unique()) == u.numel()
    seen = torch.histc(u, 100, 0, 1)
    assert ((seen - 2000) ** 2 / 2000).sum() < 99 + 5 * math.sqrt(198)
    assert abs(torch.corrcoef(u[:, :50].T) - torch.eye(50)).max() < 5 / math.sqrt(400)
    assert uniforms(1, 1, 123, 399, torch.device("cpu"))[0, 0] == u[399, 0]


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_rows_without_a_distribution_are_padding(backend):
    z = torch.zeros(4, 2500)
    z[0, 7], z[1], z[2, 2400] = math.nan, -math.inf, math.inf
    top = ps.sample(z, 5, seed=0, backend=backend)
    assert (top.ids[:3] == -1).all() and (top.counts[:3] == 0).all() and (top.log_probs[:3] == -math.inf).all()
    assert top.lse[0].isnan() and top.lse[1] == -math.inf and top.lse[2] == math.inf
    assert top.counts[3].sum() == 5
    one = torch.full((2, 3000), -math.inf)
    one[:, 2999] = -4.0
    assert (ps.sample(one, 5, seed=0, backend=backend).ids[:, 0] == 2999).all()
    assert ps.sample(torch.empty(0, 4), 3, seed=0, backend=backend).ids.shape == (0, 3)


def test_extreme_temperatures():
    z = torch.randn(5, 4001, generator=torch.Generator().manual_seed(0)) * 5
    cold = ps.sample(z, 8, seed=0, temperature=1e-3)
    assert torch.equal(cold.ids[:, 0].long(), z.argmax(-1)) and (cold.counts[:, 0] == 8).all()
    hot = ps.sample(z, 4000, seed=0, temperature=1e6)
    assert ((hot.counts > 0).sum(-1) > 2300).all()  # 4001 * (1 - 1/e) = 2529 different ids


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("n", {"n": 0}), ("n", {"n": 65_537}), ("seed", {"seed": -1}), ("seed", {"seed": 1 << 63}),
        ("seed", {"seed": 0.5}), ("row_offset", {"row_offset": -1}), ("temperature", {"temperature": 0.0}),
        ("vocab_size", {"vocab_size": 9}),
    ],
)  # fmt: skip
def test_bad_input_is_named(name, options):
    with pytest.raises(ValueError, match=name):
        ps.sample(torch.randn(2, 8), **{"n": 3, "seed": 0, **options})


def test_a_real_vocabulary_and_the_largest():
    z = torch.randn(3, 151_936, generator=torch.Generator().manual_seed(0)) * 3
    a, b = (ps.sample(z, 512, seed=4, backend=x) for x in ("cpp", "torch"))
    check_form(a, z, 512)
    assert (histogram(a, 151_936) - histogram(b, 151_936)).abs().sum() <= 20
    large = torch.zeros(1, 1 << 20)
    seen = ps.sample(large, 60_000, seed=1)
    mean = (seen.ids.clamp(min=0).double() * seen.counts).sum() / 60_000
    assert abs(mean / (1 << 20) - 0.5) < 5 / math.sqrt(12 * 60_000)
