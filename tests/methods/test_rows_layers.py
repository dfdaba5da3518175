"""Rows 9, 10 and 12 to 21: recipes on layers, blocks and relations against their formulas, and a loss that falls."""

from __future__ import annotations

import potstill as ps
import torch
import torch.nn.functional as F
from potstill.methods.blocks import block_losses
from potstill.methods.hidden import uniform_pairs
from potstill.methods.recipes import layers
from torch import nn

from .world import B, Case, E, H, T, World, ce, kl, mean, row_tests, soft_ce

VISUAL = torch.arange(T) < 5
PROJECTOR = {"p0": (E, H), "p1": (E, H)}


def hidden_mse(w, pairs=((1, 1), (2, 2))):
    return sum((w.layers[i] @ w[f"p{n}"].t() - w.t_layers[j]).square().mean() for n, (i, j) in enumerate(pairs)) / len(
        pairs
    )


def balanced(with_ce):
    def call(w):
        maps = [w["p0"], w["p1"]]
        return layers.balanced_layers(
            w.hidden, w.weight, w.teacher, w.layers, w.t_layers, [(1, 1), (2, 2)], w.labels if with_ce else None,
            projectors=maps, temperature=1.5, scale=0.8,
        )  # fmt: skip

    def plain(w):
        rows = kl(w.zt / 1.5, w.z / 1.5)
        logits = mean(rows, w.keep) if with_ce else rows.mean()
        between = hidden_mse(w)
        kd = logits + (logits / between).detach() * between
        if not with_ce:
            return kd
        hard = mean(ce(w.z, w.labels), w.keep)
        return hard + 0.8 * (hard / kd).detach() * kd

    return Case(call, plain, PROJECTOR)


def narrow(w):
    """The teacher's states at the student's width: what a block of the same model would give."""
    return [t @ w.constant(E, H, name="narrow") for t in w.t_layers]


def relation(x, mask):
    """Cosines of the masked rows of one sequence."""
    x = F.normalize(x[mask], dim=-1)
    return x @ x.t()


def kl_and_relation(w):
    loss = mean(kl(w.zt, w.z), w.keep)
    rows = []
    for s, t in zip(w.hidden, w.t_hidden, strict=True):
        a, b = relation(s, VISUAL), relation(t, VISUAL)
        rows.append(1 - (a * b).sum() / a.norm() / b.norm())
    return loss + 0.5 * torch.stack(rows).mean()


def flat_cosine(w):
    t = w.t_hidden
    cos = F.cosine_similarity(w.hidden @ w["p0"].t(), t, dim=-1)
    return mean(kl(w.zt, w.z), w.keep) + mean(1 - cos, w.keep)


def same_width(w):
    """A teacher of the student's width, for losses on last states without a projector."""
    return ps.HiddenTeacher(narrow(w)[2], ps.Head(w.constant(300, H, name="head")))


def same_width_logits(w):
    return narrow(w)[2] @ w.constant(300, H, name="head").t()


def squarehead(w):
    loss = mean(0.7 * ce(w.z, w.labels) + 1.3 * 4.0 * kl(w.zt / 2, w.z / 2), w.keep)
    there = torch.ones(B, T, dtype=torch.bool)
    there[0, 5:] = False
    for s, t in zip(w.layers[1:], narrow(w)[1:], strict=True):
        s, t = s[there], t[there]
        loss = loss + F.mse_loss(s, t) / (F.mse_loss(t, torch.zeros_like(t)) + 2.0**-7)
    return loss


def squarehead_call(w):
    there = torch.ones(B, T, dtype=torch.bool)
    there[0, 5:] = False
    return layers.layers_normalized_mse(
        w.hidden, w.weight, w.teacher, w.labels, w.layers[1:], narrow(w)[1:], there, kl_weight=1.3, ce_weight=0.7,
        temperature=2.0,
    )  # fmt: skip


def tail(w):
    return mean(ce(w.z, w.labels), w.keep) + 2.0 * F.mse_loss(w.layers[2][w.keep], narrow(w)[2][w.keep])


def draft(w):
    f, t = w.hidden[w.keep], narrow(w)[2][w.keep]
    head = w.weight.detach()
    return F.smooth_l1_loss(f, t) + 0.1 * soft_ce(t @ head.t(), f @ head.t()).mean()


CASES = {
    "9": balanced(True),
    "9, without labels": balanced(False),
    "10, blocks": Case(
        lambda w: layers.block_normalized_mse(w.layers[1], narrow(w)[1]),
        lambda w: F.mse_loss(w.layers[1], narrow(w)[1]) / (narrow(w)[1].square().mean() + 1e-6),
    ),
    "10, at last": Case(
        lambda w: layers.kl_and_cosine(w.hidden, w.weight, w.teacher, projector=w["p0"], token_weights=w.keep),
        flat_cosine, {"p0": (E, H)},
    ),
    "12": Case(
        lambda w: layers.kl_and_relation(
            w.hidden, w.weight, w.teacher, VISUAL.expand(B, T), w.keep, relation_weight=0.5
        ),
        kl_and_relation,
    ),
    "13, blocks": Case(
        lambda w: layers.block_outputs_mse(w.layers[1:], narrow(w)[1:]),
        lambda w: 1000 * (F.mse_loss(w.layers[1], narrow(w)[1]) + F.mse_loss(w.layers[2], narrow(w)[2])) / 2,
    ),
    "13, logits": Case(
        lambda w: layers.kl_by_sequence(w.hidden, w.weight, w.teacher),
        lambda w: F.kl_div(w.z.log_softmax(-1), w.zt.softmax(-1), reduction="batchmean"),
    ),
    "13, logits at T = 2": Case(
        lambda w: layers.kl_by_sequence(w.hidden, w.weight, w.teacher, w.labels, temperature=2.0),
        lambda w: 4 * (kl(w.zt / 2, w.z / 2) * w.keep).sum() / B,
    ),
    "14": Case(
        lambda w: layers.kl_and_block_norms(w.hidden, w.weight, w.teacher, w.layers[1:], narrow(w)[1:]),
        lambda w: kl(w.zt, w.z).sum() / B + sum((s - t).norm() for s, t in zip(w.layers[1:], narrow(w)[1:],
        strict=True)),
    ),
    "15": Case(
        lambda w: layers.kl_ce_and_cosine(w.hidden, w.weight, same_width(w), w.labels),
        lambda w: mean(5 * 4 * kl(same_width_logits(w) / 2, w.z / 2) + 2 * ce(w.z, w.labels), w.keep)
        + (1 - F.cosine_similarity(w.hidden, narrow(w)[2], dim=-1)).mean(),
    ),
    "16": Case(squarehead_call, squarehead),
    "17": Case(
        lambda w: layers.hardness_mix(w.hidden, w.weight, w.teacher, w.labels, hardness=0.3),
        lambda w: mean(0.7 * ce(w.z, w.labels) + 0.3 * 4 * kl(w.zt / 2, w.z / 2), w.keep),
    ),
    "19": Case(
        lambda w: layers.ce_kl_and_layers(
            w.hidden, w.weight, w.teacher, w.labels, w.layers, narrow(w), [(1, 2)], kl_weight=0.5, layer_weight=3.0,
            keep=w.keep,
        ),
        lambda w: mean(ce(w.z, w.labels) + 0.5 * kl(w.zt, w.z), w.keep)
        + 3 * F.mse_loss(w.layers[1][w.keep], narrow(w)[2][w.keep]),
    ),
    "20": Case(
        lambda w: layers.tail_layers(w.hidden, w.weight, w.labels, w.layers, narrow(w), 1, layer_weight=2.0,
        keep=w.keep),
        tail,
    ),
    "21": Case(
        lambda w: layers.draft_features(w.hidden, narrow(w)[2], ps.Head(w.weight), w.keep), draft,
    ),
}  # fmt: skip


test_value_and_gradient, test_lower_precision, test_the_loss_falls = row_tests(CASES)


def test_10_blocks_run_locally_have_the_gradients_of_separate_runs():
    torch.manual_seed(0)
    teacher = nn.Sequential(*(nn.Linear(8, 8, dtype=torch.float64) for _ in range(3)))
    blocks = {str(i): nn.Linear(8, 8, dtype=torch.float64) for i in (0, 2)}
    x = torch.randn(5, 8, dtype=torch.float64)
    found = block_losses(teacher, blocks, x, loss=layers.block_normalized_mse)
    with torch.no_grad():
        given = {"0": x, "2": teacher[1](teacher[0](x))}
    for name, block in blocks.items():
        o, t = block(given[name]), teacher[int(name)](given[name]).detach()
        expected = F.mse_loss(o, t) / (t.square().mean() + 1e-6)
        torch.testing.assert_close(found[name], expected, rtol=1e-12, atol=0)
        pairs = (torch.autograd.grad(z, [block.weight, block.bias]) for z in (found[name], expected))
        torch.testing.assert_close(*pairs, rtol=1e-10, atol=1e-14)


def test_18_the_score_is_its_formula_and_ranks_as_the_drop_does():
    w = World(torch.float64, {})
    g = torch.Generator().manual_seed(5)
    scores, drops = [], []
    for noise in (0.0, 0.05, 0.2, 0.6, 1.5):
        states = [t + noise * torch.randn(t.shape, generator=g, dtype=t.dtype) for t in w.t_layers]
        z = states[-1] @ w.t_weight.t()
        got = layers.pruning_score(
            states[-1], w.t_weight, w.teacher, states[1:], w.t_layers[1:], t_squared=4.0, tokens=40
        )
        expected = -4.0 * kl(w.zt, z).mean()
        for s, t in zip(states[1:], w.t_layers[1:], strict=True):
            a, b = (F.normalize(x.flatten(0, 1)[:40], dim=-1) for x in (s, t))
            expected = expected - (a @ a.t() - b @ b.t()).square().sum()
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
        assert not got.requires_grad
        scores.append(got.item())
        drops.append((z.argmax(-1) != w.zt.argmax(-1)).double().mean().item())
    assert scores == sorted(scores, reverse=True) and drops == sorted(drops)
    assert abs(scores[0]) < 1e-12


def test_20_layers_before_the_tail_get_nothing_of_it():
    w = World(torch.float64, {})
    loss = layers.tail_layers(w.hidden, w.weight, w.labels, w.layers, narrow(w), 1)
    assert torch.autograd.grad(loss, w.layers[1], allow_unused=True) == (None,)
    assert uniform_pairs(2, 4) == [(0, 1), (1, 3)]


def test_21_the_two_losses_may_have_outputs_of_their_own():
    w = World(torch.float64, {})
    other = w.layers[1]
    loss = layers.draft_features(w.hidden, narrow(w)[2], ps.Head(w.weight), w.keep, logit_features=other)
    (first, second) = torch.autograd.grad(loss, [w.hidden, other])
    smooth = torch.autograd.grad(F.smooth_l1_loss(w.hidden[w.keep], narrow(w)[2][w.keep]), w.hidden)[0]
    torch.testing.assert_close(first, smooth)
    assert second.abs().max() > 0
