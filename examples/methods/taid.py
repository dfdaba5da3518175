"""TAID against forward KL when the teacher is far larger than the student (arXiv:2501.16937)."""

from __future__ import annotations

import potstill as ps
from common import Source, TinyLM, better, distance, draw, pretrained, report, shows, train, windows
from plots import curves
from potstill.methods.schedules import TAIDController

CLAIM = "With a large gap in capacity, TAID's student ends no further from the teacher than forward KL's"


def experiment(seed: int, smoke: bool) -> dict:
    part = 20 if smoke else 1
    steps = 4 if smoke else 400
    source = Source(seed, order=3, sharpness=4.0)
    data = windows(draw(source, 600 // part, 40, seed))
    held_out = windows(draw(source, 60 // part, 40, seed + 500))[0]
    teacher = pretrained(seed, data, source.vocab, 128, 4 if smoke else 300)
    found: dict = {}
    for name in ("forward_kl", "taid"):
        student = TinyLM(seed + 50, source.vocab, 6, layers=1, context=3)
        controller, curve = TAIDController(steps), []

        def loss(_, i, student=student, controller=controller, name=name):
            contexts = data[0][i]
            target: object = teacher.teacher(contexts)
            if name == "taid":
                t = controller.t
                target = ps.Mix([(1 - t, ps.Student()), (t, target)])
            value = ps.linear_distill_loss(
                student.hidden(contexts), student.head, target, divergence="soft_cross_entropy"
            )
            controller.update(value)
            return value

        def probe(step, student=student, curve=curve):
            curve.append((step, distance(student, teacher, held_out)))

        train(student, loss, len(data[0]), steps, seed=seed, probe=probe, every=max(1, steps // 16))
        found[f"{name} curve"] = curve
        found[f"{name}: KL to the teacher"] = curve[-1][1]
        found[f"{name}: reverse KL"] = distance(student, teacher, held_out, "reverse_kl")
        found[f"{name}: total variation"] = distance(student, teacher, held_out, "total_variation")
    return found


def verdict(runs: list[dict]) -> tuple[bool, str]:
    words = []
    for metric in ("KL to the teacher", "reverse KL", "total variation"):
        gap, error = better(runs, f"taid: {metric}", f"forward_kl: {metric}")
        words.append(f"{metric} lower by {gap:.4f} ± {error:.4f}")
    return shows(better(runs, "taid: KL to the teacher", "forward_kl: KL to the teacher")), "TAID: " + ", ".join(words)


def picture(axis, runs) -> None:
    names = {"forward_kl curve": "forward KL", "taid curve": "TAID"}
    curves(axis, runs, names, "step", "held-out KL(teacher || student), nats")


def main(argv=None) -> dict:
    return report(__file__, CLAIM, experiment, verdict, picture, argv=argv)


if __name__ == "__main__":
    main()
