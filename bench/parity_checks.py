"""Failure classes of distillation losses as measurements: each states its inputs, its truth, and what right means.

A check returns (right, what was measured). The truth is fp64 PyTorch on the same numbers. Sizes are small, seeds are
fixed, one CPU thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from parity_subjects import Side, Subject
from torch import Tensor

Result = tuple[bool, str]


@dataclass(frozen=True)
class Check:
    name: str
    inputs: str  # the inputs, and the truth
    test: str  # this library's own test of the class
    run: Callable[[Subject], Result]
    fused_only: bool = False  # a question to losses that work from hidden states
    failure: str = "wrong"  # the word for an answer that is not right


CHECKS: list[Check] = []


def check(
    name: str, inputs: str, test: str, fused_only: bool = False, failure: str = "wrong"
) -> Callable[..., Callable[[Subject], Result]]:
    def enter(run: Callable[[Subject], Result]) -> Callable[[Subject], Result]:
        CHECKS.append(Check(name, inputs, test, run, fused_only, failure))
        return run

    return enter


def pair(
    rows: int = 24, vocab: int = 97, spread: float = 2.0, dtype: torch.dtype = torch.float32,
    near: float | None = None, width: int = 16,
) -> tuple[Side, Side]:  # fmt: skip
    """Student (leaves) and teacher with logits of that standard deviation; near: the teacher's plus that much noise."""
    g = torch.Generator().manual_seed(0)
    h, w, th, tw, noise = (torch.randn(n, width, generator=g) for n in (rows, vocab, rows, vocab, vocab))
    tw = tw * spread / width**0.5
    if near is None:
        w = w * spread / width**0.5
    else:
        h, w = th.clone(), tw + near * noise / width**0.5
    h, w = (x.to(dtype).requires_grad_() for x in (h, w))
    return Side(h, w), Side(th.to(dtype), tw.to(dtype))


def divergence(zs: Tensor, zt: Tensor, beta: float = 0.0, temperature: float = 1.0) -> Tensor:
    """Row divergences [N] in fp64 log space; -inf on both sides adds nothing."""
    lq, lp = (z.double().div(temperature).log_softmax(-1) for z in (zs, zt))
    p, q = lp.exp(), lq.exp()

    def kl(a: Tensor, la: Tensor, lb: Tensor) -> Tensor:
        return torch.where(a > 0, a * (la - torch.where(a > 0, lb, 0.0)), 0.0).sum(-1)

    if beta in (0.0, 1.0):
        return kl(p, lp, lq) if beta == 0 else kl(q, lq, lp)
    lm = torch.logaddexp(lp + math.log(beta), lq + math.log1p(-beta))
    return beta * kl(p, lp, lm) + (1 - beta) * kl(q, lq, lm)


def gradients(loss: Tensor, side: Side) -> list[Tensor]:
    return [g.double() for g in torch.autograd.grad(loss, side.leaves())]


def off(got: list[Tensor], want: list[Tensor]) -> float:
    """Largest relative error by norm."""
    return max(((a - b).norm() / b.norm().clamp(min=1e-300)).item() for a, b in zip(got, want, strict=True))


def against_truth(subject: Subject, s: Side, t: Side, bound: float, *, beta: float = 0.0, temperature: float = 1.0,
                  labels: Tensor | None = None, **words: object) -> Result:  # fmt: skip
    """Value and gradients within `bound` of fp64."""
    loss = subject.loss(s, t, labels, beta=beta, temperature=temperature, **words)
    exact = s.double()
    zs, zt = exact.logits(), t.double().logits()
    live = (zs > -math.inf).all(0) | (zt > -math.inf).all(0)  # entries banned on both sides add nothing
    rows = divergence(zs[:, live], zt[:, live], beta, temperature)
    if subject.cross_entropy:
        p = zt.div(temperature).softmax(-1)
        rows = rows - torch.where(p > 0, p * p.log(), 0.0).sum(-1).detach()
    truth = rows.mean() if labels is None else rows[labels != -100].mean()
    value = abs(loss.item() - truth.item()) / max(abs(truth.item()), 1e-12)
    grad = off(gradients(loss, s), gradients(truth, exact))
    right = value <= bound and grad <= bound
    return right, f"{loss.item():.6g} for {truth.item():.6g}, gradient off by {grad:.1e}"


@check(
    "value and gradient disagree at T = 2",
    "24 rows, V = 97, fp32, T = 2, forward KL; slope of the value along the gradient over the gradient's square: 1",
    "tests/test_losses.py::test_pitfall_01_value_and_gradient_agree",
)
def temperature_agrees(subject: Subject) -> Result:
    s, t = pair()
    g = torch.autograd.grad(subject.loss(s, t, temperature=2.0), s.hidden)[0]
    step = 1e-3 / g.norm()
    with torch.no_grad():
        up, down = (subject.loss(replace(s, hidden=s.hidden + k * g), t, temperature=2.0) for k in (step, -step))
    ratio = ((up - down) / (2 * step) / g.square().sum()).item()
    return abs(ratio - 1) < 0.02, f"{ratio:.3f}"


@check(
    "peaked logits: a mixture underflows",
    "24 rows, V = 97, fp32, logits of standard deviation 60, the student's 3 away, JSD at 0.5; fp64",
    "tests/test_divergences.py::test_pitfall_02_peaked_logits_stay_finite",
)
def peaked(subject: Subject) -> Result:
    return against_truth(subject, *pair(spread=60.0, near=3.0), 1e-4, beta=0.5)


def banned(subject: Subject, student: bool, beta: float) -> Result:
    s, t = pair()
    bias = torch.zeros(97)
    bias[[3, 50, 96]] = -math.inf
    return against_truth(subject, replace(s, bias=bias if student else None), replace(t, bias=bias), 1e-4, beta=beta)


@check(
    "banned tokens: -inf on both sides, forward KL",
    "three entries of 97 banned by a bias of -inf on both sides; fp64, where they add 0",
    "tests/test_divergences.py::test_pitfall_03_minus_infinity_gives_the_limit",
)
def banned_both(subject: Subject) -> Result:
    return banned(subject, True, 0.0)


@check(
    "banned tokens: -inf on the teacher's side, forward KL",
    "as above, the teacher's side alone",
    "tests/test_divergences.py::test_pitfall_03_minus_infinity_gives_the_limit",
)
def banned_teacher(subject: Subject) -> Result:
    return banned(subject, False, 0.0)


@check(
    "banned tokens: -inf on both sides, JSD",
    "as above, both sides, JSD at 0.5",
    "tests/test_divergences.py::test_pitfall_03_minus_infinity_gives_the_limit",
)
def banned_jsd(subject: Subject) -> Result:
    return banned(subject, True, 0.5)


@check(
    "16-bit arithmetic: a negative JSD",
    "bf16, V = 5,003, 64 rows one at a time, student within 1e-2 of the teacher, JSD at 0.5: never below 0",
    "tests/test_divergences.py::test_pitfall_04_close_distributions_in_fp32",
)
def negative(subject: Subject) -> Result:
    s, t = pair(64, 5_003, dtype=torch.bfloat16, near=1e-2)
    values = [subject.loss(Side(s.hidden[i : i + 1], s.weight), Side(t.hidden[i : i + 1], t.weight), beta=0.5).item()
              for i in range(64)]  # fmt: skip
    below = sum(v < -1e-7 for v in values)
    return below == 0, f"{below} of 64 below 0, lowest {min(values):.1e}"


@check(
    "16-bit logits near convergence",
    "bf16 hidden states and heads, V = 20,000, D = 256, KL about 0.04, forward KL; gradients within 1e-2 "
    "of fp64 on the same numbers; this library with `precise=True`, needed where the default rounds logits",
    "tests/test_bench.py::test_gradients_near_convergence",
)
def near_convergence(subject: Subject) -> Result:
    return against_truth(subject.precisely(), *pair(32, 20_000, dtype=torch.bfloat16, near=0.3, width=256), 1e-2)


@check(
    "the head's gradient summed in 16 bits",
    "bf16, 1,024 rows in 128 chunks of 8, V = 257, distant distributions; head's gradient within 5e-3 of fp64",
    "tests/test_losses.py::test_pitfall_06_the_heads_gradient_is_summed_in_fp32",
    fused_only=True,
)
def accumulation(subject: Subject) -> Result:
    s, t = pair(1024, 257, dtype=torch.bfloat16)
    s, t = replace(s, hidden=(s.hidden.detach() + 1).requires_grad_()), t
    exact = s.double()
    truth = gradients(divergence(exact.logits(), t.double().logits()).mean(), exact)[1]
    got = gradients(subject.loss(s, t, chunk=8), s)[1]
    error = off([got], [truth])
    return error < 5e-3, f"off by {error:.1e}"


@check(
    "a teacher with padding columns",
    "student V = 97, teacher the same head plus 31 untrained rows; truth over the 97 real entries: 0",
    "tests/test_losses.py::test_pitfall_07_padded_vocabularies",
)
def padded(subject: Subject) -> Result:
    s, _ = pair()
    extra = torch.randn(31, 16, generator=torch.Generator().manual_seed(2)) * 0.5
    t = Side(s.hidden.detach(), torch.cat([s.weight.detach(), extra]), vocab_size=97)
    value = subject.loss(s, t).item()
    return abs(value) < 1e-5, f"{value:.4g} for 0"


@check(
    "top-k rows whose rest is tiny",
    "V = 97, top 8 of both sides the same, rest of the student 2e-8, of the teacher 0.07, forward KL with "
    "the rest as one more entry; fp64",
    "tests/test_losses.py::test_pitfall_08_top_k_mass_of_one_is_not_a_nan",
)
def tiny_rest(subject: Subject) -> Result:
    g = torch.Generator().manual_seed(0)
    top = torch.randn(24, 8, generator=g).sort(-1, descending=True).values
    zt = torch.cat([top, torch.full((24, 89), -5.0)], -1)
    zs = torch.cat([1.5 * top, torch.full((24, 89), -20.0)], -1).requires_grad_()
    exact = zs.detach().double().requires_grad_()

    def buckets(z: Tensor) -> Tensor:
        lz = z.double().log_softmax(-1)
        return torch.cat([lz[:, :8], lz[:, 8:].logsumexp(-1, keepdim=True)], -1)

    truth = divergence_of_log_probs(buckets(zt), buckets(exact))
    loss = subject.topk_loss(zs, zt, 8)
    (got,), (want,) = torch.autograd.grad(loss, zs), torch.autograd.grad(truth, exact)
    error = off([got.double()], [want])
    right = abs(loss.item() / truth.item() - 1) < 1e-4 and error < 1e-4
    return right, f"{loss.item():.6g} for {truth.item():.6g}, gradient off by {error:.1e}"


def divergence_of_log_probs(lp: Tensor, lq: Tensor) -> Tensor:
    return (lp.exp() * (lp - lq)).sum(-1).mean()


@check(
    "a KL that is a cross-entropy",
    "student equal to teacher, forward KL: 0",
    "tests/test_losses.py::test_pitfall_09_self_distillation_is_zero_and_shifted_is_not",
)
def self_distillation(subject: Subject) -> Result:
    s, t = pair(near=0.0)
    value = subject.loss(s, t).item()
    return abs(value) < 1e-5, f"{value:.4g} for 0"


@check(
    "whose weight beta is",
    "JSD with m = 0.9 teacher + 0.1 student; fp64",
    "tests/test_divergences.py::test_pitfall_09_weights_and_directions_mean_what_they_say",
)
def weight(subject: Subject) -> Result:
    return against_truth(subject, *pair(), 1e-4, beta=0.9)


@check(
    "softcap and logit scale left out",
    "both sides softcap 5 and scale 0.5, forward KL; fp64 on the capped logits",
    "tests/test_heads.py::test_gradient_through_the_models_own_head",
)
def capped(subject: Subject) -> Result:
    s, t = (replace(x, softcap=5.0, scale=0.5) for x in pair(spread=6.0))
    return against_truth(subject, s, t, 1e-4)


@check(
    "ignored rows",
    "every third of 24 labels is -100, forward KL; mean over the other rows, gradient 0 at ignored ones",
    "tests/test_losses.py::test_pitfall_11_ignored_rows_are_in_neither_numerator_nor_denominator",
)
def ignored(subject: Subject) -> Result:
    s, t = pair()
    labels = torch.arange(24)
    labels[::3] = -100
    return against_truth(subject, s, t, 1e-4, labels=labels)


@check(
    "no valid row",
    "all labels -100: 0 with a gradient function, backward gives zeros",
    "tests/test_losses.py::test_pitfall_12_all_rows_ignored",
)
def none_valid(subject: Subject) -> Result:
    s, t = pair()
    loss = subject.loss(s, t, torch.full((24,), -100))
    if not loss.requires_grad:
        return False, f"{loss.item()} without a gradient function; its backward raises"
    largest = max(g.abs().max().item() for g in gradients(loss, s))
    return loss.item() == 0 and largest == 0, f"{loss.item()}, largest gradient {largest}"
