"""Rows 1 to 8, 11, 25 and 27: recipes on token distributions against their formulas, and a loss that falls."""

from __future__ import annotations

import potstill as ps
import pytest
import torch
import torch.nn.functional as F
from potstill.methods.recipes import logits
from potstill.xtok.alignment import Alignment

from .world import B, Case, T, V, World, ce, kl, mean, row_tests, soft_ce

SPANS = torch.tensor([[0, 0, 1, 1, 1, -1, 2, 2]] * B)


def taid(t):
    def plain(w):
        target = (1 - t) * w.z.detach() + t * w.zt
        return mean(soft_ce(target, w.z), w.keep)

    def call(w):
        return logits.interpolated_target(w.hidden, w.weight, w.teacher, w.labels, t=torch.tensor(t, dtype=w.dtype))

    return Case(call, plain)


def granular_call(w):
    lower, upper = (w[x].sigmoid().expand(B, T) for x in ("lower", "upper"))
    return logits.class_range_and_spans(
        w.hidden, w.weight, w.teacher, w.labels, SPANS, lower=lower, upper=upper, softness=0.1, span_weight=2.0
    )


def granular(w):
    """The soft mask on the places of entries in the teacher's cumulative mass, by a loop over the rows."""
    lower, upper = w["lower"].sigmoid(), w["upper"].sigmoid()
    rows = []
    for b, i in w.keep.nonzero().tolist():
        p = w.zt[b, i].softmax(-1)
        order = p.argsort(descending=True)
        place = torch.empty_like(p)
        place[order] = p[order].cumsum(0) - p[order] / 2
        mask = torch.sigmoid((place - lower) / 0.1) * torch.sigmoid((upper - place) / 0.1)
        a, q = p * mask, w.z[b, i].softmax(-1) * mask
        a, q = a / a.sum(), q / q.sum()
        rows.append((a * (a.log() - q.log())).sum() + ce(w.z[b : b + 1, i], w.labels[b : b + 1, i])[0])
    p, q = w.zt.softmax(-1), w.z.softmax(-1)
    pair = (SPANS[:, 1:] == SPANS[:, :-1]) & (SPANS[:, 1:] >= 0)
    products = (q[:, :-1] * q[:, 1:] - p[:, :-1] * p[:, 1:]).abs().sum(-1)
    return torch.stack(rows).mean() + 2.0 * products[pair].mean()


def reverse_teacher(w):
    return ps.LogitsTeacher(w.zt.flip(0) * 0.5)


def extrapolated(temperature, teacher_temperature):
    def plain(w):
        reverse = w.zt.flip(0) * 0.5
        tv = 0.5 * (w.zt.softmax(-1) - reverse.softmax(-1)).abs().sum(-1)
        weight = 20.0 * tv + 1e-3
        target = (w.zt + weight[..., None] * (w.zt - reverse)) / teacher_temperature
        rows = 0.1 / weight * kl(w.z / temperature, target)
        return ((rows * w.keep).sum(1) / w.keep.sum(1)).mean()

    def call(w):
        return logits.extrapolated_reverse_kl(
            w.hidden, w.weight, w.teacher, reverse_teacher(w), w.keep, temperature=temperature,
            teacher_temperature=teacher_temperature,
        )  # fmt: skip

    return Case(call, plain)


def best_entries(other_token, over, temperature):
    def call(w):
        topk = ps.topk(w.zt, 5, temperatures=(temperature,))
        return logits.best_entries_kl(
            w.hidden, w.weight, topk, w.keep, other_token=other_token, over=over, temperature=temperature
        )

    def plain(w):
        ids = w.zt.topk(5, dim=-1).indices
        divisor = temperature if over == "logits" else 1.0
        sides = []
        for z in (w.zt, w.z):
            p = (z / divisor).softmax(-1).gather(-1, ids)
            if other_token:
                p = torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1)
            sides.append(
                (p / temperature).log_softmax(-1) if over == "probabilities" else (p / p.sum(-1, keepdim=True)).log()
            )
        t, s = sides
        return ((t.exp() * (t - s)).sum(-1) * w.keep).sum() / B

    return Case(call, plain)


def draft(divergence, rows):
    return Case(
        lambda w: logits.draft_loss(w.hidden, w.weight, w.teacher, w.labels, divergence=divergence)[0],
        lambda w: mean(rows(w.zt, w.z), w.keep),
    )


def jsd(zt, zs, t=0.3):
    p, q = zt.softmax(-1), zs.softmax(-1)
    m = t * p + (1 - t) * q
    return (t * p * (p.log() - m.log()) + (1 - t) * q * (q.log() - m.log())).sum(-1)


def padded(w):
    """Both heads with rows of padding, cut by vocab_size."""
    head = ps.Head(torch.cat([w.weight, w.weight[:7] * 5]), vocab_size=V)
    teacher = ps.HiddenTeacher(w.t_hidden, ps.Head(torch.cat([w.t_weight, w.t_weight[:9]]), vocab_size=V))
    return logits.mimic(w.hidden, head, teacher, w.labels)


def sums(z, labels):
    return -ce(z, labels).sum(-1)


def dpo_to_teacher(w):
    margin = sums(w.z, w.labels) - sums(w.zt, w.labels)
    return -F.logsigmoid(0.1 * (margin[: B // 2] - margin[B // 2 :])).mean()


def query(temperature):
    student_rows, teacher_rows = torch.zeros(B, T, dtype=torch.bool), torch.zeros(B, T, dtype=torch.bool)
    student_rows[:, 1:4], teacher_rows[:, 5:] = True, True
    labels = torch.arange(3 * B) % V
    return Case(
        lambda w: logits.query_token_kl(
            w.hidden, w.weight, w.teacher, student_rows, teacher_rows, labels, temperature=temperature, kl_weight=0.7
        ),
        lambda w: (
            0.7 * kl(w.zt[:, 5:] / temperature, w.z[:, 1:4] / temperature).mean()
            + F.cross_entropy(w.z[:, 1:4].reshape(-1, V), labels)
        ),
    )


def chunks(w):
    """Chunks of one, two and three student tokens a row against given chunk log-probabilities, spelled out."""
    found = torch.cat([w.z.new_zeros(B, 1), -ce(w.z[:, :-1], w.tokens[:, 1:])], 1)
    mine = torch.stack([found[:, 1], found[:, 2:4].sum(1), found[:, 4:7].sum(1)], 1) / 100 - 1e-6
    theirs = teacher_chunks(w).reshape(B, 4)[:, 1:].to(mine) / 100 - 1e-6
    p = theirs.exp()
    return -(p * mine + (1 - p) * torch.log(1 - mine.exp())).mean()


def teacher_chunks(w):
    return -w.constant(B * 4, name="chunks").abs()


def chunk_alignment():
    spans = torch.tensor([[[0, 1], [0, 1]], [[1, 2], [1, 2]], [[2, 4], [2, 3]], [[4, 7], [3, 4]]], dtype=torch.int32)
    student, teacher = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1, 2, 2, 3, 3, 3, -1], [0, 1, 2, 3]))
    return Alignment(
        spans=spans.repeat(B, 1, 1), row_ptr=torch.arange(B + 1) * 4, flags=torch.zeros(4 * B, dtype=torch.uint8),
        student_ptr=torch.arange(B + 1) * T, teacher_ptr=torch.arange(B + 1) * 4,
        student_chunk=torch.cat([torch.where(student < 0, -1, student + 4 * b) for b in range(B)]),
        teacher_chunk=torch.cat([teacher + 4 * b for b in range(B)]), row_flags=torch.zeros(B, dtype=torch.uint8),
        num_bytes=torch.ones(4 * B, dtype=torch.int32),
        mismatches=torch.zeros(B, dtype=torch.int32),
    )  # fmt: skip


CASES = {
    "1": taid(0.7),
    "2": Case(granular_call, granular, {"lower": (1,), "upper": (1,)}),
    "3": Case(
        lambda w: logits.token_kl(w.hidden, w.weight, w.teacher, w.labels), lambda w: mean(kl(w.zt, w.z), w.keep)
    ),
    "4": Case(
        lambda w: logits.half_hard_half_soft(w.hidden, w.weight, w.teacher, w.tokens),
        lambda w: (0.5 * ce(w.z, w.tokens) + 0.5 * soft_ce(w.zt, w.z)).mean(),
    ),
    "5, off-policy": extrapolated(1.0, 1.5),
    "5, on-policy": extrapolated(1.5, 1.5),
    **{
        f"6, {over}{', other token' if other else ''}": best_entries(other, over, 2.0)
        for over in ("logits", "probabilities") for other in (False, True)
    },
    "7, forward": draft("forward_kl", kl),
    "7, reverse": draft("reverse_kl", lambda zt, zs: kl(zs, zt)),
    "7, jsd": draft(ps.divergences.jsd(teacher_weight=0.3), jsd),
    "7, total variation": draft(
        "total_variation", lambda zt, zs: 0.5 * (zt.softmax(-1) - zs.softmax(-1)).abs().sum(-1)
    ),
    "8": Case(
        lambda w: logits.hard_and_soft(
            w.hidden, w.weight, w.teacher, w.labels, divergence="reverse_kl", temperature=1.5
        ),
        lambda w: mean(ce(w.z, w.labels) + 0.2 * kl(w.z / 1.5, w.zt / 1.5), w.keep),
    ),
    "11, mimic": Case(padded, lambda w: mean(ce(w.z, w.labels) + soft_ce(w.zt, w.z), w.keep)),
    "11, preference": Case(
        lambda w: logits.preference_to_teacher(w.hidden, w.weight, w.labels, sums(w.zt, w.labels)), dpo_to_teacher
    ),
    "25": query(2.0),
    "27": Case(
        lambda w: logits.chunk_likelihoods(w.hidden, w.weight, w.tokens, teacher_chunks(w), chunk_alignment()), chunks
    ),
}  # fmt: skip


test_value_and_gradient, test_lower_precision, test_the_loss_falls = row_tests(CASES)


def test_01_cross_entropy_and_kl_have_one_gradient_and_two_values():
    w = World(torch.float64, {})
    words = dict(t=0.4)
    a, b = (
        logits.interpolated_target(w.hidden, w.weight, w.teacher, w.labels, divergence=d, **words)
        for d in ("soft_cross_entropy", "forward_kl")
    )
    assert a - b > 1, "the target's entropy"
    for x, y in zip(*(torch.autograd.grad(z, [w.hidden, w.weight]) for z in (a, b)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


def test_02_the_worst_position_is_the_brute_force_one():
    w = World(torch.float64, {})
    own, other = w.z.argmax(-1), w.zt.argmax(-1)
    own[0] = other[0]
    own[1, :3] = other[1, :3]
    at = logits.worst_position(w.hidden, w.weight, w.teacher, own, other, w.keep)
    rows = kl(w.zt, w.z)
    for b in range(B):
        places = [i for i in range(T) if own[b, i] != other[b, i] and w.keep[b, i]]
        assert at[b] == (max(places, key=lambda i: rows[b, i].item()) if places else -1)
    assert at[0] == -1 and (at[1:] >= 0).all()


def test_05_the_codes_r_is_half_of_ours():
    w = World(torch.float64, {})
    p, q = w.zt.softmax(-1), reverse_teacher(w).logits.softmax(-1)
    code = 10 * (p - q).abs().sum(-1) + 1e-3
    torch.testing.assert_close(logits.extrapolation_weights(w.teacher, reverse_teacher(w)), code)


def test_06_short_rows_are_compared_on_what_they_have():
    w = World(torch.float64, {})
    topk = ps.topk(w.zt, 5)
    ids, log_probs = topk.ids.clone(), topk.log_probs.clone()
    ids[..., 3:], log_probs[..., 3:] = -1, -torch.inf
    for over in ("logits", "probabilities"):
        short = logits.best_entries_kl(w.hidden, w.weight, ps.TopK(ids, log_probs), w.keep, over=over)
        three = logits.best_entries_kl(w.hidden, w.weight, ps.topk(w.zt, 3), w.keep, over=over)
        torch.testing.assert_close(short, three)
        pair = (torch.autograd.grad(x, [w.hidden, w.weight]) for x in (short, three))
        torch.testing.assert_close(*pair)


@pytest.mark.parametrize("other_token", [False, True])
def test_06_five_entries_from_a_cache_give_the_same_loss(other_token, tmp_path):
    w = World(torch.float32, {})
    live = ps.topk(w.zt, 5)
    with ps.cache.Writer(tmp_path, ps.cache.Spec(vocab_size=V, k=5, values="fp32")) as writer:
        for i in range(B):
            writer.add(f"{i}", w.tokens[i], live[i])
    cached, _ = ps.cache.open(tmp_path).packed([f"{i}" for i in range(B)])
    found = []
    shaped = [x.view(B, T, *x.shape[1:]) for x in (cached.ids, cached.log_probs, cached.log_rest)]
    for topk in (live, ps.TopK(*shaped)):
        loss = logits.best_entries_kl(w.hidden, w.weight, topk, w.keep, other_token=other_token)
        found.append([loss, *torch.autograd.grad(loss, list(w.net.parameters()), retain_graph=True, allow_unused=True)])
    for got, expected in zip(*found, strict=True):
        assert (got is None and expected is None) or torch.equal(got, expected)


def test_07_acceptance_rises_while_total_variation_falls():
    w = World(torch.float32, {})
    found = []
    for _ in range(10):
        w.refresh()
        loss, accepted = logits.draft_loss(w.hidden, w.weight, w.teacher, w.labels)
        torch.testing.assert_close(loss.detach(), 1 - accepted)
        found.append(accepted.item())
        w.step(loss)
    assert found[-1] > found[0] + 0.01
