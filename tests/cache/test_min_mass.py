"""Spec(min_mass=...): rows keep the fewest entries that hold so much probability; the rest takes in what is cut."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from potstill import cache, topk
from potstill.cache.exchange.parts import split

V, K = 400, 32


@pytest.fixture(scope="module")
def logits() -> torch.Tensor:
    scale = torch.tensor([0.1, 1, 3, 9, 40]).repeat(8)[:, None]
    return torch.randn(40, V, generator=torch.Generator().manual_seed(3)) * scale


def spec(**more) -> cache.Spec:
    return cache.Spec(V, K, values="fp32", temperatures=(2.0,), **more)


def write(path, logits, mass: float) -> cache.Cache:
    rows = topk(logits, K, temperatures=(2.0,))
    with cache.Writer(path, spec(min_mass=mass)) as w:
        assert w.add("a", torch.arange(40), rows)
        assert not w.add("a", torch.arange(40), rows)
    return cache.open(path)


@pytest.mark.parametrize("mass", [0.3, 0.9, 0.999])
def test_rows_keep_the_fewest_entries_that_hold_the_mass(tmp_path, logits, mass):
    store = write(tmp_path / "c", logits, mass)
    got = store["a"].topk
    p = logits.double().softmax(-1).sort(-1, descending=True).values[:, :K]
    counts = (got.ids >= 0).sum(-1)
    reached = p.cumsum(-1) >= mass
    want = torch.where(reached.any(-1), reached.int().argmax(-1) + 1, K)
    assert torch.equal(counts, want) and counts.min() == 1 and counts.max() == K
    assert torch.equal(store[("a")].topk.ids[0, : counts[0]], topk(logits[:1], K).ids[0, : counts[0]].int())
    # the rest is exact: what is outside the kept entries in the full softmax, at both temperatures
    for temperature, rest in ((1.0, got.log_rest), (2.0, got.log_rest_at[2.0])):
        full = (logits.double() / temperature).softmax(-1).sort(-1, descending=True).values
        outside = torch.stack([row[n:].sum() for row, n in zip(full, counts, strict=True)])
        torch.testing.assert_close(rest.double().exp(), outside, rtol=2e-5, atol=1e-7)
    assert store.verify().ok and store.spec.min_mass == mass


def test_a_cut_cache_is_smaller_resumes_and_splits_without_a_second_cut(tmp_path, logits):
    whole, cut = (write(tmp_path / f"{m}", logits, m) for m in (1.0, 0.9))
    assert cut.num_bytes < whole.num_bytes and '"min_mass"' not in whole._rust.spec
    with pytest.raises(cache.CacheError, match="min_mass"):
        cache.Writer(tmp_path / "0.9", spec(min_mass=0.8))
    # rows of a grid may hold a little more than they were cut to
    with cache.Writer(tmp_path / "g", cache.Spec(V, K, values="1/8", min_mass=0.9)) as w:
        w.add("a", torch.arange(40), topk(logits, K))
    split(tmp_path / "g", [tmp_path / "x"], weights=[1.0])
    before, after = (cache.open(tmp_path / p).numpy("a") for p in ("g", "x"))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_is_refused():
    for value in (0, -0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match="min_mass"):
            spec(min_mass=value)
    with pytest.raises(TypeError, match="min_mass"):
        spec(min_mass="0.9")
    with pytest.raises(ValueError, match="draws"):
        cache.Spec(V, K, sampled=True, min_mass=0.9)


def test_a_bad_row_is_refused_as_ever(tmp_path):
    top = SimpleNamespace(ids=[[1, 2]], log_probs=[[float("nan"), -1.0]], log_rest=[-2.0])
    with cache.Writer(tmp_path / "c", cache.Spec(V, K, min_mass=0.9)) as w:
        with pytest.raises(ValueError, match="NaN"):
            w.add("a", [1], top)
        with pytest.raises(ValueError, match="differ"):
            w.add("a", [1], SimpleNamespace(ids=[[1, 2]], log_probs=[[-1.0]], log_rest=[-2.0]))
