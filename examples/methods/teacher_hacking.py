"""Teacher hacking (arXiv:2502.02671): an oracle, a teacher of its sequences, a student distilled from the teacher.

Teacher and student have read the oracle, the teacher ten times as much. Then the student learns the teacher's
distributions for long: on ten sequences, some two thousand times over, or on four thousand. The proxy is its distance
to the teacher on what it trains on (of the many: on others), the golden one that to the oracle on the oracle's text.
"""

from __future__ import annotations

import copy

import potstill as ps
import torch
from common import Source, draw, pretrained, report, train, windows
from plots import curves
from potstill.methods.metrics import sequence_kl_exact_tokens, teacher_hacking

CLAIM = (
    "On a fixed small set the distance to the oracle turns up while that to the teacher falls; on new data it does not"
)
LENGTH, FIXED = 16, 10  # tokens behind a prompt; sequences of the fixed set


@torch.no_grad()
def sequence_distance(model, student, sequences) -> float:
    """KL(model || student) of the LENGTH tokens behind the prompt, estimated on sequences drawn from `model`."""
    contexts, _ = windows(sequences)
    target = ps.LogitsTeacher(model.logits(contexts))
    kl = ps.linear_distill_loss(student.hidden(contexts), student.head, target, reduction="none")
    kl = kl.reshape(len(sequences), LENGTH)
    return sequence_kl_exact_tokens(kl, torch.ones_like(kl, dtype=torch.bool))[0]


def experiment(seed: int, smoke: bool) -> dict:
    part = 40 if smoke else 1
    steps = 4 if smoke else 1600
    oracle = Source(seed, order=3, sharpness=4.0)
    data = windows(draw(oracle, 3000 // part, LENGTH, seed))
    few = windows(draw(oracle, 300 // part, LENGTH, seed + 400))
    teacher = pretrained(seed, data, oracle.vocab, 32, 4 if smoke else 500)
    golden_set = draw(oracle, 150 // part, LENGTH, seed + 900)
    train_set = draw(teacher, FIXED, LENGTH, seed + 100)
    held_out = draw(teacher, 150 // part, LENGTH, seed + 200)
    pool = draw(teacher, 4000 // part, LENGTH, seed + 300)
    begun = pretrained(seed + 50, few, oracle.vocab, 64, 4 if smoke else 150)  # both have read the oracle
    found: dict = {"teacher: distance to the oracle": sequence_distance(oracle, teacher, golden_set)}
    for name in ("fixed", "regenerated"):
        student = copy.deepcopy(begun)
        contexts = windows(train_set if name == "fixed" else pool)[0]
        proxy, golden, unseen = [], [], []

        def probe(step, student=student, proxy=proxy, golden=golden, unseen=unseen, name=name):
            unseen.append((step, sequence_distance(teacher, student, held_out)))
            golden.append((step, sequence_distance(oracle, student, golden_set)))
            proxy.append((step, sequence_distance(teacher, student, train_set)) if name == "fixed" else unseen[-1])

        def loss(_, i, student=student, contexts=contexts):
            x = contexts[i]
            return ps.linear_distill_loss(student.hidden(x), student.head, teacher.teacher(x))

        train(student, loss, len(contexts), steps, seed=seed, decay=False, probe=probe, every=max(1, steps // 20))
        read = teacher_hacking([y for _, y in proxy], [y for _, y in golden])
        found[f"{name}: proxy curve"], found[f"{name}: golden curve"] = proxy, golden
        found[f"{name}: proxy, first"], found[f"{name}: proxy, last"] = proxy[0][1], proxy[-1][1]
        found[f"{name}: proxy on unseen, last"] = unseen[-1][1]
        found[f"{name}: golden, first"] = golden[0][1]
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
    axis.legend(loc="center right", bbox_to_anchor=(1.0, 0.37))  # between the golden curves and the proxies


def main(argv=None) -> dict:
    return report(__file__, CLAIM, experiment, verdict, picture, seeds=3, argv=argv)


if __name__ == "__main__":
    main()
