"""Targets beyond one plain teacher: mixtures, masks, drawn entries, other temperatures; against formulas in torch."""

from __future__ import annotations

import math

import potstill as ps
import pytest
import torch
import torch.nn.functional as F
from potstill import divergences

N, V, D = 7, 53, 6


def close(a, b, rtol=1e-9, atol=1e-11):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


class Case:
    def __init__(self, seed=0, device="cpu"):
        g = torch.Generator().manual_seed(seed)

        def make(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(device)

        self.hidden, self.weight = make(N, D).requires_grad_(), make(V, D).requires_grad_()
        self.a, self.b = make(N, V) * 2, make(N, V) * 2
        self.ha, self.wa = make(N, 4), make(V, 4)
        self.labels = torch.randint(0, V, (N,), generator=g).to(device)
        self.per_row = torch.rand(N, generator=g, dtype=torch.float64).to(device)
        self.device = device

    @property
    def logits(self):
        return self.hidden @ self.weight.T

    def check(self, teacher, lp, d="forward_kl", temperature=1.0, **words):
        """The loss and its gradients are those of the divergence to the target lp [N, V]."""
        d = divergences.get(d)
        lq = (self.logits / temperature).log_softmax(-1)
        expected = d.formula(lp, lq, *d.values)[0].sum(-1).mean()
        words = dict(divergence=d, temperature=temperature, chunk_rows=3, **words)
        got = ps.linear_distill_loss(self.hidden, self.weight, teacher, **words)
        close(got, expected)
        inputs = (self.hidden, self.weight)
        truth = torch.autograd.grad(expected, inputs)
        for low_memory in (False, True) if not isinstance(teacher, ps.Mix | ps.Masked) else (False,):
            again = ps.linear_distill_loss(self.hidden, self.weight, teacher, low_memory=low_memory, **words)
            for x, y in zip(torch.autograd.grad(again, inputs), truth, strict=True):
                close(x, y)
        z = self.logits.detach().requires_grad_()
        at_hand = ps.distill_loss(z, teacher, **words)
        close(at_hand, expected)
        close(torch.autograd.grad(at_hand, z)[0] @ self.weight, truth[0])


@pytest.mark.parametrize("d", ["forward_kl", "reverse_kl", "jsd", "total_variation"])
def test_taid_is_a_mixture_of_logits_with_the_student_itself(d, device):
    """softmax((1 - t) sg(z_s) + t z_t): no gradient through the student's part; t as number and as tensor."""
    c = Case(device=device)
    lp = (0.7 * c.logits.detach() + 0.3 * c.a).log_softmax(-1)
    for t in (0.3, torch.tensor(0.3, dtype=torch.float64, device=device)):
        c.check(ps.Mix([(1 - t, ps.Student()), (t, ps.LogitsTeacher(c.a))]), lp, d)
    hidden = ps.HiddenTeacher(c.ha, ps.Head(c.wa, softcap=5.0))
    z = 5 * torch.tanh(c.ha @ c.wa.T / 5)
    c.check(ps.Mix([(0.7, ps.Student()), (0.3, hidden)]), (0.7 * c.logits.detach() + 0.3 * z).log_softmax(-1), d)


def test_coefficients_a_row_of_any_sign():
    """AlignDistil's target: z_dpo + w (z_dpo - z_rev), one w a row."""
    c = Case()
    w = c.per_row[:, None]
    mix = ps.Mix([(1 + c.per_row, ps.LogitsTeacher(c.a)), (-c.per_row, ps.LogitsTeacher(c.b))])
    c.check(mix, (c.a + w * (c.a - c.b)).log_softmax(-1), "reverse_kl")
    c.check(mix, ((c.a + w * (c.a - c.b)) / 2).log_softmax(-1), "reverse_kl", temperature=2.0)


def test_probability_space_teachers_label_and_smoothing():
    c = Case()
    pa, pb = (c.a / 2).softmax(-1), c.b.softmax(-1)
    onehot = F.one_hot(c.labels, V).double()
    target = 0.5 * pa + 0.2 * pb + 0.2 * onehot + 0.1 / V
    mix = ps.Mix(
        [
            (0.5, ps.LogitsTeacher(c.a), 2.0), (0.2, ps.LogitsTeacher(c.b)), (0.2, ps.OneHot(c.labels)),
            (0.1, ps.Uniform()),
        ],
        space="probabilities",
    )  # fmt: skip
    c.check(mix, target.log())
    c.check(mix, target.log(), "jsd")
    close(
        ps.linear_distill_loss(c.hidden, c.weight, ps.Mix([(1.0, ps.OneHot(c.labels))], space="probabilities")),
        F.cross_entropy(c.logits, c.labels),
    )


def test_a_topk_in_a_mixture_names_its_tail():
    c = Case()
    top = ps.topk(c.a, 9)
    terms = [(0.8, top), (0.2, ps.OneHot(c.labels))]
    with pytest.raises(ValueError, match="tail='uniform' or 'renormalize'"):
        ps.Mix(terms, space="probabilities")
    p = torch.zeros(N, V, dtype=torch.float64).scatter_(1, top.ids.long(), top.log_probs.exp())
    onehot = F.one_hot(c.labels, V).double()
    inside = torch.zeros(N, V, dtype=torch.bool).scatter_(1, top.ids.long(), True)
    spread = torch.where(inside, p, (top.log_rest.exp() / (V - 9))[:, None])
    for tail, dense in (("uniform", spread), ("renormalize", p / p.sum(-1, keepdim=True))):
        target = 0.8 * dense + 0.2 * onehot
        mix = ps.Mix(terms, space="probabilities", tail=tail)
        expected = torch.where(target > 0, target * (target.log() - c.logits.log_softmax(-1)), 0.0).sum(-1).mean()
        close(ps.linear_distill_loss(c.hidden, c.weight, mix), expected)


def test_a_banned_entry_stays_banned_in_a_mixture_of_logits():
    c = Case()
    c.a[:, 3] = -math.inf
    target = (0.5 * c.logits.detach() + 0.5 * c.a).log_softmax(-1)
    got = ps.linear_distill_loss(
        c.hidden, c.weight, ps.Mix([(0.5, ps.Student()), (0.5, ps.LogitsTeacher(c.a))]), divergence="jsd"
    )
    lq = c.logits.log_softmax(-1)
    m = (target.exp() + lq.exp()) / 2
    expected = (torch.where(target.exp() > 0, target.exp() * (target - m.log()), 0.0) + lq.exp() * (lq - m.log())) / 2
    close(got, expected.sum(-1).mean())
    unused = ps.Mix([(1.0, ps.Student()), (0.0, ps.LogitsTeacher(c.a))])
    assert ps.linear_distill_loss(c.hidden, c.weight, unused).abs() < 1e-12


def test_the_two_temperatures():
    c = Case()
    lp = (c.a / 3).log_softmax(-1)
    c.check(ps.LogitsTeacher(c.a), lp, temperature=2.0, teacher_temperature=3.0)
    capped = ps.HiddenTeacher(c.ha, ps.Head(c.wa, softcap=5.0, logit_scale=1.5))
    lp = (5 * torch.tanh(1.5 * c.ha @ c.wa.T / 5) / 3).log_softmax(-1)
    c.check(capped, lp, "jsd", temperature=2.0, teacher_temperature=3.0)
    mix = ps.Mix([(0.6, ps.LogitsTeacher(c.a)), (0.4, ps.LogitsTeacher(c.b))], space="probabilities")
    lp = (0.6 * c.a.softmax(-1) + 0.4 * c.b.softmax(-1)).log()
    c.check(mix, lp, temperature=2.0, teacher_temperature=1.0)
    with pytest.raises(ValueError, match="teacher_temperature=0"):
        ps.linear_distill_loss(c.hidden, c.weight, ps.LogitsTeacher(c.a), teacher_temperature=0)


def sparse_at(z, k, temperature):
    """A TopK with the rest recorded at one more temperature, by hand."""
    top = ps.topk(z, k)
    inside = torch.zeros_like(z, dtype=torch.bool).scatter_(1, top.ids.long(), True)
    rest = (z / temperature).log_softmax(-1).masked_fill(inside, -math.inf).logsumexp(-1)
    return ps.TopK(top.ids, top.log_probs, top.log_rest, log_rest_at={temperature: rest})


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("tail", ["bucket", "drop"])
def test_pitfall_08_a_recorded_rest_makes_another_temperature_exact(tail, temperature):
    c = Case()
    top = sparse_at(c.a, 9, temperature)
    lp = (c.a / temperature).log_softmax(-1).gather(1, top.ids.long())
    lq_all = (c.logits / temperature).log_softmax(-1)
    lq = lq_all.gather(1, top.ids.long())
    rows = (lp.exp() * (lp - lq)).sum(-1)
    if tail == "bucket":
        p, q = 1 - lp.exp().sum(-1), 1 - lq.exp().sum(-1)
        rows = rows + p * (p.log() - q.log())
    got = ps.linear_distill_loss(c.hidden, c.weight, top, temperature=temperature, tail=tail)
    close(got, rows.mean(), rtol=1e-8)
    close(torch.autograd.grad(got, c.hidden)[0], torch.autograd.grad(rows.mean(), c.hidden)[0], rtol=1e-7)
    with pytest.raises(ValueError, match=r"temperature=3.0.*recorded at.*with_estimated_rest"):
        ps.linear_distill_loss(c.hidden, c.weight, top, temperature=3.0, tail=tail)
    whole = ps.topk(c.a, V)
    whole = ps.TopK(whole.ids, whole.log_probs, whole.log_rest, log_rest_at={temperature: whole.log_rest})
    c.check(whole, (c.a / temperature).log_softmax(-1), temperature=temperature, tail=tail)


@pytest.mark.parametrize("temperature", [0.5, 0.8, 1.5, 4.0])
def test_the_estimated_rest_keeps_its_bound(temperature):
    """The truth lies within rest_bounds, so the estimate is off by at most half their distance."""
    z = torch.randn(200, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 3
    for k in (1, 8, 64):
        top = ps.topk(z, k)
        inside = torch.zeros_like(z, dtype=torch.bool).scatter_(1, top.ids.long(), True)
        outside = (z.log_softmax(-1) / temperature).masked_fill(inside, -math.inf).logsumexp(-1)
        low, high = top.rest_bounds(temperature, 300)
        assert (low <= outside + 1e-9).all() and (outside <= high + 1e-9).all()
        estimate = top.with_estimated_rest(temperature, 300).log_rest_at[temperature]
        within = (top.log_probs / temperature).logsumexp(-1)
        odds = estimate - torch.log1p(-estimate.exp())  # log(outside / inside)
        assert ((odds + within - outside).abs() <= (high - low) / 2 + 1e-9).all()


def draws(z, n, temperature=1.0, seed=0):
    """TopK of n draws a row with replacement from softmax(z / T), every id of the vocabulary listed."""
    g = torch.Generator().manual_seed(seed)
    found = torch.multinomial((z / temperature).softmax(-1), n, replacement=True, generator=g)
    counts = torch.zeros(z.shape, dtype=torch.long).scatter_add_(1, found, torch.ones_like(found))
    ids = torch.where(counts > 0, torch.arange(z.shape[1]), -1)
    lp = torch.where(counts > 0, z.log_softmax(-1), -math.inf)
    return ps.TopK(ids, lp, counts=counts, sample_temperature=temperature)


@pytest.mark.parametrize("name", ["forward_kl", "skew_forward_kl", "alpha_divergence"])
def test_sampled_rows_are_unbiased(name):
    """Value and gradient of the mean over many draws are those of the sum over the vocabulary where p > 0."""
    c = Case()
    d = divergences.get(name)
    lp, z = c.a.log_softmax(-1), c.logits.detach().requires_grad_()
    lq = z.log_softmax(-1)
    truth = d.formula(lp, lq, *d.values)[0].sum(-1)
    (true_grad,) = torch.autograd.grad(truth.sum(), z)
    got = ps.distill_loss(z, draws(c.a, 400_000), divergence=d, tail="sampled", reduction="none")
    (grad,) = torch.autograd.grad(got.sum(), z)
    assert (got - truth).abs().max() < 0.03 and (grad - true_grad).abs().max() < 0.01
    other = ps.distill_loss(z, draws(c.a, 400_000, 1.5), divergence=d, tail="sampled", reduction="none")
    assert (other - truth).abs().max() < 0.03, "draws at another temperature are weighted back"


def test_sampled_weights_are_exactly_these():
    c = Case()
    top = draws(c.a, 30)
    share = top.counts.double() / 30
    lq = c.logits.log_softmax(-1)
    expected = (share * (c.a.log_softmax(-1) - lq)).sum(-1).mean()
    got = ps.linear_distill_loss(c.hidden, c.weight, top, tail="sampled")
    close(got, expected)
    close(torch.autograd.grad(got, c.hidden)[0], torch.autograd.grad(expected, c.hidden)[0])
    with pytest.raises(ValueError, match="counts"):
        ps.linear_distill_loss(c.hidden, c.weight, ps.topk(c.a, 4), tail="sampled")
    with pytest.raises(ValueError, match=r"temperature=2.0.*sampled"):
        ps.linear_distill_loss(c.hidden, c.weight, top, tail="sampled", temperature=2.0)


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_estimators_from_sampled_tokens(name):
    c = Case()
    tokens = c.labels
    lp = c.a.log_softmax(-1).gather(1, tokens[:, None])
    lq = c.logits.log_softmax(-1).gather(1, tokens[:, None])
    r = lp - lq
    expected = {"k1": -r, "k2": r * r / 2, "k3": r.exp() - 1 - r}[name].mean()
    got = ps.linear_distill_loss(
        c.hidden, c.weight, ps.TopK(tokens[:, None], lp), divergence=name, tail="sampled", ce_weight=0.0
    )
    close(got, expected)
    for x, y in zip(*(torch.autograd.grad(v, (c.hidden, c.weight)) for v in (got, expected)), strict=True):
        close(x, y)
    with pytest.raises(ValueError, match=f"{name}.*sampled tokens"):
        ps.linear_distill_loss(c.hidden, c.weight, ps.LogitsTeacher(c.a), divergence=name)
    with pytest.raises(ValueError, match=f"{name}.*tail='sampled'"):
        ps.linear_distill_loss(c.hidden, c.weight, ps.TopK(tokens[:, None], lp), divergence=name)


def test_k2_and_k3_estimate_the_reverse_kl():
    """Over draws from the student: k1 and k3 have its mean, k2 has the mean of its gradient."""
    c = Case()
    z, lp = c.logits.detach().requires_grad_(), c.a.log_softmax(-1) * 0.2 + c.logits.detach().log_softmax(-1) * 0.8
    lp = lp.log_softmax(-1)
    lq = z.log_softmax(-1)
    truth = (lq.exp() * (lq - lp)).sum(-1)
    (true_grad,) = torch.autograd.grad(truth.sum(), z)
    drawn = draws(z.detach(), 400_000, seed=5)
    teacher = ps.TopK(drawn.ids, torch.where(drawn.ids >= 0, lp, -math.inf), counts=drawn.counts)
    for name in ("k1", "k2", "k3"):
        got = ps.distill_loss(z, teacher, divergence=name, tail="sampled", reduction="none")
        (grad,) = torch.autograd.grad(got.sum(), z)
        if name != "k2":
            assert (got - truth).abs().max() < 5e-3, name
        if name == "k2":
            assert (grad - true_grad).abs().max() < 5e-3


@pytest.mark.parametrize("d", ["forward_kl", "reverse_kl", "jsd", "symmetric_kl", "renyi", "alpha_divergence"])
def test_a_soft_mask_sends_gradients_to_its_bounds(d):
    c = Case()
    d = divergences.get(d)
    lower = torch.full((N,), 0.1, dtype=torch.float64, requires_grad=True)
    upper = (0.7 + 0.2 * c.per_row).requires_grad_()
    p = c.a.softmax(-1)
    mass, order = p.sort(-1, descending=True)
    place = torch.empty_like(p).scatter_(1, order, mass.cumsum(-1) - mass / 2)
    mask = torch.sigmoid((place - lower[:, None]) / 0.1) * torch.sigmoid((upper[:, None] - place) / 0.1)
    for temperature in (1.0, 2.0):
        if temperature == 2:  # the mask is that of the distribution at that temperature
            p = (c.a / 2).softmax(-1)
            mass, order = p.sort(-1, descending=True)
            place = torch.empty_like(p).scatter_(1, order, mass.cumsum(-1) - mass / 2)
            mask = torch.sigmoid((place - lower[:, None]) / 0.1) * torch.sigmoid((upper[:, None] - place) / 0.1)
        lp = (c.a / temperature + mask.log()).log_softmax(-1)
        lq = (c.logits / temperature + mask.log()).log_softmax(-1)
        term, slope = d.formula(lp, lq, *d.values)
        value = term.sum(-1)
        value = d.outer(value, slope.sum(-1), *d.values)[0] if d.outer else value
        expected = value.mean()
        teacher = ps.Masked(ps.LogitsTeacher(c.a), lower, upper, softness=0.1)
        got = ps.linear_distill_loss(c.hidden, c.weight, teacher, divergence=d, temperature=temperature, chunk_rows=3)
        close(got, expected)
        inputs = (c.hidden, c.weight, lower, upper)
        truth = torch.autograd.grad(expected, inputs, retain_graph=True)
        for x, y in zip(torch.autograd.grad(got, inputs), truth, strict=True):
            close(x, y, rtol=1e-7)
        rows = ps.distill_loss(c.logits, teacher, divergence=d, temperature=temperature, reduction="none")
        for x, y in zip(torch.autograd.grad(rows.mean(), inputs), truth, strict=True):
            close(x, y, rtol=1e-7)


def test_a_hard_mask_keeps_a_range_and_leaves_the_cross_entropy_whole():
    c = Case()
    p = c.a.softmax(-1)
    mass, order = p.sort(-1, descending=True)
    place = torch.empty_like(p).scatter_(1, order, mass.cumsum(-1) - mass / 2)
    keep = (place >= 0.2) & (place <= 0.9)
    lp = c.a.masked_fill(~keep, -math.inf).log_softmax(-1)
    lq = c.logits.masked_fill(~keep, -math.inf).log_softmax(-1)
    rows = torch.where(keep, lp.exp() * (lp - lq), 0.0).sum(-1)
    rows = torch.where(keep.any(-1), rows, 0.0)
    expected = rows.mean() + 0.5 * F.cross_entropy(c.logits, c.labels)
    got = ps.linear_distill_loss(
        c.hidden, c.weight, ps.Masked(ps.LogitsTeacher(c.a), 0.2, 0.9), c.labels, ce_weight=0.5
    )
    close(got, expected)
    grads = torch.autograd.grad(got, (c.hidden, c.weight))
    for x, y in zip(grads, torch.autograd.grad(expected, (c.hidden, c.weight)), strict=True):
        close(x, y)
    none = ps.linear_distill_loss(c.hidden, c.weight, ps.Masked(ps.LogitsTeacher(c.a), 2.0, 3.0))
    assert none == 0 and (torch.autograd.grad(none, c.hidden)[0] == 0).all()


def test_cross_entropy_alone_needs_no_teacher():
    c = Case()
    c.labels[2] = -100
    got, parts = ps.linear_distill_loss(
        c.hidden, c.weight, None, c.labels, distill_weight=0.0, ce_weight=1.0, return_metrics=True
    )
    expected = F.cross_entropy(c.logits, c.labels)
    close(got, expected)
    close(parts["ce"], expected.detach())
    for x, y in zip(*(torch.autograd.grad(v, (c.hidden, c.weight)) for v in (got, expected)), strict=True):
        close(x, y)
    with pytest.raises(ValueError, match="distill_weight=0.0"):
        ps.linear_distill_loss(c.hidden, c.weight, None, c.labels)


def test_what_does_not_fit_is_refused_by_name():
    c = Case()
    logits = ps.LogitsTeacher(c.a)
    for make, sentence in (
        (lambda: ps.Mix([]), "no terms"),
        (lambda: ps.Mix([(0.5, logits), (0.6, logits)], space="probabilities"), "must sum to 1"),
        (lambda: ps.Mix([(-0.5, logits), (1.5, logits)], space="probabilities"), "negative"),
        (lambda: ps.Mix([(1.0, logits)], space="odds"), "space='odds'"),
        (lambda: ps.Mix([(math.nan, logits)]), "finite number"),
        (lambda: ps.Mix([(1.0, logits, 0.0)]), "temperature=0"),
        (lambda: ps.Mix([(1.0, ps.OneHot(c.labels))]), "no source in logits space"),
        (lambda: ps.Mix([(1.0, c.a)]), "torch.float64 tensor"),
        (lambda: ps.OneHot(c.a), "must be integers"),
        (lambda: ps.Masked(ps.topk(c.a, 3), 0, 1), "renormalize"),
        (lambda: ps.Masked(logits, torch.tensor(0.1, requires_grad=True), 1), "softness > 0"),
        (lambda: ps.Masked(logits, 0, 1, softness=-1), "softness=-1"),
    ):
        with pytest.raises((ValueError, TypeError), match=sentence):
            make()
    for words, sentence in (
        (dict(teacher=ps.topk(c.a, 3), divergence="renyi", tail="drop"), "renyi.*tail='drop'"),
        (dict(teacher=ps.topk(c.a, 3), divergence="mse_logits"), "mse_logits.*dense"),
        (dict(teacher=logits, divergence="ranking_hinge"), "ranking_hinge.*TopK"),
        (dict(teacher=logits, divergence="mse_logits", backend="cpp"), "backend='cpp'.*mse_logits"),
        (dict(teacher=ps.Masked(logits, 0, 1), divergence="soft_cross_entropy"), "forward_kl"),
        (dict(teacher=ps.Mix([(c.per_row[:3], logits)])), "coefficient of Mix"),
        (dict(teacher=logits, return_metrics=("recall",)), "recall"),
        (dict(teacher=logits, return_metrics=("teacher_mass",)), "TopK"),
    ):
        with pytest.raises(ValueError, match=sentence):
            ps.linear_distill_loss(c.hidden, c.weight, **words)
