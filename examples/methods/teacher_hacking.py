"""Teacher hacking (arXiv:2502.02671): an oracle, a teacher of its sequences, a student distilled from the teacher.

As set up here (the teacher read 3,000 sequences of the oracle) neither curve turns. With a teacher overfitted to 250
sequences both turned, and on regenerated data more: the student passed a smoother point on its way to the teacher.
"""

from __future__ import annotations

import potstill as ps
import torch
from common import Source, TinyLM, cross_entropy, draw, pretrained, report, train, windows
from plots import curves
from potstill.methods.metrics import sequence_kl_exact_tokens, teacher_hacking

CLAIM = (
    "On a fixed small set the distance to the oracle turns up while that to the teacher falls; on new data it does not"
)
LENGTH = 16


@torch.no_grad()
def sequence_distance(model, student, sequences) -> float:
    """KL(model || student) of the LENGTH tokens behind the prompt, estimated on sequences drawn from `model`."""
    contexts, _ = windows(sequences)
    target = ps.LogitsTeacher(model.logits(contexts))
    kl = ps.linear_distill_loss(student.hidden(contexts), student.head, target, reduction="none")
    kl = kl.reshape(len(sequences), LENGTH)
    return sequence_kl_exact_tokens(kl, torch.ones_like(kl, dtype=torch.bool))[0]


def experiment(seed: int, smoke: bool) -> dict:
    part = 20 if smoke else 1
    steps, fixed = (20, 20) if smoke else (600, 30)
    oracle = Source(seed, order=3, sharpness=4.0)
    data = windows(draw(oracle, 3000 // part, LENGTH, seed))
    teacher = pretrained(seed, data, oracle.vocab, 32, 20 if smoke else 500)
    golden_set = draw(oracle, 150 // part, LENGTH, seed + 900)
    train_set = draw(teacher, fixed, LENGTH, seed + 100)
    held_out = draw(teacher, 150 // part, LENGTH, seed + 200)
    pool = draw(teacher, fixed if smoke else 4000, LENGTH, seed + 300)
    found: dict = {}
    for name in ("fixed", "regenerated"):
        student = TinyLM(seed + 50, oracle.vocab, 64, context=3)
        start = windows(
            draw(oracle, 60 // part, LENGTH, seed + 400)
        )  # a student that has seen some of the oracle, as in the paper
        train(student, lambda _, i, s=student, d=start: cross_entropy(s, d[0][i], d[1][i]), len(start[0]), steps // 10)
        contexts = windows(train_set if name == "fixed" else pool)[0]
        proxy, golden, unseen = [], [], []

        def probe(step, student=student, proxy=proxy, golden=golden, unseen=unseen, name=name):
            proxy.append((step, sequence_distance(teacher, student, train_set if name == "fixed" else held_out)))
            unseen.append((step, sequence_distance(teacher, student, held_out)))
            golden.append((step, sequence_distance(oracle, student, golden_set)))

        def loss(_, i, student=student, contexts=contexts):
            x = contexts[i]
            return ps.linear_distill_loss(student.hidden(x), student.head, teacher.teacher(x))

        train(student, loss, len(contexts), steps, seed=seed, probe=probe, every=max(1, steps // 14))
        read = teacher_hacking([y for _, y in proxy], [y for _, y in golden])
        found[f"{name}: proxy curve"], found[f"{name}: golden curve"] = proxy, golden
        found[f"{name}: proxy, first"], found[f"{name}: proxy, last"] = proxy[0][1], proxy[-1][1]
        found[f"{name}: proxy on unseen, last"] = unseen[-1][1]
        found[f"{name}: golden, least"], found[f"{name}: golden, last"] = golden[read.turn][1], golden[-1][1]
        found[f"{name}: golden rises by"] = read.rise
        found[f"{name}: proxy falls meanwhile by"] = read.proxy_fall
    return found


def verdict(runs: list[dict]) -> tuple[bool, str]:
    def mean(name):
        return sum(run[name] for run in runs) / len(runs)

    def share(name):
        return mean(f"{name}: golden rises by") / mean(f"{name}: golden, least")

    hacked = all(r["fixed: golden rises by"] > 0 and r["fixed: proxy falls meanwhile by"] > 0 for r in runs)
    return hacked and share("fixed") > 0.02 and share("regenerated") < 0.25 * share("fixed"), (
        f"fixed data: golden ends {share('fixed'):.1%} above its least value while the proxy falls; "
        f"regenerated: {share('regenerated'):.1%}"
    )


def picture(axis, runs) -> None:
    names = {
        "fixed: golden curve": "golden, fixed data", "regenerated: golden curve": "golden, regenerated",
        "fixed: proxy curve": "proxy, fixed data", "regenerated: proxy curve": "proxy, regenerated",
    }  # fmt: skip
    curves(axis, runs, names, "step", "sequence KL, nats")


def main(argv=None) -> dict:
    return report(__file__, CLAIM, experiment, verdict, picture, seeds=3, argv=argv)


if __name__ == "__main__":
    main()
