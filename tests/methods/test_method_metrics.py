"""Metrics: calibration, AUROC, speculative sampling and sequence KL against counts, enumeration and real draws."""

from __future__ import annotations

import itertools

import potstill as ps
import pytest
import torch
from potstill.methods import metrics, speculative


def test_ece_is_the_plain_sum_over_bins():
    g = torch.Generator().manual_seed(0)
    c = torch.rand(500, generator=g, dtype=torch.float64)
    c[:3] = torch.tensor([0.0, 1.0, 0.2])
    y = torch.rand(500, generator=g) < c * 0.8
    for bins in (1, 10, 15):
        expected = 0.0
        for b in range(bins):
            inside = (c > b / bins) & (c <= (b + 1) / bins) if b else c <= 1 / bins
            if inside.any():
                gap = y[inside].double().mean() - c[inside].mean()
                expected += inside.double().mean() * gap.abs()
        assert metrics.calibration(c, y, bins=bins).ece == pytest.approx(float(expected), rel=1e-12)
    with pytest.raises(ValueError, match="probabilities are needed"):
        metrics.calibration(torch.tensor([2.0]), torch.tensor([True]))


def test_token_calibration_is_that_of_the_full_logits():
    g = torch.Generator().manual_seed(1)
    hidden, head = torch.randn(3, 40, 8, generator=g), torch.randn(50, 8, generator=g)
    labels = torch.randint(0, 50, (3, 40), generator=g)
    labels[:, ::2] = (hidden @ head.T).argmax(-1)[:, ::2]
    labels[0, :9] = -100
    confidence, best = (hidden @ head.T).softmax(-1).max(-1)
    valid = labels != -100
    expected = metrics.calibration(confidence[valid], (best == labels)[valid])
    got = metrics.token_calibration(hidden, head, labels)
    assert got.counts.sum() == valid.sum() and got.ece == pytest.approx(expected.ece, abs=1e-6)


def test_topk_mass_grows_to_the_kept_mass():
    top = ps.topk(torch.randn(6, 40), 5)
    mass = metrics.topk_mass(top)
    torch.testing.assert_close(mass[:, -1], 1 - top.log_rest.double().exp(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mass[:, 0], top.log_probs[:, 0].double().exp())
    assert (mass.diff(dim=-1) > 0).all()


def test_auroc_counts_pairs():
    g = torch.Generator().manual_seed(2)
    scores, positive = torch.randint(0, 9, (60,), generator=g).double(), torch.rand(60, generator=g) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[positive].tolist() for b in scores[~positive].tolist()]
    assert metrics.auroc(scores, positive) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert metrics.auroc(torch.tensor([1.0, 2.0]), torch.tensor([False, True])) == 1
    with pytest.raises(ValueError, match="0 positive"):
        metrics.auroc(scores, torch.zeros(60))


def test_the_meter_is_the_token_mean_over_all_batches():
    g = torch.Generator().manual_seed(3)
    head, teacher = torch.randn(30, 6, generator=g), torch.randn(9, 30, generator=g)
    hidden, labels = torch.randn(9, 6, generator=g), torch.randint(0, 30, (9,), generator=g)
    labels[4] = -100
    meter = metrics.DivergenceMeter(
        "forward_kl", "total_variation", "acceptance", ps.divergences.jsd(teacher_weight=0.3)
    )
    for part in (slice(0, 2), slice(2, 9)):
        meter.add(hidden[part], head, ps.LogitsTeacher(teacher[part]), labels[part])
    live = labels != -100
    p, q = teacher.softmax(-1)[live], (hidden @ head.T).softmax(-1)[live]
    found = meter.means()
    assert found["forward_kl"] == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)
    assert found["total_variation"] == pytest.approx(float((p - q).abs().sum(-1).mean() / 2), rel=1e-5)
    assert found["acceptance"] == pytest.approx(1 - found["total_variation"], rel=1e-5)
    assert len(found) == 4 and meter.tokens == 8
    only = metrics.DivergenceMeter("acceptance")
    only.add(hidden, head, ps.LogitsTeacher(teacher), labels)
    assert only.means() == {"acceptance": pytest.approx(found["acceptance"], rel=1e-6)}


def markov(seed):
    """A model of sequences of three tokens: first-token and transition log-probabilities, fp64."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, generator=g).double().log_softmax(-1), torch.randn(3, 3, generator=g).double().log_softmax(-1)


def test_sequence_kl_estimators_reach_the_enumerated_one():
    length, n = 4, 20_000
    (p0, p), (q0, q) = markov(0), markov(1)

    def log_prob(first, step, y):
        return first[y[0]] + sum(step[a, b] for a, b in zip(y, y[1:], strict=False))

    exact = sum(
        float(log_prob(p0, p, y).exp() * (log_prob(p0, p, y) - log_prob(q0, q, y)))
        for y in itertools.product(range(3), repeat=length)
    )
    g = torch.Generator().manual_seed(2)
    tokens = [torch.multinomial(p0.exp(), n, True, generator=g)]
    for _ in range(length - 1):
        tokens.append(torch.multinomial(p.exp()[tokens[-1]], 1, generator=g)[:, 0])
    y = torch.stack(tokens, 1)
    both = []
    for first, step in ((p0, p), (q0, q)):
        both.append(first[y[:, 0]] + step[y[:, :-1], y[:, 1:]].sum(1))
    kl = [(p0.exp() * (p0 - q0)).sum().expand(n)]
    kl += [(p.exp() * (p - q)).sum(-1)[y[:, i]] for i in range(length - 1)]
    plain, plain_error = metrics.sequence_kl(*both)
    tokenwise, token_error = metrics.sequence_kl_exact_tokens(torch.stack(kl, 1), torch.ones(n, length) > 0)
    assert abs(plain - exact) < 4 * plain_error and abs(tokenwise - exact) < 4 * token_error
    assert token_error < 0.7 * plain_error


def test_hacking_is_proxy_down_while_golden_goes_up():
    found = metrics.teacher_hacking([5, 4, 3, 2, 1], [5, 3, 2, 2.5, 3])
    assert found.hacked and (found.turn, found.rise, found.proxy_fall) == (2, 1, 2)
    assert not metrics.teacher_hacking([5, 4, 3], [5, 4, 3]).hacked
    assert not metrics.teacher_hacking([5, 3, 4], [5, 3, 4]).hacked


def test_speculative_sampling_keeps_the_targets_distribution_and_its_rate():
    g = torch.Generator().manual_seed(4)
    vocabulary, gamma, n = 6, 2, 60_000
    q = torch.randn(gamma, vocabulary, generator=g).softmax(-1).expand(n, -1, -1)
    p = torch.randn(gamma + 1, vocabulary, generator=g).softmax(-1).expand(n, -1, -1)
    drafted = torch.stack([torch.multinomial(q[0, i], n, True, generator=g) for i in range(gamma)], 1)
    accepted, token = speculative.verify_draft(drafted, q, p, generator=g)
    rate = speculative.acceptance(q[0].log(), p[0, :gamma].log())
    first = (accepted >= 1).double().mean().item()
    assert abs(first - rate[0].item()) < 3 * (rate[0] * (1 - rate[0]) / n).sqrt().item()
    # the first token, drafted or resampled, is distributed as p
    made = torch.where(accepted >= 1, drafted[:, 0], token)
    share = torch.bincount(made, minlength=vocabulary) / n
    assert ((share - p[0, 0]).abs() < 4 * (p[0, 0] / n).sqrt()).all()
    # and so is the one behind two accepted ones
    behind = torch.bincount(token[accepted == 2], minlength=vocabulary) / (accepted == 2).sum()
    assert ((behind - p[0, 2]).abs() < 4 * (p[0, 2] / (accepted == 2).sum()).sqrt()).all()


def test_block_tokens_are_the_mean_of_the_geometric_rounds():
    alpha, gamma = 0.7, 4
    chances = [alpha**i * (1 - alpha) for i in range(gamma)] + [alpha**gamma]
    mean = sum((i + 1) * c for i, c in enumerate(chances))
    assert speculative.block_tokens(alpha, gamma) == pytest.approx(mean)
    assert speculative.block_tokens(1.0, 4) == 5 and speculative.speed_up(1.0, 4, 0.25) == 2.5
    with pytest.raises(ValueError, match="alpha=1.2"):
        speculative.block_tokens(1.2, 4)
