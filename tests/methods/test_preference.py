"""Preference, ranking and set losses: value and gradient are the formula's in fp64; a small model learns by them."""

from __future__ import annotations

import itertools

import potstill as ps
import pytest
import torch
from potstill.methods import preference

B, L, D, V = 3, 5, 7, 23


def batch(seed=0):
    """hidden [2 B, L, D] and a head with gradients, labels with prompts of several lengths, a reference model."""
    g = torch.Generator().manual_seed(seed)
    hidden, other = (torch.randn(2 * B, L, D, generator=g, dtype=torch.float64) for _ in range(2))
    head, other_head = (torch.randn(V, D, generator=g, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, V, (2 * B, L), generator=g)
    for row in range(2 * B):
        labels[row, : row % 4] = -100
    return hidden.requires_grad_(), head.requires_grad_(), labels, other, other_head


def plain_scores(hidden, head, labels, mean):
    lp = (hidden @ head.T).log_softmax(-1)
    kept = [[lp[b, i, t] for i, t in enumerate(row) if t >= 0] for b, row in enumerate(labels.tolist())]
    return torch.stack([sum(row) / (len(row) if mean else 1) for row in kept])


FORMULAS = {
    "dpo": lambda h: torch.log(1 + torch.exp(-0.3 * h)),
    "ipo": lambda h: (h - 1 / 0.6) ** 2,
    "hinge": lambda h: torch.maximum(torch.zeros_like(h), 1 - 0.3 * h),
}


@pytest.mark.parametrize("sequence", ["sum", "mean"])
@pytest.mark.parametrize("source", ["live", "cached", "none"])
@pytest.mark.parametrize("loss", list(FORMULAS))
def test_preference_losses_are_their_formulas(loss, source, sequence):
    hidden, head, labels, other, other_head = batch()
    scores = plain_scores(hidden, head, labels, sequence == "mean")
    reference = plain_scores(other, other_head, labels, sequence == "mean")
    h = scores[:B] - scores[B:] - (0 if source == "none" else reference[:B] - reference[B:])
    expected = FORMULAS[loss](h).mean()
    given = {"live": ps.HiddenTeacher(other, ps.Head(other_head)), "cached": reference, "none": None}[source]
    got = preference.linear_preference_loss(
        hidden, head, labels, given, loss=loss, sequence=sequence, beta=0.3, chunk_rows=4
    )
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    wanted = torch.autograd.grad(expected, (hidden, head))
    torch.testing.assert_close(torch.autograd.grad(got, (hidden, head)), wanted, rtol=1e-9, atol=1e-12)


def test_label_smoothing_is_the_expected_loss_under_flipped_labels():
    w, l = torch.tensor([2.0, -1.0]).double(), torch.tensor([0.5, 3.0]).double()
    smooth = preference.dpo_loss(w, l, beta=0.4, label_smoothing=0.2, reduction="none")
    expected = 0.8 * preference.dpo_loss(w, l, beta=0.4, reduction="none")
    expected += 0.2 * preference.dpo_loss(l, w, beta=0.4, reduction="none")
    torch.testing.assert_close(smooth, expected)


def test_very_sure_pairs_stay_finite():
    w = torch.tensor([-9000.0, 9000.0], requires_grad=True)
    loss = preference.dpo_loss(w, torch.zeros(2), beta=1.0, reduction="none")
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([9000.0, 0.0]))
    torch.testing.assert_close(w.grad, torch.tensor([-1.0, 0.0]))


def test_an_all_masked_sequence_scores_zero_without_gradient():
    hidden, head, labels, *_ = batch()
    labels[1] = -100
    for reduction in ("sum", "mean"):
        scores = preference.sequence_logprobs(hidden, head, labels, reduction=reduction)
        assert scores[1] == 0
        (slope,) = torch.autograd.grad(scores.sum(), hidden)
        assert (slope[1] == 0).all() and (slope[0].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("given", ["order", "rewards"])
def test_pairwise_rank_is_the_sum_over_all_pairs(given):
    g = torch.Generator().manual_seed(1)
    scores = torch.randn(4, 5, generator=g, dtype=torch.float64).requires_grad_()
    rewards = torch.randint(0, 3, (4, 5), generator=g) if given == "rewards" else -torch.arange(5).expand(4, 5)
    keep = torch.rand(4, 5, generator=g) < 0.8
    expected = torch.zeros((), dtype=torch.float64)
    for row in range(4):
        for i, j in itertools.permutations(range(5), 2):
            if rewards[row, i] > rewards[row, j] and keep[row, i] and keep[row, j]:
                expected = expected + (scores[row, j] - scores[row, i] + 0.1).clamp(min=0) / 4
    got = preference.pairwise_rank_loss(scores, rewards if given == "rewards" else None, margin=0.1, keep=keep)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    slopes = (torch.autograd.grad(x, scores)[0] for x in (got, expected))
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=0)
    assert preference.pairwise_rank_loss(torch.tensor([3.0, 2.0, 1.0])) == 0


def test_contrast_over_sets_takes_the_minimum_and_stops_at_the_margin():
    positive = torch.tensor([[2.0, 1.5, 4.0], [1.0, 2.0, 3.0]], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([[0.5, 1.0, 0.1], [1.0, 1.0, 1.0]], dtype=torch.float64)
    negative = torch.tensor([[2.5, 0.5], [3.5, 4.0]], dtype=torch.float64, requires_grad=True)
    loss = preference.contrast_over_sets(positive, negative, weights, reduction="sum")
    # row 0: min(1.0, 1.5, 0.4) and 0.5 - 3; row 1: min(1, 2, 3), and both negatives are past the margin
    torch.testing.assert_close(loss.item(), 0.4 + 0.2 * 2.5 + 1.0)
    loss.backward()
    torch.testing.assert_close(positive.grad, torch.tensor([[0, 0, 0.1], [1.0, 0, 0]], dtype=torch.float64))
    torch.testing.assert_close(negative.grad, torch.tensor([[0, -0.2], [0, 0]], dtype=torch.float64))
    nothing = torch.zeros(2, 2, dtype=torch.bool)
    alone = preference.contrast_over_sets(positive, negative, weights, keep_negative=nothing, reduction="none")
    torch.testing.assert_close(alone.tolist(), [0.4, 1.0])
    assert (preference.min_over_set(negative, keep=nothing) == 0).all()


def test_agreement_is_the_longest_common_order():
    def longest(a, b):
        for n in range(len(a), -1, -1):
            for some in itertools.combinations(a, n):
                if [x for x in b if x in some] == list(some):
                    return n
        return 0

    for second in itertools.permutations(range(5)):
        found = preference.agreement_ranking(range(5), second)
        assert found == sorted(found) and [x for x in second if x in found] == found
        assert len(found) == longest(range(5), second)
    assert preference.agreement_ranking([1, 2], [3]) == []


def test_a_policy_learns_the_preferences():
    hidden, head, labels, other, other_head = batch(3)
    labels[:, 0] = 0  # every sequence has a label
    model = torch.nn.Parameter(other_head.clone())
    optimizer = torch.optim.Adam([model], lr=0.05)
    reference = preference.sequence_logprobs(other, other_head, labels).detach()
    losses = []
    for _ in range(30):
        loss = preference.linear_preference_loss(other, model, labels, reference, beta=0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(0.6931, abs=1e-4) and losses[-1] < 0.2
    scores = preference.sequence_logprobs(other, model, labels).detach()
    assert (preference.preference_margin(*scores.chunk(2), *reference.chunk(2)) > 0).all()


def test_refusals_name_what_was_given():
    hidden, head, labels, other, _ = batch()
    with pytest.raises(ValueError, match="chosen sequences first"):
        preference.linear_preference_loss(hidden[:3], head, labels[:3], None)
    with pytest.raises(ValueError, match="one side of the reference is missing"):
        preference.dpo_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="differ in shape"):
        preference.dpo_loss(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="beta=0"):
        preference.ipo_loss(torch.zeros(2), torch.zeros(2), beta=0)
    with pytest.raises(ValueError, match="loss='ppo'"):
        preference.linear_preference_loss(hidden, head, labels, None, loss="ppo")
    with pytest.raises(ValueError, match="names an item twice"):
        preference.agreement_ranking([1, 1], [1])
