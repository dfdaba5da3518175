"""FIRST (arXiv:2408.12168): a teacher's five best tokens carry nearly all of its mass, and teach calibration.

The students begin as one model that has read other text, and are tuned on a small set (1,800 tokens), on which labels
make them overconfident. Renormalised over the five there is no gradient outside them, and what the student puts there
is nobody's concern; the mass of the rest as a sixth entry is worth most of the difference.
"""

from __future__ import annotations

import copy
import tempfile

import potstill as ps
from common import Source, better, cross_entropy, draw, pretrained, report, shows, train, windows
from plots import bars
from potstill.methods.metrics import token_calibration, topk_mass

CLAIM = (
    "Five entries a token hold nearly all the mass, and a student of them is better calibrated than one of the labels"
)
VOCAB, K = 96, 5


def experiment(seed: int, smoke: bool) -> dict:
    part = 20 if smoke else 1
    steps = 4 if smoke else 300
    source = Source(seed, VOCAB, order=2, sharpness=8.0)
    teacher = pretrained(seed, windows(draw(source, 1500 // part, 30, seed)), VOCAB, 96, 4 if smoke else 600)
    few = draw(source, 60 // part, 30, seed + 100)
    contexts, labels = windows(few)
    held_out = windows(draw(source, 200 // part, 30, seed + 200))
    found: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        with ps.cache.Writer(folder, ps.cache.Spec(vocab_size=VOCAB, k=K, values="fp32")) as writer:
            top = ps.topk(teacher.logits(contexts), K)
            for i in range(len(few)):
                rows = slice(i * 30, (i + 1) * 30)
                writer.add(f"{i:03}", labels[rows], top[rows])
        cache = ps.cache.open(folder)
        cached, _ = cache.packed(sorted(cache.keys()))
        found["bytes a token, cached"] = cache.num_bytes / cache.num_tokens
    found["bytes a token, fp16 logits"] = 2.0 * VOCAB
    found["mass of the five"] = float(topk_mass(cached)[:, -1].mean())
    whole = ps.LogitsTeacher(teacher.logits(contexts))

    def distilled(target, tail="bucket"):
        return lambda s, i: ps.linear_distill_loss(s.hidden(contexts[i]), s.head, target(i), tail=tail)

    earlier = windows(draw(source, 200 // part, 30, seed + 300))
    begun = pretrained(seed + 50, earlier, VOCAB, 64, 4 if smoke else 100)  # as in the paper, a model that can read

    losses = {
        "labels": lambda s, i: cross_entropy(s, contexts[i], labels[i]),
        "five, renormalised": distilled(lambda i: cached[i], "renormalize"),
        "five and the rest": distilled(lambda i: cached[i]),
        "all logits": distilled(lambda i: ps.LogitsTeacher(whole.logits[i])),
    }
    for name, loss in losses.items():
        student = copy.deepcopy(begun)
        train(student, lambda _, i, s=student, loss=loss: loss(s, i), len(contexts), steps, seed=seed)
        measured = token_calibration(student.hidden(held_out[0]).detach(), student.head, held_out[1])
        found[f"{name}: calibration error"] = measured.ece
        found[f"{name}: accuracy"] = float((measured.accuracy * measured.counts).sum() / measured.counts.sum())
    return found


def verdict(runs: list[dict]) -> tuple[bool, str]:
    gap = better(runs, "five and the rest: calibration error", "labels: calibration error")
    both = shows(gap) and shows(better(runs, "labels: accuracy", "five and the rest: accuracy"))
    mass = sum(run["mass of the five"] for run in runs) / len(runs)
    return both and mass > 0.9, (
        f"the five hold {mass:.1%}; their student's calibration error is {gap[0]:.3f} ± {gap[1]:.3f} below that of the "
        "labels' student"
    )


def picture(axis, runs) -> None:
    names = ("labels", "five, renormalised", "five and the rest", "all logits")
    bars(axis, runs, {f"{name}: calibration error": name for name in names}, "expected calibration error")


def main(argv=None) -> dict:
    return report(__file__, CLAIM, experiment, verdict, picture, argv=argv)


if __name__ == "__main__":
    main()
