"""Contrastive losses: the dense formula in fp64, masks, queue, soft targets, bounds of known mutual information."""

from __future__ import annotations

import math

import potstill as ps
import pytest
import torch
import torch.nn.functional as F
from potstill.methods.contrastive import (
    Queue,
    contrastive_loss,
    mutual_information_bound,
    similarity_loss,
    soft_targets,
)  # fmt: skip
from potstill.methods.lse import log_sum_exp

N, M, D = 7, 12, 5


def features(seed=0, m=N):
    g = torch.Generator().manual_seed(seed)
    a, c = (torch.randn(n, D, generator=g, dtype=torch.float64, requires_grad=True) for n in (N, m))
    return a, c


def scores(a, c, tau):
    return F.normalize(a, dim=-1) @ F.normalize(c, dim=-1).t() / tau


def test_infonce_is_cross_entropy_over_the_batch(agree):
    a, c = features()
    agree(contrastive_loss(a, c, temperature=0.3), F.cross_entropy(scores(a, c, 0.3), torch.arange(N)), [a, c])
    plain = F.cross_entropy(a @ c.t() / 0.3, torch.arange(N))
    agree(contrastive_loss(a, c, temperature=0.3, normalize=False), plain, [a, c])
    z = scores(a, c, 0.3)
    both = (F.cross_entropy(z, torch.arange(N)) + F.cross_entropy(z.t(), torch.arange(N))) / 2
    agree(contrastive_loss(a, c, temperature=0.3, two_way=True), both, [a, c])


def test_positives_weights_and_a_learned_temperature(agree):
    a, c = features(1, M)
    at = torch.tensor([3, 11, 0, -100, 5, 5, 1])
    w = torch.linspace(0.2, 1, N, dtype=torch.float64)
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    rows = F.cross_entropy(scores(a, c, tau), at, reduction="none")
    live = (at >= 0) * w
    got = contrastive_loss(a, c, temperature=tau, positives=at, token_weights=w)
    agree(got, (live * rows).sum() / live.sum(), [a, c, tau])


def dense(z, at, labels, candidate_labels, with_positive):
    """Row by row with the candidates that are left out dropped."""
    rows = []
    for i in range(len(z)):
        keep = [
            j for j in range(z.shape[1])
            if (j == at[i] and with_positive)
            or (j != at[i] and (labels is None or labels[i] != candidate_labels[j]))
        ]  # fmt: skip
        rows.append(z[i, keep].logsumexp(0) - z[i, at[i]] if keep else z[i, 0] * 0)
    return torch.stack(rows)


@pytest.mark.parametrize("with_positive", [True, False])
@pytest.mark.parametrize("labelled", [True, False])
def test_masks(labelled, with_positive, agree):
    a, c = features(2, M)
    labels = torch.tensor([0, 1, 0, 2, 2, 1, 0]) if labelled else None
    theirs = torch.tensor([0, 1, 0, 2, 2, 1, 0, 0, 1, 2, 2, 1]) if labelled else None
    rows = dense(scores(a, c, 0.2), range(N), labels, theirs, with_positive)
    words = dict(temperature=0.2, labels=labels, candidate_labels=theirs, positive_in_denominator=with_positive)
    agree(contrastive_loss(a, c, **words), rows.mean(), [a, c])
    own = None if labels is None else theirs[:N]
    rows = dense(scores(a, c[:N], 0.2), range(N), labels, own, with_positive)
    back = dense(scores(c[:N], a, 0.2), range(N), own, labels, with_positive)
    words["candidate_labels"] = own
    agree(contrastive_loss(a, c[:N], two_way=True, **words), (rows.mean() + back.mean()) / 2, [a, c])


def test_an_anchor_without_other_candidates_counts_nothing():
    a, c = features()
    labels = torch.zeros(N, dtype=torch.int64)
    loss = contrastive_loss(a, c, labels=labels, positive_in_denominator=False)
    assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, [a, c]))


def test_leaving_the_positive_out_keeps_its_digits():
    """From 1 - q of a confident fp32 softmax nothing is left; the sum over the others is exact."""
    a = torch.eye(4) * 8
    loss = contrastive_loss(a, a, temperature=1.0, normalize=False, positive_in_denominator=False)
    assert loss.item() == pytest.approx(math.log(3) - 64, rel=1e-6)


def test_no_matrix_of_anchors_by_candidates(largest):
    a, c = torch.randn(2048, 8, requires_grad=True), torch.randn(2048, 8, requires_grad=True)
    labels = torch.randint(0, 50, (2048,))
    with largest() as made:
        contrastive_loss(a, c, labels=labels).backward()
        contrastive_loss(a, c).backward()
    assert 0 < made[0] <= 4 * 256 * 2048
    at = torch.arange(2048)
    one = log_sum_exp(a, c, 1.0, at, labels, labels, True, chunk_rows=100)
    torch.testing.assert_close(one, log_sum_exp(a, c, 1.0, at, labels, labels, True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_rounded_input_is_no_worse_than_plain_torch(dtype, masked, no_worse):
    a, c = (x.detach().to(dtype).requires_grad_() for x in features(3))
    labels = torch.tensor([0, 1, 0, 2, 2, 1, 0]) if masked else None

    def plain(a, c):
        z = a @ c.t() / 2
        if labels is not None:
            z = z.masked_fill((labels[:, None] == labels) & ~torch.eye(N, dtype=torch.bool), -math.inf)
        return F.cross_entropy(z, torch.arange(N))

    exact = [x.detach().double().requires_grad_() for x in (a, c)]
    truth, rounded = plain(*exact), plain(a, c)
    got = contrastive_loss(a, c, temperature=2.0, normalize=False, labels=labels)
    no_worse(got, rounded, truth)
    for g, p, e in zip(
        *(torch.autograd.grad(*x) for x in ((got, (a, c)), (rounded, (a, c)), (truth, exact))), strict=True
    ):
        no_worse(g, p, e, floor=torch.finfo(dtype).eps)


def test_soft_targets_with_a_queue(agree):
    a, c = features(4)
    g = torch.Generator().manual_seed(5)
    momentum_a, momentum_c, old = (torch.randn(n, D, generator=g, dtype=torch.float64) for n in (N, N, 4))
    queue = Queue(4, D, torch.float64)
    queue.push(old)
    keys = torch.cat([momentum_c, queue.features])
    alpha = torch.tensor(0.4, dtype=torch.float64)
    targets = soft_targets(momentum_a, keys, temperature=0.5, alpha=alpha)
    p = 0.4 * scores(momentum_a, keys, 0.5).softmax(-1) + 0.6 * torch.eye(N, N + 4, dtype=torch.float64)
    expected = -(p * scores(a, keys, 0.3).log_softmax(-1)).sum(-1).mean()
    agree(similarity_loss(a, keys, targets, temperature=0.3), expected, [a])
    entropy = -(p * p.log()).sum(-1).mean()
    agree(similarity_loss(a, keys, targets, temperature=0.3, divergence="forward_kl"), expected - entropy, [a], 1e-9)
    alone = soft_targets(momentum_a, keys, temperature=0.5)
    expected = -(scores(momentum_a, keys, 0.5).softmax(-1) * scores(a, keys, 0.3).log_softmax(-1)).sum(-1).mean()
    agree(similarity_loss(a, keys, alone, temperature=0.3), expected, [a])
    identity = 0.4 * similarity_loss(a, keys, alone, temperature=0.3) + 0.6 * contrastive_loss(a, keys, temperature=0.3)
    agree(similarity_loss(a, keys, targets, temperature=0.3), identity, [a])


def test_the_teachers_k_best_candidates(agree):
    a, c = features(6, M)
    t = torch.randn(N, M, generator=torch.Generator().manual_seed(7), dtype=torch.float64) * 3
    top = t.topk(4, dim=-1)
    p = top.values.softmax(-1)
    expected = (p * (p.log() - scores(a, c, 0.3).gather(1, top.indices).log_softmax(-1))).sum(-1).mean()
    got = similarity_loss(a, c, ps.topk(t, 4), temperature=0.3, divergence="forward_kl")
    agree(got, expected, [a, c])


def test_the_queue_keeps_the_last_ones():
    queue = Queue(5, 2)
    rows = torch.arange(26.0).reshape(13, 2)
    assert queue.features.shape == (0, 2)
    queue.push(rows[:3])
    assert (queue.features == rows[:3]).all()
    queue.push(rows[3:6])
    assert {tuple(x) for x in queue.features.tolist()} == {tuple(x) for x in rows[1:6].tolist()}
    queue.push(rows[6:])
    assert {tuple(x) for x in queue.features.tolist()} == {tuple(x) for x in rows[8:].tolist()}
    again = Queue(5, 2)
    again.load_state_dict(queue.state_dict())
    again.push(rows[:1])
    queue.push(rows[:1])
    assert (again.features == queue.features).all()
    with pytest.raises(ValueError, match="the queue holds"):
        queue.push(rows.t())


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_bound_is_its_formula(alpha, agree):
    x, y = features(8)
    log_q = torch.linspace(-1, 1, N, dtype=torch.float64, requires_grad=True)
    f = x @ y.t() / 2
    total = 0
    for j in range(N):
        others = [i for i in range(N) if i != j]
        m, apart = f[:, j].exp().mean(), f[others, j].exp().mean()
        mix, mix_apart = (alpha * z + (1 - alpha) * log_q[j].exp() for z in (m, apart))
        total = total + (f[j, j] - mix.log() - apart / mix_apart) / N
    got = mutual_information_bound(x, y, alpha=alpha, temperature=2.0, log_baseline=log_q)
    agree(got.value, 1 + total, [x, y, *([log_q] if alpha < 1 else [])])


def test_bounds_of_a_known_mutual_information():
    """Correlated Gaussians with the optimal critic, 5.1 nats: InfoNCE stays below log K; NWJ does not, and varies."""
    dims, rho, k = 10, 0.8, 64
    truth = -dims / 2 * math.log(1 - rho**2)
    g = torch.Generator().manual_seed(0)
    found = {0.0: [], 0.5: [], 1.0: []}
    for _ in range(200):
        x, noise = (torch.randn(k, dims, generator=g, dtype=torch.float64) for _ in range(2))
        y = rho * x + (1 - rho**2) ** 0.5 * noise
        # log p(y|x)/p(y) = <[x, |x|^2, 1], [...]>: a bilinear critic
        s = 1 - rho**2
        one = torch.ones(k, 1, dtype=torch.float64)
        left = torch.cat([x, x.square().sum(-1, keepdim=True), one], -1)
        right = torch.cat([rho / s * y, -(rho**2) / (2 * s) * one,
                           truth - rho**2 / (2 * s) * y.square().sum(-1, keepdim=True)], -1)  # fmt: skip
        for alpha, values in found.items():
            values.append(mutual_information_bound(left, right, alpha=alpha).value.item())
    infonce, nwj, between = (torch.tensor(found[a]) for a in (1.0, 0.0, 0.5))
    assert (infonce <= math.log(k) + 1e-9).all() and infonce.mean() < truth - 1
    assert abs(nwj.median() - truth) < 1.2 and nwj.std() > 2 * infonce.std()
    assert infonce.mean() < between.median() < truth + 0.5


def test_refusals():
    a, c = features(0, M)
    with pytest.raises(ValueError, match="average two calls"):
        contrastive_loss(a, c, positives=torch.zeros(N, dtype=torch.int64), two_way=True)
    with pytest.raises(ValueError, match="without labels"):
        contrastive_loss(a, c, candidate_labels=torch.zeros(M))
    with pytest.raises(ValueError, match="5 candidates for 7 anchors"):
        contrastive_loss(a, c[:5])
    with pytest.raises(ValueError, match=r"alpha=2 is outside"):
        mutual_information_bound(a, a, alpha=2)
