"""DDK (arXiv:2407.16154): drawing more from the domains in which the student is furthest behind its teacher.

Three domains are learned within a few steps and one is not, so that there is something for a mixture to choose. With
four domains that all take long (three tokens of context each, unequally known at the start) the shares ended even, the
uneven ones on the way cost something, and the direction did not show: the weakest ratio 1.310 against 1.257.
"""

from __future__ import annotations

import math

import potstill as ps
import torch
from common import Source, better, cross_entropy, draw, pretrained, report, shows, train, windows
from plots import curves
from potstill.methods.samplers import DomainMixture

CLAIM = "The weakest domain's gap in perplexity ends smaller with DDK's mixture than with a uniform one"
# order, rank and sharpness of each source: three that a few steps teach, and one that no number of steps exhausts
DOMAINS = ((1, 4, 4.0), (1, 8, 4.0), (1, 8, 5.0), (3, 64, 8.0))
VOCAB = 16


def tagged(sequences: torch.Tensor, domain: int) -> torch.Tensor:
    """Each domain speaks in its own sixteen tokens of the shared vocabulary."""
    return sequences + VOCAB * domain


def experiment(seed: int, smoke: bool) -> dict:
    part = 20 if smoke else 1
    rounds, inner = (2, 2) if smoke else (7, 50)
    sources = [Source(10 * seed + i, VOCAB, order=o, rank=r, sharpness=s) for i, (o, r, s) in enumerate(DOMAINS)]
    data = [windows(tagged(draw(s, 600 // part, 20, seed), i)) for i, s in enumerate(sources)]
    unseen = [windows(tagged(draw(s, 60 // part, 20, seed + 500), i)) for i, s in enumerate(sources)]
    total = VOCAB * len(DOMAINS)
    everything = tuple(torch.cat([d[j] for d in data]) for j in range(2))
    teacher = pretrained(seed, everything, total, 96, 4 if smoke else 500)
    found: dict = {}

    def perplexities(model):
        with torch.no_grad():
            return [math.exp(float(cross_entropy(model, *u))) for u in unseen]

    best = perplexities(teacher)
    for name in ("uniform", "ddk"):
        student = pretrained(seed + 1, everything, total, 32, 4 if smoke else 100, layers=1)
        mixture = DomainMixture([len(d[0]) for d in data], seed=seed)
        gaps: list = []
        shares: list = []

        def loss(step, _, student=student, mixture=mixture, gaps=gaps, shares=shares, name=name):
            if step % inner == 0:
                now = perplexities(student)
                gaps.append((step, max(s / t for s, t in zip(now, best, strict=True))))
                if name == "ddk":
                    mixture.update(now, best)
                shares.append(float(mixture.shares[-1]))
            drawn = mixture.batch(192)
            x = torch.stack([data[d][0][i] for d, i in drawn])
            y = torch.stack([data[d][1][i] for d, i in drawn])
            return ps.linear_distill_loss(
                student.hidden(x), student.head, teacher.teacher(x), y, distill_weight=0.2, ce_weight=1.0
            )

        train(student, loss, 1, rounds * inner, seed=seed)
        ratios = [s / t for s, t in zip(perplexities(student), best, strict=True)]
        gaps.append((rounds * inner, max(ratios)))
        found[f"{name} curve"] = gaps
        found[f"{name}: weakest domain's perplexity / teacher's"] = max(ratios)
        found[f"{name}: mean over domains"] = sum(ratios) / len(ratios)
        found[f"{name}: mean share of the hardest domain"] = sum(shares) / len(shares)
    return found


def verdict(runs: list[dict]) -> tuple[bool, str]:
    name = "weakest domain's perplexity / teacher's"
    gap, mean = (
        better(runs, f"ddk: {name}", f"uniform: {name}"),
        better(runs, "ddk: mean over domains", "uniform: mean over domains"),
    )
    return shows(gap), (
        f"the weakest domain's ratio ends {gap[0]:.4f} ± {gap[1]:.4f} below the uniform mixture's, the mean over "
        f"domains {mean[0]:.4f} ± {mean[1]:.4f} below"
    )


def picture(axis, runs) -> None:
    names = {"uniform curve": "uniform", "ddk curve": "DDK"}
    curves(axis, runs, names, "step", "weakest domain: perplexity / teacher's")


def main(argv=None) -> dict:
    return report(__file__, CLAIM, experiment, verdict, picture, seeds=3, argv=argv)


if __name__ == "__main__":
    main()
