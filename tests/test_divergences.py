"""The table of divergences: every line of it keeps what the kernels rely on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from potstill import divergences, spell
from potstill.divergences import Divergence, Parameter, divergence

ALL = [divergences.get(name) for name in divergences.names()] + [
    divergences.jsd(teacher_weight=0.9),
    divergences.skew_forward_kl(teacher_weight=0.7),
    divergences.skew_reverse_kl(teacher_weight=0.2),
    divergences.alpha_divergence(alpha=0.05),
    divergences.renyi(alpha=0.95),
]
PROPER = [d for d in ALL if d.name != "soft_cross_entropy"]  # its minimum is the teacher's entropy


def rows(n: int = 6, v: int = 40, spread: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(7)
    zp, zq = (torch.randn(n, v, generator=g, dtype=torch.float64) * spread for _ in range(2))
    return zp.log_softmax(-1), zq.log_softmax(-1)


def value(d: Divergence, lp: torch.Tensor, lq: torch.Tensor) -> torch.Tensor:
    return (d.formula(lp, lq, *d.values)[0] + d.centre * (lq.exp() - lp.exp())).sum(-1)


@pytest.mark.parametrize("d", ALL, ids=str)
def test_slope_is_the_derivative_of_the_term(d):
    lp, lq = rows()
    lq = lq.requires_grad_()
    term, slope = d.formula(lp, lq, *d.values)
    (expected,) = torch.autograd.grad(term.sum(), lq)
    torch.testing.assert_close(slope.detach(), expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("d", ALL, ids=str)
def test_row_gradient_identity(d):
    """(slope - q * S) / T is the gradient by the logits."""
    lp, _ = rows()
    z = torch.randn(lp.shape, dtype=torch.float64, requires_grad=True)
    lq = (z / 2.0).log_softmax(-1)
    term, slope = d.formula(lp, lq, *d.values)
    (expected,) = torch.autograd.grad(term.sum(), z)
    got = (slope - lq.exp() * slope.sum(-1, keepdim=True)) / 2.0
    torch.testing.assert_close(got.detach(), expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("d", PROPER, ids=str)
def test_zero_at_equality_and_positive_elsewhere(d):
    lp, lq = rows()
    assert value(d, lp, lp).abs().max() < 1e-13
    assert (value(d, lp, lq) > 0).all()


@pytest.mark.parametrize("d", PROPER, ids=str)
@pytest.mark.parametrize("distance", [1e-1, 1e-3, 1e-5])
def test_pitfall_04_close_distributions_in_fp32(d, distance):
    """Right to 1e-7 nat (half an ulp of 1), so above zero for every value that is larger than that."""
    g = torch.Generator().manual_seed(1)
    z = torch.randn(8, 5000, generator=g) * 3
    lp = z.log_softmax(-1)
    lq = (z + distance * torch.randn(z.shape, generator=g)).log_softmax(-1)
    got, truth = value(d, lp, lq), value(d, lp.double(), lq.double())
    assert ((got - truth).abs() < 1e-7 + 1e-3 * truth).all()
    assert ((got > 0) | (truth < 1e-7)).all()


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "skew_forward_kl", "skew_reverse_kl"])
def test_the_centre_is_worth_its_cost(name):
    """The plain sum of the same terms is at least five times further off at KL about 1e-6."""
    g = torch.Generator().manual_seed(1)
    z = torch.randn(64, 5000, generator=g) * 3
    lp = z.log_softmax(-1)
    lq = (z + 1e-3 * torch.randn(z.shape, generator=g)).log_softmax(-1)
    d = divergences.get(name)
    truth = value(d, lp.double(), lq.double())
    plain = d.formula(lp, lq, *d.values)[0].sum(-1)
    assert (plain - truth).abs().max() > 5 * (value(d, lp, lq) - truth).abs().max()


@pytest.mark.parametrize("d", ALL, ids=str)
def test_the_centre_takes_the_first_order_away(d):
    lp, _ = rows()
    _, slope = d.formula(lp, lp, *d.values)
    if d.name in ("soft_cross_entropy", "total_variation"):
        assert d.centre == 0
        return
    torch.testing.assert_close(slope, -d.centre * lp.exp(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("d", ALL, ids=str)
def test_pitfall_03_minus_infinity_gives_the_limit(d):
    """A banned token on both sides adds nothing; on one side it gives what a vanishing probability tends to."""
    lp, lq = rows(4, 9)
    both = torch.full((4, 1), -math.inf, dtype=torch.float64)
    term, slope = d.formula(torch.cat([lp, both], -1), torch.cat([lq, both], -1), *d.values)
    assert (term[:, -1] == 0).all() and (slope[:, -1] == 0).all()
    tiny = torch.tensor([-600.0], dtype=torch.float64)
    none, some = torch.tensor([-math.inf], dtype=torch.float64), torch.tensor([-1.5], dtype=torch.float64)
    for banned, near in (((none, some), (tiny, some)), ((some, none), (some, tiny))):
        term, slope = (float(x) for x in d.formula(*banned, *d.values))
        near_term, near_slope = (float(x) for x in d.formula(*near, *d.values))
        assert not math.isnan(term) and not math.isnan(slope)
        if math.isfinite(term):
            assert term == pytest.approx(near_term, abs=1e-9) and slope == pytest.approx(near_slope, abs=1e-9)
        else:
            assert term == math.inf and near_term > 50


@pytest.mark.parametrize("d", [x for x in ALL if "kl" in x.name or x.name == "jsd"], ids=str)
def test_pitfall_02_peaked_logits_stay_finite(d):
    g = torch.Generator().manual_seed(3)
    zp, zq = (torch.randn(16, 3000, generator=g) * 60 for _ in range(2))
    lp, lq = zp.log_softmax(-1), zq.log_softmax(-1)
    truth = value(d, lp.double(), lq.double())
    got = value(d, lp, lq)
    assert got.isfinite().all()
    torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=1e-5)


def test_parameters_are_checked_and_named():
    with pytest.raises(ValueError, match=r"jsd.*teacher_weight=1.5.*\(0.0, 1.0\)"):
        divergences.jsd(teacher_weight=1.5)
    with pytest.raises(ValueError, match="forward_kl"):
        divergences.jsd(teacher_weight=0)
    with pytest.raises(TypeError, match="beta.*teacher_weight"):
        divergences.jsd(beta=0.5)
    with pytest.raises(TypeError, match="no parameters"):
        divergences.forward_kl(teacher_weight=0.5)
    with pytest.raises(ValueError, match=r"'kl'.*forward_kl"):
        divergences.get("kl")


def test_pitfall_09_weights_and_directions_mean_what_they_say():
    """jsd's teacher_weight is the teacher's; forward is KL(teacher || student)."""
    lp, lq = rows()
    p, q = lp.exp(), lq.exp()
    m = 0.9 * p + 0.1 * q
    jsd = (0.9 * p * (lp - m.log()) + 0.1 * q * (lq - m.log())).sum(-1)
    torch.testing.assert_close(value(divergences.jsd(teacher_weight=0.9), lp, lq), jsd)
    torch.testing.assert_close(value(divergences.get("forward_kl"), lp, lq), (p * (lp - lq)).sum(-1))
    torch.testing.assert_close(value(divergences.get("reverse_kl"), lp, lq), (q * (lq - lp)).sum(-1))
    skew = (p * (lp - (0.1 * p + 0.9 * q).log())).sum(-1)
    torch.testing.assert_close(value(divergences.get("skew_forward_kl"), lp, lq), skew)
    skew = (q * (lq - (0.9 * p + 0.1 * q).log())).sum(-1)
    torch.testing.assert_close(value(divergences.get("skew_reverse_kl"), lp, lq), skew)
    torch.testing.assert_close(value(divergences.get("total_variation"), lp, lq), (p - q).abs().sum(-1) / 2)
    entropy = -(p * lp).sum(-1)
    torch.testing.assert_close(
        value(divergences.get("soft_cross_entropy"), lp, lq), value(divergences.get("forward_kl"), lp, lq) + entropy
    )


def test_the_spelled_file_is_fresh():
    source = Path(__file__).parents[1] / "csrc" / "divergences.inc"
    assert source.read_text() == spell.cpp_source(), "run `python -m potstill.spell > csrc/divergences.inc` and rebuild"


def test_what_cannot_be_spelled_is_refused_by_line():
    def looping(lp, lq):
        for _ in range(2):
            lp = lp + lq
        return lp, lq

    def method(lp, lq):
        return lp.exp(), lq

    with pytest.raises(SyntaxError, match=r"looping, line 2"):
        spell.cpp_function(looping)
    with pytest.raises(SyntaxError, match=r"lp\.exp\(\)"):
        spell.cpp_function(method)


def test_a_formula_that_does_not_fit_its_table_line_is_refused():
    with pytest.raises(TypeError, match=r"\['lp', 'lq', 'w'\]"):

        @divergence(Parameter("w", 0.5, 0.0, 1.0))
        def misfit(lp, lq):
            return lp, lq

    assert "misfit" not in divergences.names()
