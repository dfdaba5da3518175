"""The public losses: values, gradients, weights and the autograd contract, against formulas in plain torch."""

from __future__ import annotations

import math

import potstill as ps
import pytest
import torch
import torch.nn.functional as F
from potstill import divergences, gemm

D, DT, V, LEAD = 16, 8, 67, (3, 5)


class Case:
    """A student, a teacher in every form, labels with ignored rows, weights."""

    def __init__(self, device="cpu", dtype=torch.float64, seed=0):
        g = torch.Generator().manual_seed(seed)

        def make(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(device, dtype)

        self.hidden, self.weight = make(*LEAD, D).requires_grad_(), make(V, D).requires_grad_()
        self.bias = make(V).requires_grad_()
        self.teacher_hidden, self.teacher_weight = make(*LEAD, DT), make(V, DT)
        self.teacher_logits = self.teacher_hidden @ self.teacher_weight.T
        self.labels = torch.randint(0, V, LEAD, generator=g).to(device)
        self.labels[0, :2] = -100
        self.token_weights = torch.rand(LEAD, generator=g, dtype=torch.float64).to(device) + 0.2

    @property
    def head(self):
        return ps.Head(self.weight, self.bias)

    def teacher(self, form, k=V):
        if form == "hidden":
            return ps.HiddenTeacher(self.teacher_hidden, ps.Head(self.teacher_weight))
        if form == "logits":
            return ps.LogitsTeacher(self.teacher_logits)
        return ps.topk(self.teacher_logits, k)

    def logits(self):
        return self.hidden @ self.weight.T + self.bias

    def grads(self, loss):
        return torch.autograd.grad(loss, (self.hidden, self.weight, self.bias), retain_graph=True)


def plain_rows(zs, zt, d, temperature=1.0):
    """Row divergences by autograd-able torch."""
    lq, lp = (zs / temperature).log_softmax(-1), (zt / temperature).log_softmax(-1)
    total = d.formula(lp, lq, *d.values)[0].sum(-1)
    return d.outer(total, d.formula(lp, lq, *d.values)[1].sum(-1), *d.values)[0] if d.outer else total


def plain_loss(
    c, d, temperature=1.0, scale_by_t2=False, distill_weight=1.0, ce_weight=0.0, weights=None, denominator=None
):
    rows = distill_weight * plain_rows(c.logits(), c.teacher_logits, d, temperature)
    rows = rows * (temperature**2 if scale_by_t2 else 1)
    ce = F.cross_entropy(c.logits().reshape(-1, V), c.labels.reshape(-1), reduction="none", ignore_index=-100)
    rows = rows + ce_weight * ce.reshape(LEAD)
    w = (c.labels != -100).to(rows.dtype) * (1 if weights is None else weights)
    return (w * rows).sum() / (w.sum() if denominator is None else denominator)


@pytest.mark.parametrize("form", ["hidden", "logits", "topk"])
@pytest.mark.parametrize("name", divergences.names())
def test_the_loss_is_the_formula(name, form, device, poisoned):
    c, d = Case(device), divergences.get(name)
    for temperature, t2, ce, weights in ((1.0, False, 0.0, None), (2.0, True, 0.4, c.token_weights)):
        if form == "topk" and temperature != 1:
            temperature = 1.0
        expected = plain_loss(c, d, temperature, t2, 0.7, ce, weights)
        words = dict(divergence=name, temperature=temperature, scale_by_t2=t2, distill_weight=0.7, ce_weight=ce)
        got = ps.linear_distill_loss(
            c.hidden, c.head, c.teacher(form), c.labels, token_weights=weights, chunk_rows=4, **words
        )
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
        for a, b in zip(c.grads(got), c.grads(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
        logits = c.logits().detach().requires_grad_()
        at_hand = ps.distill_loss(logits, c.teacher(form), c.labels, token_weights=weights, chunk_rows=4, **words)
        torch.testing.assert_close(at_hand, expected, rtol=1e-11, atol=1e-12)
        (dz,) = torch.autograd.grad(at_hand, logits)
        torch.testing.assert_close(dz @ c.weight, c.grads(expected)[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("form", ["hidden", "topk"])
def test_gradcheck(form, backend):
    c = Case()
    teacher = c.teacher(form, 9)
    for name, low_memory in ((n, m) for n in divergences.names() for m in (False, True)):

        def loss(hidden, weight, bias, name=name, low_memory=low_memory):
            return ps.linear_distill_loss(
                hidden, ps.Head(weight, bias, softcap=7.0, logit_scale=0.8), teacher, c.labels, divergence=name,
                ce_weight=0.3, chunk_rows=4, backend=backend, low_memory=low_memory,
            )  # fmt: skip

        torch.autograd.gradcheck(loss, (c.hidden, c.weight, c.bias), fast_mode=True, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("t2", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_pitfall_01_value_and_gradient_agree(temperature, t2, reduction):
    """Finite difference of the returned value along a direction equals the gradient along it."""
    c = Case()
    direction, out_weights = torch.randn_like(c.hidden), torch.rand(LEAD, dtype=torch.float64)

    def value(hidden):
        loss = ps.linear_distill_loss(
            hidden, c.head, c.teacher("hidden"), c.labels, temperature=temperature, scale_by_t2=t2, ce_weight=0.3,
            token_weights=c.token_weights, reduction=reduction,
        )  # fmt: skip
        return (loss * out_weights).sum() if reduction == "none" else loss

    (grad,) = torch.autograd.grad(value(c.hidden), c.hidden)
    e = 1e-6
    difference = (value(c.hidden.detach() + e * direction) - value(c.hidden.detach() - e * direction)) / (2 * e)
    assert difference.item() == pytest.approx((grad * direction).sum().item(), rel=1e-6)


@pytest.mark.parametrize("form", ["hidden", "logits", "topk"])
def test_pitfall_17_none_takes_a_different_gradient_for_each_row(form, device):
    c = Case(device)
    out = torch.randn(LEAD, dtype=torch.float64, device=device)
    rows = ps.linear_distill_loss(c.hidden, c.head, c.teacher(form), c.labels, reduction="none", chunk_rows=4)
    expected = plain_rows(c.logits(), c.teacher_logits, divergences.get("forward_kl")) * (c.labels != -100)
    torch.testing.assert_close(rows, expected)
    assert rows.shape == LEAD and (rows[c.labels == -100] == 0).all()
    for a, b in zip(c.grads((rows * out).sum()), c.grads((expected * out).sum()), strict=True):
        torch.testing.assert_close(a, b)


def test_tails_mean_what_they_say():
    c = Case()
    k = 7
    top = c.teacher("topk", k)
    lp, ids = top.log_probs, top.ids.long()
    lq = c.logits().log_softmax(-1).gather(-1, ids)
    p = lp.exp()
    drop = (p * (lp - lq)).sum(-1)
    rest_p, rest_q = 1 - p.sum(-1), 1 - lq.exp().sum(-1)
    bucket = drop + rest_p * (rest_p.log() - rest_q.log())
    lp_k, lq_k = lp.log_softmax(-1), lq.log_softmax(-1)
    renormalize = (lp_k.exp() * (lp_k - lq_k)).sum(-1)
    for tail, rows in (("drop", drop), ("bucket", bucket), ("renormalize", renormalize)):
        got = ps.linear_distill_loss(c.hidden, c.head, top, tail=tail)
        torch.testing.assert_close(got, rows.mean(), rtol=1e-9, atol=1e-10)
        for a, b in zip(c.grads(got), c.grads(rows.mean()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    logits = c.logits().detach().requires_grad_()
    outside = torch.ones_like(logits, dtype=torch.bool).scatter(-1, ids, False)
    for tail, moves in (("drop", True), ("bucket", True), ("renormalize", False)):
        (g,) = torch.autograd.grad(ps.distill_loss(logits, top, tail=tail), logits)
        assert bool((g[outside] != 0).any()) == moves, f"pitfall 8: gradient outside the support with {tail}"


def test_pitfall_08_top_k_mass_of_one_is_not_a_nan():
    """All mass inside the support, on the teacher's side, the student's, or both."""
    logits = torch.full((2, 50), -200.0)
    logits[:, :3] = torch.tensor([3.0, 2.0, 1.0])
    top = ps.topk(logits, 3)
    assert (top.log_rest < -150).all()
    for student in (logits.clone(), torch.randn(2, 50)):
        student.requires_grad_()
        for name in divergences.names():
            loss = ps.distill_loss(student, top, divergence=name)
            (g,) = torch.autograd.grad(loss, student)
            assert g.isfinite().all() and loss.isfinite(), name


def test_a_sparse_teacher_at_another_temperature_is_refused():
    c = Case()
    top = c.teacher("topk", 7)
    for tail in ("bucket", "drop"):
        with pytest.raises(ValueError, match=r"temperature=2.0.*renormalize"):
            ps.linear_distill_loss(c.hidden, c.head, top, temperature=2.0, tail=tail)
    got = ps.linear_distill_loss(c.hidden, c.head, top, temperature=2.0, tail="renormalize")
    lq = (c.logits().gather(-1, top.ids.long()) / 2).log_softmax(-1)
    lp = (top.log_probs / 2).log_softmax(-1)
    torch.testing.assert_close(got, (lp.exp() * (lp - lq)).sum(-1).mean())
    with pytest.raises(ValueError, match="log_rest"):
        ps.linear_distill_loss(c.hidden, c.head, ps.TopK(top.ids, top.log_probs))


def test_pitfall_07_padded_vocabularies(device):
    """A wider, padded side gives what the unpadded one gives; a real mismatch is refused with both numbers."""
    c = Case(device, torch.float32)
    wide = torch.cat([c.weight, torch.randn(5, D, device=device) * 50]).detach().requires_grad_()
    wide_teacher = torch.cat([c.teacher_weight, torch.randn(9, DT, device=device) * 50])
    expected = ps.linear_distill_loss(c.hidden, ps.Head(c.weight), c.teacher("hidden"))
    teacher = ps.HiddenTeacher(c.teacher_hidden, ps.Head(wide_teacher, vocab_size=V))
    got = ps.linear_distill_loss(c.hidden, ps.Head(wide, vocab_size=V), teacher)
    torch.testing.assert_close(got, expected)
    (g,) = torch.autograd.grad(got, wide)
    assert (g[V:] == 0).all() and (g[:V] != 0).any()
    with pytest.raises(ValueError, match=f"{V + 9}.*{V}.*vocab_size"):
        ps.linear_distill_loss(c.hidden, ps.Head(c.weight), ps.HiddenTeacher(c.teacher_hidden, ps.Head(wide_teacher)))
    logits = torch.cat([c.teacher_logits, torch.full((*LEAD, 3), 99.0, device=device)], -1)
    at_hand = ps.linear_distill_loss(c.hidden, ps.Head(c.weight), ps.LogitsTeacher(logits, vocab_size=V))
    torch.testing.assert_close(at_hand, expected)
    padded = torch.cat([c.hidden @ c.weight.T, torch.full((*LEAD, 3), 99.0, device=device)], -1)
    torch.testing.assert_close(ps.distill_loss(padded, c.teacher("logits"), vocab_size=V), expected)


def test_pitfall_10_softcap_and_scale_are_part_of_the_objective():
    c = Case()
    student = ps.Head(c.weight, c.bias, logit_scale=0.4, softcap=3.0)
    teacher = ps.HiddenTeacher(c.teacher_hidden, ps.Head(c.teacher_weight, logit_scale=1.7, softcap=5.0))
    zs = 3.0 * torch.tanh(0.4 * c.logits() / 3.0)
    zt = 5.0 * torch.tanh(1.7 * c.teacher_logits / 5.0)
    expected = plain_rows(zs, zt, divergences.get("jsd"), 1.5).mean()
    got = ps.linear_distill_loss(c.hidden, student, teacher, divergence="jsd", temperature=1.5)
    torch.testing.assert_close(got, expected)
    for a, b in zip(c.grads(got), c.grads(expected), strict=True):
        torch.testing.assert_close(a, b)


def test_pitfall_09_self_distillation_is_zero_and_shifted_is_not():
    c = Case(dtype=torch.float32)
    same = ps.HiddenTeacher(c.hidden.detach(), ps.Head(c.weight.detach(), c.bias.detach()))
    shifted = ps.HiddenTeacher(c.hidden.detach().roll(1, 1), same.head)
    for name in divergences.names():
        if name != "soft_cross_entropy":
            assert abs(ps.linear_distill_loss(c.hidden, c.head, same, divergence=name).item()) < 1e-6
            assert ps.linear_distill_loss(c.hidden, c.head, shifted, divergence=name).item() > 0.05


@pytest.mark.parametrize("form", ["hidden", "topk"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_pitfall_12_all_rows_ignored(form, reduction, device):
    c = Case(device)
    labels = torch.full(LEAD, -100, device=device)
    for low_memory in (False, True):
        loss = ps.linear_distill_loss(
            c.hidden, c.head, c.teacher(form), labels, ce_weight=0.5, reduction=reduction, low_memory=low_memory
        )
        assert (loss == 0).all() and loss.requires_grad
        for g in c.grads(loss.sum()):
            assert (g == 0).all()
    empty = ps.linear_distill_loss(
        c.hidden[:0], c.head, ps.LogitsTeacher(c.teacher_logits[:0]), labels[:0], reduction=reduction
    )
    assert empty.sum() == 0 and all((g == 0).all() for g in c.grads(empty.sum()))


def test_pitfall_11_ignored_rows_are_in_neither_numerator_nor_denominator():
    c = Case()
    kept = c.labels != -100
    whole = ps.linear_distill_loss(c.hidden, c.head, c.teacher("logits"), c.labels, ce_weight=0.5)
    alone = ps.linear_distill_loss(
        c.hidden[kept], c.head, ps.LogitsTeacher(c.teacher_logits[kept]), c.labels[kept], ce_weight=0.5
    )
    torch.testing.assert_close(whole, alone)
    other = ps.linear_distill_loss(
        c.hidden, c.head, c.teacher("logits"), c.labels.masked_fill(~kept, 7), ignore_index=7, ce_weight=0.5
    )
    assert other.isfinite()
    loud = c.teacher_logits.clone()
    loud[~kept] = math.nan
    torch.testing.assert_close(
        ps.linear_distill_loss(c.hidden, c.head, ps.LogitsTeacher(loud), c.labels, ce_weight=0.5), whole
    )


def test_pitfall_13_num_items(device):
    """Micro-batches with one external denominator add up to the whole batch; int, tensor and 0 are taken."""
    c = Case(device)
    whole = ps.linear_distill_loss(c.hidden, c.head, c.teacher("logits"), c.labels, ce_weight=0.5)
    n = int((c.labels != -100).sum())
    for count in (n, torch.tensor(n)):
        parts = [
            ps.linear_distill_loss(
                c.hidden[i], c.head, ps.LogitsTeacher(c.teacher_logits[i]), c.labels[i], ce_weight=0.5, num_items=count
            )
            for i in range(LEAD[0])
        ]
        torch.testing.assert_close(sum(parts), whole)
    assert (
        ps.linear_distill_loss(
            c.hidden, c.head, c.teacher("logits"), torch.full(LEAD, -100, device=device), num_items=0
        ).item()
        == 0
    )
    with pytest.raises(ValueError, match="num_items.*sum"):
        ps.linear_distill_loss(c.hidden, c.head, c.teacher("logits"), num_items=3, reduction="sum")


def test_token_weights_may_be_learned():
    c = Case()
    w = c.token_weights.clone().requires_grad_()
    for words in ({}, {"low_memory": True}):
        got = ps.linear_distill_loss(c.hidden, c.head, c.teacher("logits"), c.labels, token_weights=w, **words)
        expected = plain_loss(c, divergences.get("forward_kl"), weights=w)
        torch.testing.assert_close(torch.autograd.grad(got, w)[0], torch.autograd.grad(expected, w)[0])


def test_pitfall_16_second_backward_and_in_place_scaling():
    c = Case()
    for words in ({}, {"low_memory": True}, {"reduction": "none"}):
        loss = ps.linear_distill_loss(c.hidden, c.head, c.teacher("hidden"), c.labels, **words).sum()
        first = torch.autograd.grad(loss, (c.hidden, c.weight), retain_graph=True)
        first = [g.clone() for g in first]
        second = torch.autograd.grad(loss * 3.0, (c.hidden, c.weight), retain_graph=True)
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(3 * a, b)
        scaled = ps.linear_distill_loss(c.hidden, c.head, c.teacher("hidden"), c.labels, **words).sum()
        scaled *= 2
        for a, b in zip(first, torch.autograd.grad(scaled, (c.hidden, c.weight)), strict=True):
            torch.testing.assert_close(2 * a, b)


def test_the_last_backward_makes_no_second_head_gradient():
    """The saved gradient is scaled in place when the graph is freed, and kept whole when it is not."""
    c = Case()
    expected = c.grads(plain_loss(c, divergences.get("forward_kl")) * 3.0)[1]
    loss = ps.linear_distill_loss(c.hidden, c.head, c.teacher("hidden"), c.labels)
    saved = [t for t in loss.grad_fn.next_functions and loss.grad_fn.saved_tensors if t is not None]
    address = next(t.data_ptr() for t in saved if t.shape == c.weight.shape)
    (kept,) = torch.autograd.grad(loss * 3.0, c.weight, retain_graph=True)
    assert kept.data_ptr() != address
    kept.zero_()  # a user's business
    (last,) = torch.autograd.grad(loss * 3.0, c.weight)
    assert last.data_ptr() == address
    torch.testing.assert_close(last, expected)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss * 3.0, c.weight)


@pytest.mark.parametrize("words", [{}, {"low_memory": True}], ids=str)
def test_pitfall_16_second_derivatives_raise(words):
    c = Case()
    loss = ps.linear_distill_loss(c.hidden, c.head, c.teacher("hidden"), **words)
    (g,) = torch.autograd.grad(loss, c.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(g.sum(), c.hidden)
    logits = c.logits().detach().requires_grad_()
    (g,) = torch.autograd.grad(ps.distill_loss(logits, c.teacher("logits")), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(g.sum(), logits)


def test_pitfall_17_no_gradient_work_that_nobody_asked_for(monkeypatch):
    """A frozen head costs no weight product, no_grad costs none at all."""
    from potstill import gemm

    done: list[str] = []
    for name in ("hidden_gradient_into", "weight_gradient_add"):
        original = getattr(gemm, name)
        monkeypatch.setattr(gemm, name, lambda *a, f=original, n=name: (done.append(n), f(*a))[1])
    c = Case()
    frozen = ps.Head(c.weight.detach(), c.bias.detach())
    ps.linear_distill_loss(c.hidden, frozen, c.teacher("hidden")).backward()
    assert set(done) == {"hidden_gradient_into"}
    done.clear()
    with torch.no_grad():
        assert not ps.linear_distill_loss(c.hidden, c.head, c.teacher("hidden")).requires_grad
    assert done == []
    ps.linear_distill_loss(c.hidden.detach(), c.head, c.teacher("hidden")).backward()
    assert set(done) == {"weight_gradient_add"}


def test_pitfall_20_inputs_are_left_alone():
    c = Case(dtype=torch.float32)
    tensors = [c.hidden, c.weight, c.teacher_hidden, c.teacher_weight, c.teacher_logits, c.labels]
    before = [t.detach().clone() for t in tensors]
    ps.linear_distill_loss(c.hidden, c.head, c.teacher("hidden"), c.labels, ce_weight=1.0).backward()
    logits = c.logits().detach().requires_grad_()
    kept = logits.detach().clone()
    ps.distill_loss(logits, c.teacher("topk", 5), c.labels, ce_weight=1.0).backward()
    for a, b in zip([*tensors, logits], [*before, kept], strict=True):
        assert torch.equal(a.detach(), b)


def test_pitfall_20_one_row_and_non_contiguous_inputs():
    c = Case()
    one = ps.linear_distill_loss(c.hidden[0, 2], c.head, ps.LogitsTeacher(c.teacher_logits[0, 2]))
    torch.testing.assert_close(one, plain_rows(c.logits()[0, 2], c.teacher_logits[0, 2], divergences.get("forward_kl")))
    swapped = c.hidden.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    weight = c.weight.detach().T.contiguous().T.requires_grad_()
    got = ps.linear_distill_loss(swapped, weight, c.teacher("hidden"))
    expected = ps.linear_distill_loss(c.hidden, ps.Head(c.weight), c.teacher("hidden"))
    torch.testing.assert_close(got, expected)
    g = torch.autograd.grad(got, (swapped, weight))
    e = torch.autograd.grad(expected, (c.hidden, c.weight))
    for a, b in zip(g, e, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 15, 100])
def test_chunk_sizes_do_not_matter(rows):
    c = Case()
    expected = c.grads(ps.linear_distill_loss(c.hidden, c.head, c.teacher("hidden"), c.labels, ce_weight=0.5))
    got = c.grads(
        ps.linear_distill_loss(c.hidden, c.head, c.teacher("hidden"), c.labels, ce_weight=0.5, chunk_rows=rows)
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_metrics_are_the_unweighted_parts():
    c = Case()
    words = dict(distill_weight=0.7, ce_weight=0.3, return_metrics=True, temperature=2.0, scale_by_t2=True)
    for extra in ({}, {"low_memory": True}):
        loss, metrics = ps.linear_distill_loss(c.hidden, c.head, c.teacher("hidden"), c.labels, **words, **extra)
        assert not metrics["distill"].requires_grad and not metrics["ce"].requires_grad
        torch.testing.assert_close(loss.detach(), 0.7 * 4 * metrics["distill"] + 0.3 * metrics["ce"])
    _, rows = ps.linear_distill_loss(
        c.hidden, c.head, c.teacher("hidden"), c.labels, reduction="none", return_metrics=True
    )
    assert rows["distill"].shape == LEAD


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["hidden", "topk"])
def test_16_bit_inputs(form, dtype, device, no_worse):
    """No worse than plain torch in the same dtype; with precise=True, as good as its fp32 on the same inputs."""
    c, truth_case = Case(device, dtype), Case(device, dtype)
    for name in ("hidden", "weight", "bias"):
        setattr(truth_case, name, getattr(c, name).detach().double().requires_grad_())
    truth_case.teacher_hidden, truth_case.teacher_weight = c.teacher_hidden.double(), c.teacher_weight.double()
    truth_case.teacher_logits = truth_case.teacher_hidden @ truth_case.teacher_weight.T
    teacher = c.teacher("hidden") if form == "hidden" else truth_case.teacher("topk")
    kl = divergences.get("forward_kl")
    truth = plain_loss(truth_case, kl)
    true_grads = truth_case.grads(truth)
    plain = plain_rows(c.logits().float(), (c.teacher_hidden @ c.teacher_weight.T).float(), kl)[c.labels != -100].mean()
    plain_grads = c.grads(plain)
    for precise in (False, True):
        loss = ps.linear_distill_loss(c.hidden, c.head, teacher, c.labels, precise=precise, chunk_rows=4)
        assert loss.dtype == torch.float32
        no_worse(loss, truth if precise else plain, truth, 1e-5)
        for a, b, t in zip(c.grads(loss), plain_grads, true_grads, strict=True):
            assert a.dtype == dtype
            no_worse(a, t.to(dtype) if precise else b, t, 2e-3 if dtype == torch.bfloat16 else 3e-4)


def test_pitfall_06_the_heads_gradient_is_summed_in_fp32(bf16_products):
    """512 one-row chunks: as good as one chunk. Single rows summed in bf16 are not: the bound tells the two apart."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(512, 32, generator=g).bfloat16(), torch.randn(90, 32, generator=g).bfloat16()
    weight.requires_grad_()
    teacher = ps.LogitsTeacher(torch.randn(512, 90, generator=g) * 3)

    def gradient(loss):
        return torch.autograd.grad(loss, weight)[0]

    wide = weight.detach().double().requires_grad_()
    logits = hidden.double() @ wide.T
    if bf16_products == "native":  # the gradient at the logits as they are rounded
        logits = logits + (logits.bfloat16().double() - logits).detach()
    truth = plain_rows(logits, teacher.logits.double(), divergences.get("forward_kl")).mean()
    (truth,) = torch.autograd.grad(truth, wide)

    def error(got):
        return ((got.double() - truth).norm() / truth.norm()).item()

    for rows in (1, 512):
        assert error(gradient(ps.linear_distill_loss(hidden, weight, teacher, chunk_rows=rows))) < 3e-3, rows
    narrow = torch.zeros_like(weight)
    for row in range(512):
        part = slice(row, row + 1)
        narrow = narrow + gradient(
            ps.linear_distill_loss(hidden[part], weight, ps.LogitsTeacher(teacher.logits[part]), num_items=512)
        )
    assert error(narrow) > 9e-3


def test_a_single_chunk_needs_no_sum_in_fp32(bf16_products, monkeypatch):
    """The same bits as with one, whole and with rows left out; two chunks are summed."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(40, 32, generator=g).bfloat16(), torch.randn(90, 32, generator=g).bfloat16()
    weight.requires_grad_()
    teacher, weights = ps.LogitsTeacher(torch.randn(40, 90, generator=g) * 3), (torch.arange(40) % 3).float()
    made = []
    add = gemm.weight_gradient_add
    monkeypatch.setattr(gemm, "weight_gradient_add", lambda acc, *rest: (made.append(acc.dtype), add(acc, *rest))[1])

    def gradient(rows, token_weights):
        loss = ps.linear_distill_loss(hidden, weight, teacher, token_weights=token_weights, chunk_rows=rows)
        return torch.autograd.grad(loss, weight)[0]

    found = [gradient(64, None), gradient(64, weights)]
    assert set(made) == {torch.bfloat16 if bf16_products == "native" else torch.float32}
    made.clear()
    gradient(20, None)
    assert set(made) == {torch.float32}
    monkeypatch.setattr(gemm, "is_rounded_once", lambda *given: False)
    assert torch.equal(found[0], gradient(64, None)) and torch.equal(found[1], gradient(64, weights))


def test_autocast_and_mixed_dtypes():
    c = Case(dtype=torch.float32)
    with pytest.raises(TypeError, match=r"bfloat16.*float32.*autocast"):
        ps.linear_distill_loss(c.hidden.bfloat16(), c.head, c.teacher("hidden"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ps.linear_distill_loss(c.hidden.bfloat16(), c.head, c.teacher("hidden"), c.labels)
    loss.backward()
    assert c.weight.grad.dtype == torch.float32 and c.hidden.grad.isfinite().all()
    expected = ps.linear_distill_loss(c.hidden, c.head, c.teacher("hidden"), c.labels)
    assert loss.item() == pytest.approx(expected.item(), rel=0.03)


def test_modules_are_the_functions():
    c = Case()
    words = dict(divergence=ps.divergences.jsd(teacher_weight=0.3), temperature=2.0, ce_weight=0.5)
    module = ps.LinearDistillLoss(**words)
    torch.testing.assert_close(
        module(c.hidden, c.head, c.teacher("hidden"), c.labels),
        ps.linear_distill_loss(c.hidden, c.head, c.teacher("hidden"), c.labels, **words),
    )
    torch.testing.assert_close(
        ps.DistillLoss(**words)(c.logits(), c.teacher("logits"), c.labels, reduction="sum"),
        ps.distill_loss(c.logits(), c.teacher("logits"), c.labels, reduction="sum", **words),
    )
    assert "teacher_weight=0.3" in repr(module)
    with pytest.raises(ValueError, match="temperature"):
        ps.LinearDistillLoss(temperature=-1)


BAD = [
    (dict(divergence="kl"), ValueError, "divergence='kl'.*forward_kl"),
    (dict(temperature=0.0), ValueError, "temperature=0.0"),
    (dict(temperature=math.nan), ValueError, "temperature=nan"),
    (dict(reduction="batchmean"), ValueError, "reduction='batchmean'.*'mean'"),
    (dict(tail="rest"), ValueError, "tail='rest'.*'bucket'"),
    (dict(ce_weight=0.5), ValueError, "ce_weight=0.5 needs labels"),
    (dict(distill_weight=math.inf), ValueError, "distill_weight=inf"),
    (dict(chunk_rows=0), ValueError, "chunk_rows=0"),
    (dict(backend="cudnn"), ValueError, "backend='cudnn'.*torch"),
    (dict(labels=torch.zeros(3, 4, dtype=torch.long)), ValueError, r"labels.*\[3, 4\].*\[3, 5\]"),
    (dict(labels=torch.zeros(3, 5)), TypeError, "labels.*float32"),
    (dict(labels=torch.full((3, 5), V), ce_weight=1.0), ValueError, f"labels holds {V}.*0..{V - 1}"),
    (dict(token_weights=torch.ones(5)), ValueError, r"token_weights.*\[5\]"),
]


@pytest.mark.parametrize("words, error, message", BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_input_is_named(words, error, message):
    c = Case()
    with pytest.raises(error, match=message):
        ps.linear_distill_loss(c.hidden, c.head, c.teacher("hidden"), **words)


def test_bad_teachers_are_named():
    c = Case()
    with pytest.raises(TypeError, match="LogitsTeacher"):
        ps.linear_distill_loss(c.hidden, c.head, c.teacher_logits)
    with pytest.raises(ValueError, match=r"\[3, 4\].*\[3, 5\]"):
        ps.linear_distill_loss(c.hidden, c.head, ps.LogitsTeacher(c.teacher_logits[:, :4]))
    with pytest.raises(ValueError, match=f"ids holds {V + 3}"):
        bad = c.teacher("topk", 4)
        ps.linear_distill_loss(c.hidden, c.head, ps.TopK(bad.ids + V + 3 - bad.ids, bad.log_probs, bad.log_rest))
    with pytest.raises(ValueError, match=r"D = 16"):
        ps.linear_distill_loss(c.hidden[..., :4], c.head, c.teacher("hidden"))
    with pytest.raises(ValueError, match="log_probs has shape"):
        ps.TopK(torch.zeros(3, 4, dtype=torch.int32), torch.zeros(3, 5))
    with pytest.raises(TypeError, match="integers"):
        ps.TopK(torch.zeros(3, 4), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="empty weight"):
        ps.Head(torch.zeros(0, 4))
    with pytest.raises(ValueError, match="softcap=-1"):
        ps.Head(torch.zeros(3, 4), softcap=-1.0)
    with pytest.raises(ValueError, match=r"vocab_size=9.*1..3"):
        ps.Head(torch.zeros(3, 4), vocab_size=9)


def test_sequence_mean_weighs_sequences_alike():
    """The mean within each sequence, then over the sequences that have a row; num_items counts sequences."""
    c = Case()
    labels = c.labels.clone()
    labels[1] = -100
    rows = plain_rows(c.logits(), c.teacher_logits, divergences.get("forward_kl"))
    w = (labels != -100) * c.token_weights
    means = [(w[i] * rows[i]).sum() / w[i].sum() for i in (0, 2)]
    words = dict(labels=labels, token_weights=c.token_weights, reduction="sequence_mean")
    for low_memory in (False, True):
        got = ps.linear_distill_loss(c.hidden, c.head, c.teacher("logits"), low_memory=low_memory, **words)
        torch.testing.assert_close(got, sum(means) / 2)
        for a, b in zip(c.grads(got), c.grads(sum(means) / 2), strict=True):
            torch.testing.assert_close(a, b)
    over = ps.linear_distill_loss(c.hidden, c.head, c.teacher("logits"), num_items=8, **words)
    torch.testing.assert_close(over, sum(means) / 8)
    with pytest.raises(ValueError, match=r"sequence_mean.*\[15\]"):
        ps.linear_distill_loss(
            c.hidden.reshape(15, -1), c.head, ps.LogitsTeacher(c.teacher_logits.reshape(15, -1)),
            reduction="sequence_mean",
        )  # fmt: skip
