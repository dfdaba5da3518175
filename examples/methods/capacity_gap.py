"""The capacity gap (arXiv:2311.07052): for a student of one size, a larger teacher is not always a better one.

Read the verdict with care: beyond a teacher of width 32 the students differ by less than 0.005 nats, and the best width
is chosen after the fact.
"""

from __future__ import annotations

import statistics

import potstill as ps
from common import Source, TinyLM, cross_entropy, draw, pretrained, report, train, windows

CLAIM = "For a fixed student the best teacher is neither the smallest nor the largest"
WIDTHS = (8, 16, 32, 64, 128)
STUDENT = 12


def experiment(seed: int, smoke: bool) -> dict:
    part = 20 if smoke else 1
    steps = 4 if smoke else 180
    source = Source(seed, order=3, sharpness=6.0)
    data = windows(draw(source, 500 // part, 30, seed))
    few = windows(draw(source, 60 // part, 30, seed + 100))
    held_out = windows(draw(source, 150 // part, 30, seed + 500))
    found: dict = {}
    for width in WIDTHS:
        teacher = pretrained(seed, data, source.vocab, width, steps)
        student = TinyLM(seed + 50, source.vocab, STUDENT, layers=1, context=3)

        def loss(_, i, student=student, teacher=teacher):
            x, y = few[0][i], few[1][i]
            return ps.linear_distill_loss(
                student.hidden(x), student.head, teacher.teacher(x), y, distill_weight=0.5, ce_weight=0.5
            )

        train(student, loss, len(few[0]), steps, seed=seed)
        found[f"teacher of width {width}: its loss"] = float(cross_entropy(teacher, *held_out).detach())
        found[f"teacher of width {width}: student's loss"] = float(cross_entropy(student, *held_out).detach())
    return found


def means(runs: list[dict], what: str) -> list[float]:
    return [statistics.fmean(run[f"teacher of width {w}: {what}"] for run in runs) for w in WIDTHS]


def verdict(runs: list[dict]) -> tuple[bool, str]:
    losses = means(runs, "student's loss")
    best = WIDTHS[losses.index(min(losses))]
    inside = best not in (WIDTHS[0], WIDTHS[-1])
    gaps = [
        r[f"teacher of width {WIDTHS[-1]}: student's loss"] - r[f"teacher of width {best}: student's loss"]
        for r in runs
    ]
    sure = inside and len(gaps) > 1 and statistics.fmean(gaps) > 2 * statistics.stdev(gaps) / len(gaps) ** 0.5
    return sure, (
        f"a student of width {STUDENT} ends best ({min(losses):.3f} nats) under the teacher of width {best}; "
        f"the largest gives {losses[-1]:.3f}, the smallest {losses[0]:.3f}"
    )


def picture(axis, runs) -> None:
    for what, colour in (("student's loss", "#0f766e"), ("its loss", "#9ca3af")):
        label = "student" if what != "its loss" else "teacher itself"
        axis.plot(WIDTHS, means(runs, what), "o-", color=colour, label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(WIDTHS, [str(width) for width in WIDTHS])
    axis.set_xlabel("width of the teacher")
    axis.set_ylabel("held-out cross-entropy, nats")
    axis.legend()


def main(argv=None) -> dict:
    return report(__file__, CLAIM, experiment, verdict, picture, seeds=3, argv=argv)


if __name__ == "__main__":
    main()
