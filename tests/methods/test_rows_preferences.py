"""Rows 26 and 47 to 53: preferences, rankings, rationales and selection against their formulas."""

from __future__ import annotations

import numpy as np
import potstill as ps
import torch
import torch.nn.functional as F
from potstill.methods.preference import agreement_ranking, sequence_logprobs
from potstill.methods.recipes import preferences
from potstill.methods.samplers import percentile_keep

from .world import B, Case, T, World, ce, mean, row_tests, soft_ce

N = B // 2


def sums(z, labels):
    return -ce(z, labels).sum(-1)


def means(z, labels):
    return sums(z, labels) / (labels != -100).sum(-1)


def dpo(w, reference):
    margin = sums(w.z, w.labels) - reference
    return -F.logsigmoid(0.1 * (margin[:N] - margin[N:])).mean()


def ranked(w):
    s = means(w.z, w.labels)
    total = sum((s[j] - s[i]).clamp(min=0) for i in range(B) for j in range(i + 1, B))
    return total + 0.5 * mean(ce(w.z[:1], w.labels[:1]), w.keep[:1])


QUALITY = torch.tensor([[0.9, 0.4], [0.3, 0.8]])


def rationales_call(w):
    costs = -sequence_logprobs(w.hidden, w.weight, w.labels, reduction="mean")
    positive, negative = costs[:4].reshape(2, 2), costs[4:].reshape(2, 1)
    return preferences.answer_and_rationales(
        w.hidden, w.weight, w.labels, positive, negative, QUALITY.to(w.dtype), margin=40.0, rationale_weight=0.5
    )


def rationales(w):
    costs = -means(w.z, w.labels)
    positive = (costs[:4].reshape(2, 2) * QUALITY.to(w.dtype)).min(-1).values
    negative = (costs[4:] - 40.0).clamp(max=0)
    return mean(ce(w.z, w.labels), w.keep) + 0.5 * (positive - 0.2 * negative).mean()


KEEP_EXAMPLE = torch.tensor([True, False, True, True, False, True])


def filtered(w):
    return mean(ce(w.z, w.labels), w.keep & KEEP_EXAMPLE[:, None])


def token_labels(w):
    return (w.tokens % 2).bool()


CASES = {
    "26, plain distillation": Case(
        lambda w: preferences.hard_or_soft(w.hidden, w.weight, w.teacher, w.labels, soft=0.3),
        lambda w: mean(0.7 * ce(w.z, w.labels) + 0.3 * soft_ce(w.zt, w.z), w.keep),
    ),
    "47, live reference": Case(
        lambda w: preferences.preferred_answers(w.hidden, w.weight, w.labels, w.teacher),
        lambda w: dpo(w, sums(w.zt, w.labels)),
    ),
    "47, cached reference": Case(
        lambda w: preferences.preferred_answers(w.hidden, w.weight, w.labels, w.constant(B, name="reference")),
        lambda w: dpo(w, w.constant(B, name="reference")),
    ),
    "48": Case(lambda w: preferences.ranked_answers(w.hidden, w.weight, w.labels, ce_weight=0.5), ranked),
    "49": Case(rationales_call, rationales),
    "50": Case(
        lambda w: preferences.competed_instructions(w.hidden, w.weight, w.labels, KEEP_EXAMPLE.to(w.dtype)), filtered
    ),
    "51": Case(lambda w: preferences.filtered_thoughts(w.hidden, w.weight, w.labels, KEEP_EXAMPLE), filtered),
    "53": Case(
        lambda w: preferences.kept_tokens(w.hidden, w.weight, token_labels(w), w.keep),
        lambda w: F.binary_cross_entropy_with_logits(
            (w.z[..., 1] - w.z[..., 0])[w.keep], token_labels(w)[w.keep].to(w.dtype)
        ),
    ),
}  # fmt: skip


test_value_and_gradient, test_lower_precision, test_the_loss_falls = row_tests(CASES)


def test_26_the_best_over_shards_are_the_best_of_all():
    random = np.random.default_rng(0)
    teacher, reference = ([random.normal(size=n).astype(np.float32) for n in (7, 50, 23)] for _ in range(2))
    best = preferences.best_by_log_ratio(lambda: teacher, lambda: reference, ratio=0.5)
    score = np.concatenate([a.astype(np.float64) - b for a, b in zip(teacher, reference, strict=True)])
    blocks = [a.astype(np.float64) - b for a, b in zip(teacher, reference, strict=True)]
    kept = np.concatenate(list(best.masks(blocks)))
    assert kept.sum() == 40
    assert set(np.flatnonzero(kept)) == set(np.argsort(-score, kind="stable")[:40])


def test_48_what_two_judges_agree_on():
    assert agreement_ranking([3, 1, 2, 0], [3, 2, 1, 0]) in ([3, 1, 0], [3, 2, 0])


def test_49_bad_rationales_are_pushed_until_the_margin():
    w = World(torch.float32, {})
    words = dict(answer_weight=0.0, margin=7.0, negative_weight=1.0)

    def costs():
        w.refresh()
        return -sequence_logprobs(w.hidden, w.weight, w.labels, reduction="mean")

    before = costs()
    for _ in range(8):
        found = costs()
        positive, negative = found[:2].reshape(1, 2), found[2:].reshape(1, 4)
        w.step(preferences.answer_and_rationales(w.hidden, w.weight, w.labels, positive, negative, **words))
    after = costs()
    likeliest = before[2:].argmin() + 2
    assert after[likeliest] > before[likeliest] and after[:2].min() < before[:2].min()
    far = preferences.answer_and_rationales(
        w.hidden, w.weight, w.labels, after[:2].reshape(1, 2).detach(), after[2:].reshape(1, 4) + 100, **words
    )
    w_grad = torch.autograd.grad(far, w.weight, allow_unused=True)[0]
    assert w_grad is None or (w_grad == 0).all()


def test_52_tasks_have_their_shares_and_only_the_difficult():
    random = np.random.default_rng(1)
    tasks = random.integers(0, 3, 600)
    teacher, student = random.normal(1, 1, 600), random.normal(0, 1, 600)
    chosen = preferences.hard_and_balanced(teacher, student, tasks, {0: 0.5, 1: 0.3, 2: 0.2}, 100)
    assert np.bincount(tasks[chosen]).tolist() == [50, 30, 20]
    assert (teacher[chosen] > student[chosen]).all()
    gap = np.maximum(teacher - student, 0)
    assert gap[chosen].mean() > gap[gap > 0].mean()


def test_53_percentiles_in_turn():
    random = np.random.default_rng(2)
    variation, gap = random.normal(size=200), random.normal(size=200)
    kept = percentile_keep(variation, gap, upper=90)
    first = variation <= np.percentile(variation, 90)
    assert (kept == (first & (gap <= np.percentile(gap[first], 90)))).all()


def test_a_cached_reference_gives_the_live_ones_loss():
    w = World(torch.float64, {})
    cached = sequence_logprobs(w.t_hidden, ps.Head(w.t_weight), w.labels)
    live, stored = (
        preferences.preferred_answers(w.hidden, w.weight, w.labels, reference) for reference in (w.teacher, cached)
    )
    torch.testing.assert_close(live, stored, rtol=1e-12, atol=0)
    assert T == 8
