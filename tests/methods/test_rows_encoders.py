"""Rows 22 to 24, 28, 38 to 40, 42, 43 and 46: recipes for encoders against their formulas, and a loss that falls."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from potstill.methods.contrastive import mutual_information_bound
from potstill.methods.recipes import encoders
from potstill.methods.schedules import Stage, Stages
from torch import nn

from .world import B, Case, E, H, T, World, ce, infonce, kl, mean, row_tests, soft_ce

PAIRS = [(0, 0), (1, 1)]
OWNER = torch.tensor([[0, 0, 1, 1, 1, -1, 2, 2]] * B) + 3 * torch.arange(B)[:, None] * torch.tensor([[1] * T])
OWNER[:, 5] = -1
OTHER = torch.tensor([[0, 1, 1, 1, 2, 2, 2, 2]] * B) + 3 * torch.arange(B)[:, None]


def projections(w):
    return [w.constant(H, E, name=("project", i)) / 5 for i in range(2)]


def maps_and_layers_call(w):
    return encoders.maps_and_layers(
        w.maps, w.t_maps, w.layers[1:], w.t_layers[1:], PAIRS, teacher_projectors=projections(w), map_weight=30.0,
        layer_weight=2.0, keep=w.keep,
    )  # fmt: skip


def maps_and_layers(w):
    total = 0.0
    for i, p in enumerate(projections(w)):
        there = w.t_maps[i] != 0
        total = total + 30 * ((w.maps[i] - w.t_maps[i]).square() * there).sum() / there.sum() / 2
        gap = w.layers[i + 1] - w.t_layers[i + 1] @ p.t()
        total = total + 2 * gap.square().mean(-1)[w.keep].mean() / 2
    return total


def nearest(w):
    loss = mean(kl(w.zt / 2, w.z / 2) + 0.5 * ce(w.z, w.labels), w.keep)
    for layer in w.layers[1:]:
        d = torch.stack([(layer - t @ w["p"].t()).square().mean(-1) for t in w.t_layers])
        two = d.sort(0).values[:2]
        loss = loss + 3 * mean(two[0] + 0.5 * two[1], w.keep)
    return loss


def nearest_call(w):
    return encoders.kl_and_nearest_layers(
        w.hidden, w.weight, w.teacher, w.labels, w.layers[1:], w.t_layers, w.keep, projector=w["p"], weights=[1.0, 0.5],
        ce_weight=0.5, layer_weight=3.0,
    )  # fmt: skip


def relations(w):
    total = 0.0
    for s, t in zip(w.layers[1:], w.t_layers[1:], strict=True):
        rows = []
        for x, y in zip(
            s.unflatten(-1, (2, -1)).transpose(1, 2), t.unflatten(-1, (2, -1)).transpose(1, 2), strict=True
        ):
            zs, zt = (a @ a.mT / a.shape[-1] ** 0.5 for a in (x, y))
            rows.append(kl(zt, zs))
        total = total + torch.stack(rows).mean()
    return total


def scores(w):
    zs = F.normalize(w.features(), dim=-1) @ F.normalize(w.features(1), dim=-1).t()
    return soft_ce(teacher_scores(w) / 0.2, zs / 0.2).mean()


def teacher_scores(w):
    return w.constant(B, B, name="scores")


def pooled_mse(w):
    rows = []
    for c in range(3 * B):
        a, b = w.hidden[OWNER == c].mean(0), (w.t_hidden @ projections(w)[0].t())[OTHER == c].mean(0)
        rows.append((a - b).square().mean())
    return torch.stack(rows).mean()


def cosines(w):
    return F.cosine_similarity(w.features(), w.features(1), dim=-1)


CASES = {
    "22, maps and layers": Case(maps_and_layers_call, maps_and_layers),
    "22": Case(
        lambda w: encoders.soft_labels_and_layers(
            w.hidden, w.weight, w.teacher, w.labels, maps_and_layers_call(w), soft_weight=0.5, hard_weight=0.7
        ),
        lambda w: mean(0.5 * soft_ce(w.zt / 2, w.z / 2) + 0.7 * ce(w.z, w.labels), w.keep) + maps_and_layers(w),
    ),
    "23": Case(
        lambda w: encoders.soft_and_hard_labels(w.hidden, w.weight, w.teacher, w.labels),
        lambda w: mean(soft_ce(w.zt, w.z) + ce(w.z, w.labels), w.keep),
    ),
    "24": Case(nearest_call, nearest, {"p": (H, E)}),
    "28, encoder": Case(lambda w: encoders.self_relations(w.layers[1:], w.t_layers[1:], heads=2), relations),
    "28, retriever": Case(
        lambda w: encoders.passage_scores(w.features(), w.features(1), teacher_scores(w), temperature=0.2), scores
    ),
    "38, bi to cross": Case(
        lambda w: encoders.score_to_cosine(w.features().sum(-1), w.t_features(), w.t_features(1)),
        lambda w: F.binary_cross_entropy_with_logits(
            w.features().sum(-1), F.cosine_similarity(w.t_features(), w.t_features(1), dim=-1).clamp(0, 1)
        ),
    ),
    "38, cross to bi": Case(
        lambda w: encoders.cosine_to_score(w.features(), w.features(1), teacher_scores(w)[0]),
        lambda w: (cosines(w) - teacher_scores(w)[0].sigmoid()).square().mean(),
    ),
    "39, representation": Case(
        lambda w: encoders.pooled_mse(w.hidden, w.t_hidden @ projections(w)[0].t(), OWNER, OTHER, 3 * B), pooled_mse
    ),
    "39, task": Case(
        lambda w: encoders.sequence_kl(w.hidden, w.weight, w.teacher), lambda w: kl(w.zt, w.z).mean()
    ),
    "40": Case(
        lambda w: encoders.pretraining_and_state(
            mean(ce(w.z, w.labels), w.keep), w.features(), w.t_features(), weight=0.3
        ),
        lambda w: mean(ce(w.z, w.labels), w.keep)
        + 0.3 * (w.features() - w.t_features()).square().sum(-1).mean(),
    ),
    "42": Case(
        lambda w: encoders.mutual_information(w.features(), w.t_features(), alpha=0.7, temperature=0.5),
        lambda w: -bound(F.normalize(w.features(), dim=-1), F.normalize(w.t_features(), dim=-1)),
    ),
    "43": Case(
        lambda w: encoders.exits_contrastive(
            [w.features(0), w.features(1), w.features(2)], [w.t_features(0), w.t_features(1), w.t_features(2)],
            temperature=0.5,
        ),
        lambda w: sum(
            (i + 1) / 3 * (infonce(w.features(i), w.t_features(i), 0.5) + infonce(w.t_features(i), w.features(i),
            0.5)) / 2
            for i in range(3)
        ),
    ),
}  # fmt: skip


def bound(x, y, alpha=0.7):
    f = (x @ y.t() / 0.5).exp()
    total = 0.0
    for j in range(B):
        apart = (f[:, j].sum() - f[j, j]) / (B - 1)
        mix, mix_apart = (alpha * m + (1 - alpha) for m in (f[:, j].mean(), apart))
        total = total + ((f[j, j] / mix).log() - apart / mix_apart) / B
    return 1 + total


test_value_and_gradient, test_lower_precision, test_the_loss_falls = row_tests(CASES)


def test_22_masked_positions_are_no_part_of_the_maps():
    w = World(torch.float64, {})
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    assert all((t[..., later] == 0).all() and (t[..., ~later] > 0).all() for t in w.t_maps)
    moved = [m.detach().clone().masked_fill(later, 5.0) for m in w.maps]
    words = dict(keep=w.keep, teacher_projectors=projections(w))
    same = (
        encoders.maps_and_layers(m, w.t_maps, w.layers[1:], w.t_layers[1:], PAIRS, **words) for m in (w.maps, moved)
    )
    assert next(same) == next(same)


def test_23_stages_choose_the_loss():
    stages = Stages([Stage("general", 3, {"latent": True}), Stage("task", 3, {"latent": True}),
                     Stage("task data", 3, {"latent": True}), Stage("labels", 3, {"latent": False})])  # fmt: skip
    w = World(torch.float32, {})
    found: dict[str, list[float]] = {}
    for step in range(stages.steps):
        stage, _ = stages.at(step)
        w.refresh()
        latent = stage.options["latent"]
        loss = maps_and_layers_call(w) if latent else CASES["23"].call(w)
        found.setdefault("latent" if latent else "labels", []).append(loss.item())
        w.step(loss)
    assert len(found["latent"]) == 9 and len(found["labels"]) == 3
    assert all(values[-1] < values[0] for values in found.values())


def test_38_taking_turns_brings_both_models_together():
    torch.manual_seed(0)
    bi, cross, x = nn.Linear(6, 8), nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(2, 32, 6)

    def both():
        return bi(x[0]), bi(x[1]), cross(torch.cat([x[0], x[1]], -1))[:, 0]

    def distance():
        u, v, s = both()
        return (F.cosine_similarity(u, v, dim=-1).clamp(0, 1) - s.sigmoid()).square().mean().item()

    before = distance()
    for _ in range(4):
        for model, loss in ((cross, lambda u, v, s: encoders.score_to_cosine(s, u, v)),
                            (bi, lambda u, v, s: encoders.cosine_to_score(u, v, s))):  # fmt: skip
            for _ in range(10):
                weights = list(model.parameters())
                for p, g in zip(weights, torch.autograd.grad(loss(*both()), weights), strict=True):
                    p.data.sub_(5e-3 * g.sign())
    assert distance() < 0.5 * before


def test_42_infonce_is_at_most_log_k():
    x = 5 * torch.eye(16)
    found = mutual_information_bound(x, x, alpha=1.0)
    assert found.value.item() == pytest.approx(math.log(16), abs=1e-4)


def test_46_pooled_means_equal_brute_force():
    w = World(torch.float64, {})
    got = encoders.vectors_from_contexts(w.hidden, OWNER, 3 * B + 1)
    for c in range(3 * B):
        torch.testing.assert_close(got[c], w.hidden[OWNER == c].mean(0).detach(), rtol=1e-12, atol=1e-14)
    assert (got[3 * B] == 0).all() and not got.requires_grad
    with pytest.raises(ValueError, match="the rows of hidden have"):
        encoders.pooled(w.hidden, OWNER[:, 1:], 3)
