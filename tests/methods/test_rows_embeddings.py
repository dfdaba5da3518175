"""Rows 29 to 37, 41, 44 and 45: recipes on embeddings against their formulas, and a loss that falls."""

from __future__ import annotations

import potstill as ps
import torch
import torch.nn.functional as F
from potstill.methods.contrastive import Queue
from potstill.methods.ema import EMA
from potstill.methods.recipes import embeddings

from .world import B, Case, H, T, World, ce, infonce, kl, mean, row_tests, soft_ce

C, D = 3, 16
PROJECTOR = {"p": (D, D)}


def unit(x):
    return F.normalize(x, dim=-1)


def queues(w):
    return w.constant(5, D, name="images"), w.constant(5, D, name="texts")


def momentum_call(w):
    images, texts = queues(w)
    return embeddings.momentum_contrast(
        w.features(), w.features(1), w.t_features(), w.t_features(1), image_queue=images, text_queue=texts,
        temperature=w["tau"].exp() * 0.1, alpha=0.4,
    )  # fmt: skip


def momentum(w):
    images, texts = queues(w)
    tau = w["tau"].exp() * 0.1
    total = 0.0
    for own, m, other, queue in ((w.features(), w.t_features(), w.t_features(1), texts),
                                 (w.features(1), w.t_features(1), w.t_features(), images)):  # fmt: skip
        keys = unit(torch.cat([other, queue]))
        target = 0.4 * (unit(m) @ keys.t() / tau.detach()).softmax(-1) + 0.6 * torch.eye(B, B + 5, dtype=w.dtype)
        total = total - (target * (unit(own) @ keys.t() / tau).log_softmax(-1)).sum(-1).mean() / 2
    return total


VALID = torch.arange(B) != 2
REGION_LABELS = torch.tensor([0, 1, -100, 3, 2, 1])


def classes(w, n=C):
    return w.constant(n, D, name=("classes", n))


def regions(w):
    z = unit(w.features()) @ unit(torch.cat([w["background"][None], classes(w)])).t() / 0.1
    loss = F.cross_entropy(z, REGION_LABELS)
    gap = (unit(w.features()) - unit(w.t_features())).abs().sum(-1)
    return loss + 0.5 * gap[VALID].mean()


def shared(w):
    zs, zt = (10 * unit(x) @ unit(classes(w)).t() / 2 for x in (w.features(), w.t_features()))
    return 1000 * 4 * kl(zt, zs).sum() / (B * C)


def class_scores(w):
    return unit(w.t_features()) @ unit(classes(w, 7)).t() / 0.3


def best_classes(w):
    z, t = unit(w.features()) @ unit(classes(w, 7)).t() / 0.3, class_scores(w)
    labels = class_labels(w)
    loss = F.cross_entropy(z, labels)
    top = t.topk(3, dim=-1).indices
    rows = kl(t.gather(-1, top), z.gather(-1, top))
    right = t.argmax(-1) == labels
    assert 0 < right.sum() < B
    s, u = unit(w.features()), unit(w.t_features())
    both = (infonce(s, u, 0.3) + infonce(u, s, 0.3)) / 2
    return loss + rows[right].mean() + (s - u).square().sum(-1).mean() + both


def class_labels(w):
    labels = class_scores(w).argmax(-1)
    labels[:2] = (labels[:2] + 1) % 7
    return labels


def masked_infonce(s, t, labels, tau):
    z = unit(s) @ unit(t).t() / tau
    other = (labels[:, None] == labels) & ~torch.eye(B, dtype=torch.bool)
    return F.cross_entropy(z.masked_fill(other, float("-inf")), torch.arange(B))


def graph(w, learned):
    each = torch.stack([masked_infonce(w.features(i), w.t_features(i), w.classes, 0.07) for i in (1, 2)])
    task = mean(ce(w.z, w.labels), w.keep)
    if not learned:
        return task + each.mean()
    return (w["b"].softmax(0) * torch.stack([task, (w["a"].softmax(0) * each).sum()])).sum()


def graph_call(w, learned):
    words = dict(layer_logits=w["a"], total_logits=w["b"]) if learned else {}
    return embeddings.layer_contrasts(
        mean(ce(w.z, w.labels), w.keep), [w.features(1), w.features(2)], [w.t_features(1), w.t_features(2)], w.classes,
        **words,
    )  # fmt: skip


def without_positive(a, c, tau):
    z = unit(a) @ unit(c).t() / tau
    return (z.masked_fill(torch.eye(B, dtype=torch.bool), float("-inf")).logsumexp(-1) - z.diagonal()).mean()


def medicine(w):
    y = (w.classes[:, None] == torch.arange(D)).to(w.dtype)
    loss = F.binary_cross_entropy_with_logits(w.features(), y)
    a, c = w.features(1), w.features(2)
    loss = loss + 0.1 * (without_positive(a, c, 1.0) + without_positive(c, a, 1.0)) / 2
    return loss + 0.1 * (w.features() @ w["p"].t() - w.t_features()).square().mean()


def medicine_call(w):
    y = (w.classes[:, None] == torch.arange(D)).to(w.dtype)
    return embeddings.labels_contrast_and_state(
        w.features(), y, w.features(1), w.features(2), w.features(), w.t_features(), w["p"]
    )


def speech(w):
    total = 0.0
    for t, p in zip((w.t_layers[1], w.t_layers[2]), speech_maps(w), strict=True):
        s = w.hidden @ p.t()
        total = total + F.softplus(-F.cosine_similarity(s, t, dim=1)).mean()
    return 120 * total / 2


def speech_maps(w):
    return [w.constant(w.t_hidden.shape[-1], H, name=("speech", i)) for i in range(2)]


def pixels(w):
    rec, s, t = mean(ce(w.z, w.labels), w.keep), w.features(), w.t_features()
    loss = rec + 0.5 * (s - t).abs().mean()
    for x, y in zip(w.layers[1:], w.t_layers[1:], strict=True):
        a, b = (unit(v) @ unit(v).mT for v in (x, y))
        loss = loss + 2.0 * (a - b).abs().mean()
    return loss


CASES = {
    "29, contrast": Case(momentum_call, momentum, {"tau": ()}),
    "29, masked tokens": Case(
        lambda w: embeddings.masked_tokens_with_momentum(w.hidden, w.weight, w.teacher, w.labels),
        lambda w: mean(0.6 * ce(w.z, w.labels) + 0.4 * soft_ce(w.zt, w.z), w.keep),
    ),
    "30": Case(
        lambda w: embeddings.regions(
            w.features(), w.t_features(), classes(w), w["background"], REGION_LABELS, VALID, temperature=0.1
        ),
        regions, {"background": (D,)},
    ),
    "31": Case(
        lambda w: embeddings.shared_class_vectors(w.features(), w.t_features(), classes(w), scale=10.0,
        temperature=2.0),
        shared,
    ),
    "32": Case(
        lambda w: embeddings.classes_and_features(
            w.features(), w.t_features(), classes(w, 7), class_labels(w), ps.topk(class_scores(w), 3), temperature=0.3
        ),
        best_classes,
    ),
    "33": Case(lambda w: graph_call(w, True), lambda w: graph(w, True), {"a": (2,), "b": (2,)}),
    "33, fixed weights": Case(lambda w: graph_call(w, False), lambda w: graph(w, False)),
    "34": Case(medicine_call, medicine, PROJECTOR),
    "35": Case(
        lambda w: embeddings.features_over_time(w.hidden, w.t_layers[1:], projectors=speech_maps(w)), speech
    ),
    "36": Case(
        lambda w: embeddings.pixel_affinities(
            mean(ce(w.z, w.labels), w.keep), w.features(), w.t_features(), w.layers[1:], w.t_layers[1:],
            output_weight=0.5, affinity_weight=2.0,
        ),
        pixels,
    ),
    "37, first stage": Case(
        lambda w: embeddings.both_features(w.features(), w.features(1), w.t_features(), w.t_features(1)),
        lambda w: F.mse_loss(w.features(), w.t_features()) + F.mse_loss(w.features(1), w.t_features(1)),
    ),
    "37, second stage": Case(
        lambda w: embeddings.both_modalities(w.features(), w.features(1)),
        lambda w: (infonce(w.features(), w.features(1), 0.07) + infonce(w.features(1), w.features(), 0.07)) / 2,
    ),
    "41": Case(
        lambda w: embeddings.feature_and_consistency(
            mean(ce(w.z, w.labels), w.keep), w.features(1), w.t_features(1), w.features(), w.t_features()
        ),
        lambda w: mean(ce(w.z, w.labels), w.keep) + 512 * F.mse_loss(w.features(1), w.t_features(1))
        + F.mse_loss(w.features(), w.t_features()),
    ),
    "44": Case(
        lambda w: embeddings.scaled_logit_mse(w.z[:, 0], w.zt[:, 0], w.tokens[:, 1], 0.7),
        lambda w: F.cross_entropy(w.z[:, 0], w.tokens[:, 1]) + 0.1 * 0.7 * F.mse_loss(w.z[:, 0], w.zt[:, 0]) / B,
    ),
    "45": Case(
        lambda w: embeddings.labels_and_aspects(w.features(), w.classes, w.features(1), w.t_features(1).sigmoid()),
        lambda w: F.cross_entropy(w.features(), w.classes)
        + 4 * F.binary_cross_entropy_with_logits(w.features(1), w.t_features(1).sigmoid()),
    ),
}  # fmt: skip


test_value_and_gradient, test_lower_precision, test_the_loss_falls = row_tests(CASES)


def test_29_a_momentum_model_and_its_queues_in_a_loop():
    w = World(torch.float32, {"tau": ()})
    teacher = EMA(w.net, 0.9).train()
    image_queue, text_queue = Queue(8, D), Queue(8, D)
    losses = []
    for step in range(6):
        w.refresh()
        layers, _ = teacher(w.tokens)  # takes the student's weights in first
        images, texts = ((layers[i].mean(1) @ w.constant(H, D, name=("student", i))) for i in (2, 1))
        loss = embeddings.momentum_contrast(
            w.features(), w.features(1), images, texts, image_queue=image_queue.features,
            text_queue=text_queue.features, temperature=(w["tau"].exp() * 0.1).clamp(0.001, 0.5), alpha=0.1 * step,
        )  # fmt: skip
        losses.append(loss.item())
        w.step(loss)
        image_queue.push(images)
        text_queue.push(texts)
    assert len(image_queue.features) == 8 and losses[-1] < losses[1] + 1, losses
    assert teacher.updates == 6


def test_33_the_contrast_is_cross_entropy_against_the_teachers_features():
    w = World(torch.float64, {})
    labels = torch.arange(B)
    got = embeddings.layer_contrasts(torch.tensor(0.0, dtype=w.dtype), [w.features()], [w.t_features()], labels)
    torch.testing.assert_close(got, infonce(w.features(), w.t_features(), 0.07), rtol=1e-13, atol=0)


def test_34_states_from_a_cache_give_the_same_loss(tmp_path):
    w = World(torch.float32, PROJECTOR)
    live = medicine_call(w)
    spec = ps.cache.Spec(vocab_size=2, k=1, columns=(ps.cache.Column("state", "fp32", D, "sequence"),))
    row = ps.topk(torch.zeros(1, 2), 1)
    with ps.cache.Writer(tmp_path, spec) as writer:
        for i, state in enumerate(w.t_features()):
            writer.add(f"{i}", torch.zeros(1, dtype=torch.int64), row, columns={"state": state})
    cache = ps.cache.open(tmp_path)
    stored = torch.stack([cache[f"{i}"].columns["state"] for i in range(B)])
    w.t_features = lambda *_: stored
    assert medicine_call(w) == live


def test_35_one_time_step_has_no_direction_but_its_sign():
    s = torch.tensor([[[2.0, -3.0]]])
    got = embeddings.features_over_time(s, [torch.tensor([[[1.0, 1.0]]])], weight=1.0)
    one = torch.tensor(1.0)
    torch.testing.assert_close(got, (F.softplus(-one) + F.softplus(one)) / 2)
    assert T > 1
