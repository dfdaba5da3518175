"""Rows whose objective must move something beside its own loss: rewards, margins, relations, acceptance, rankings."""

from __future__ import annotations

import potstill as ps
import torch
import torch.nn.functional as F
from potstill.methods import preference
from potstill.methods.recipes import layers, logits, preferences
from potstill.methods.relation import gram_loss
from potstill.methods.speculative import acceptance
from torch import Tensor, nn

from .test_rows_layers import VISUAL, narrow
from .test_rows_preferences import means
from .test_rows_tokens import reverse_teacher, sums
from .world import B, T, World, kl


def train(w: World, loss, steps: int, rate: float = 1e-3) -> None:
    for _ in range(steps):
        w.refresh()
        w.step(loss(w), rate)
    w.refresh()


def test_05_the_expected_implicit_reward_rises_and_the_target_comes_nearer():
    w = World(torch.float32, {})
    reverse = reverse_teacher(w).logits
    reward = w.zt.log_softmax(-1) - reverse.log_softmax(-1)
    weight = logits.extrapolation_weights(w.teacher, reverse_teacher(w))[..., None]
    target = w.zt + weight * (w.zt - reverse)

    def measured() -> tuple[float, float]:
        w.refresh()
        expected = (w.z.softmax(-1) * reward).sum(-1)[w.keep].mean()
        return expected.item(), kl(w.z, target)[w.keep].mean().item()

    before = measured()
    train(w, lambda w: logits.extrapolated_reverse_kl(w.hidden, w.weight, w.teacher, reverse_teacher(w), w.keep), 25)
    after = measured()
    assert after[0] > before[0] + 1 and after[1] < 0.7 * before[1], (before, after)


def test_11_the_margin_over_the_teacher_rises():
    w = World(torch.float32, {})
    reference = sums(w.zt, w.labels)

    def margin() -> Tensor:
        w.refresh()
        return preference.preference_margin(*sums(w.z, w.labels).chunk(2), *reference.chunk(2)).detach()

    before = margin()
    train(w, lambda w: logits.preference_to_teacher(w.hidden, w.weight, w.labels, reference), 10)
    assert (margin() > before).all()


def test_12_relations_agree_though_the_widths_differ():
    w = World(torch.float32, {})
    visual = VISUAL.expand(B, T)

    def distance() -> float:
        w.refresh()
        return gram_loss(w.hidden, w.t_hidden, distance="cosine", normalize=True, token_weights=visual).item()

    before = distance()
    train(w, lambda w: layers.kl_and_relation(w.hidden, w.weight, w.teacher, visual, w.keep, relation_weight=20.0), 40)
    assert distance() < 0.25 * before


def test_21_a_draft_of_features_is_accepted_more_often():
    w = World(torch.float32, {})
    wanted = narrow(w)[2]
    head = w.weight.detach().clone()

    def accepted() -> float:
        w.refresh()
        return acceptance(w.hidden.detach() @ head.t(), wanted @ head.t())[w.keep].mean().item()

    before = accepted()
    train(w, lambda w: layers.draft_features(w.hidden, wanted, ps.Head(head), w.keep), 40)
    assert accepted() > before + 0.05


def test_25_vectors_stand_for_the_demonstrations():
    """Two learned vectors in the place of six tokens that the teacher sees: most of the divergence goes."""
    w = World(torch.float32, {})
    net = w.teacher_net

    def run(x: Tensor) -> Tensor:
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        for mix, up, down in zip(net.mix, net.up, net.down, strict=True):
            q, k, v = mix(F.layer_norm(x, x.shape[-1:])).chunk(3, -1)
            x = x + (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(later, float("-inf")).softmax(-1) @ v
            x = x + down(F.gelu(up(F.layer_norm(x, x.shape[-1:]))))
        return x

    embedded = net.embed(w.tokens)
    head = ps.Head(net.head)
    teacher = ps.HiddenTeacher(run(embedded), head)
    there = torch.arange(T).expand(B, T) >= 6
    vectors = nn.Parameter(torch.zeros(B, 2, embedded.shape[-1]))
    losses = []
    for _ in range(40):
        states = run(torch.cat([vectors, embedded[:, 6:]], 1))
        rows = torch.arange(4).expand(B, 4) >= 2
        loss = logits.query_token_kl(states, head, teacher, rows, there)
        losses.append(loss.item())
        (grad,) = torch.autograd.grad(loss, vectors)
        vectors.data.sub_(0.05 * grad.sign())
    assert losses[-1] < 0.5 * losses[0], losses


def test_48_answers_come_into_their_order():
    w = World(torch.float32, {})

    def accuracy() -> float:
        w.refresh()
        s = means(w.z, w.labels)
        return float((s[:, None] > s).triu(1).sum() / (B * (B - 1) / 2))

    before = accuracy()
    train(w, lambda w: preferences.ranked_answers(w.hidden, w.weight, w.labels), 15)
    assert before < 0.8 and accuracy() == 1
