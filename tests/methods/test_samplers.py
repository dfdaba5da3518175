"""Samplers: shares are DDK's formula, draws follow them, selection is a global sort's, quotas are met."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from potstill.methods import samplers
from potstill.methods.samplers import DomainMixture, ddk_weights, percentile_keep, quota_sample, quotas, top_ratio


def test_ddk_weights_trace_is_the_formula():
    random = np.random.default_rng(0)
    n, alpha = 5, 0.5
    r = None
    for _ in range(4):
        s, t = random.uniform(3, 20, n), random.uniform(2, 10, n)
        got = ddk_weights(s, t, r, alpha=alpha)
        if r is None:
            e = np.exp(s / t)
            expected = e / e.sum()
        else:
            psi = r * np.exp(s / t)
            expected = alpha * psi / psi.sum() + (1 - alpha) / n
            assert got.min() >= (1 - alpha) / n
        np.testing.assert_allclose(got, expected, rtol=1e-12)
        assert got.sum() == pytest.approx(1, abs=1e-12)
        r = got
    huge = ddk_weights([5000.0, 1.0], [1.0, 1.0], [0.5, 0.5])
    np.testing.assert_allclose(huge, [0.75, 0.25])
    with pytest.raises(ValueError, match="positive and finite"):
        ddk_weights([1.0, math.inf], [1.0, 1.0])


def test_draws_follow_the_shares_chi_squared():
    mixture = DomainMixture([50, 20, 400], shares=[0.2, 0.5, 0.3], seed=3)
    counts = np.bincount([domain for domain, _ in mixture.batch(6000)], minlength=3)
    expected = np.array([0.2, 0.5, 0.3]) * 6000
    assert ((counts - expected) ** 2 / expected).sum() < 13.8  # p = 0.001 at two degrees of freedom


def test_within_a_domain_nothing_comes_twice_before_all_came_once():
    mixture = DomainMixture([7, 3], seed=1)
    drawn = mixture.batch(300)
    for domain, size in enumerate([7, 3]):
        own = [i for d, i in drawn if d == domain]
        epochs = [own[start : start + size] for start in range(0, len(own) - size + 1, size)]
        assert len(epochs) > 10 and all(sorted(e) == list(range(size)) for e in epochs)
        assert len({tuple(e) for e in epochs}) > 1, "every epoch is shuffled anew"


def test_a_mixture_resumes_and_depends_on_its_seed():
    a = DomainMixture([7, 30], seed=5)
    a.batch(11)
    a.update([4.0, 9.0], [2.0, 3.0])
    a.batch(5)
    state = json.loads(json.dumps(a.state_dict()))
    expected = a.batch(40), a.update([4.0, 9.0], [2.0, 3.0]).tolist(), a.batch(9)
    b = DomainMixture([7, 30], seed=5)
    b.load_state_dict(state)
    assert (b.batch(40), b.update([4.0, 9.0], [2.0, 3.0]).tolist(), b.batch(9)) == expected
    assert DomainMixture([7, 30], seed=6).batch(40) != DomainMixture([7, 30], seed=5).batch(40)
    with pytest.raises(ValueError, match="the state is of domains"):
        DomainMixture([8, 30], seed=5).load_state_dict(state)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("kind", ["real", "ties", "extreme"])
def test_top_ratio_is_a_stable_global_sort(kind, largest):
    random = np.random.default_rng(7)
    scores = {
        "real": random.normal(size=1111),
        "ties": random.integers(-3, 4, 1111) / 4,
        "extreme": random.choice([-np.inf, np.inf, -0.0, 0.0, 5e-324, -5e-324, 1e300, -1e-300], 1111),
    }[kind]
    blocks = np.split(scores, [0, 13, 500, 500, 1110])
    order = np.argsort(-scores if largest else scores, kind="stable")
    for ratio in (0.001, 0.25, 0.5, 0.9999, 1.0):
        best = top_ratio(lambda: iter(blocks), ratio, largest=largest)
        expected = np.zeros(len(scores), bool)
        expected[order[: best.kept]] = True
        masks = list(best.masks(blocks))
        assert [len(m) for m in masks] == [len(b) for b in blocks]
        np.testing.assert_array_equal(np.concatenate(masks), expected)
        assert best.kept == math.ceil(ratio * len(scores)) and best.total == len(scores)


def test_top_ratio_holds_one_block():
    """Four hundred blocks made when asked for: never more than one of them is alive."""
    import weakref

    alive: list[weakref.ref] = []

    class Block(np.ndarray):
        pass

    def blocks():
        for i in range(400):
            block = np.random.default_rng(i).normal(size=50).view(Block)
            alive[:] = [r for r in alive if r() is not None]
            assert len(alive) <= 2, "earlier blocks are still held"
            alive.append(weakref.ref(block))
            yield block

    best = top_ratio(blocks, 0.5)
    kept = sum(int(m.sum()) for m in best.masks(blocks()))
    assert kept == best.kept == 10_000
    with pytest.raises(ValueError, match="NaN"):
        top_ratio(lambda: [np.array([1.0, np.nan])], 0.5)
    with pytest.raises(ValueError, match="no score was given"):
        top_ratio(list, 0.5)


def test_percentiles_are_of_what_is_left():
    random = np.random.default_rng(2)
    first, second = random.normal(size=(2, 400))
    keep = first <= np.percentile(first, 90)
    keep &= second <= np.percentile(second[keep], 90)
    np.testing.assert_array_equal(percentile_keep(first, second), keep)
    assert percentile_keep(np.arange(11), upper=90, lower=10).nonzero()[0].tolist() == list(range(1, 10))


def test_quotas_are_met_exactly():
    assert quotas([1, 1, 1], 10).tolist() == [4, 3, 3] and quotas([0.7, 0.2, 0.1], 10).tolist() == [7, 2, 1]
    for n in range(50):
        assert quotas([3.3, 1.1, 0.0, 7.7], n).sum() == n
    groups = np.array(["a"] * 50 + ["b"] * 4 + ["c"] * 30)
    weights = np.where(np.arange(84) % 2, 1.0, 0.0)
    chosen = quota_sample(groups, {"a": 1, "b": 1, "c": 2}, 40, weights=weights, seed=4)
    assert {g: int((groups[chosen] == g).sum()) for g in "abc"} == {"a": 10, "b": 10, "c": 20}
    assert (chosen % 2 == 1).all(), "an example of weight 0 is never drawn"
    counts = np.bincount(chosen, minlength=84)
    assert counts[:50].max() == 1 and sorted(counts[[51, 53]]) == [5, 5] and counts[54:].max() == 2
    np.testing.assert_array_equal(chosen, quota_sample(groups, {"a": 1, "b": 1, "c": 2}, 40, weights=weights, seed=4))
    with pytest.raises(ValueError, match="group 'd' has a quota"):
        quota_sample(groups, {"d": 1.0}, 3)


def test_difficult_examples_are_drawn_more_often():
    hits = sum(99 in quota_sample(np.zeros(100), {0: 1.0}, 10, weights=np.arange(100.0), seed=s) for s in range(200))
    easy = sum(10 in quota_sample(np.zeros(100), {0: 1.0}, 10, weights=np.arange(100.0), seed=s) for s in range(200))
    assert hits > 3 * easy
    assert samplers._score(int(samplers._ordered(np.array([-2.5]))[0])) == -2.5
