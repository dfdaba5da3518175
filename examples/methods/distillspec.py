"""DistillSpec (arXiv:2310.08461): distilling a draft model raises how often speculative decoding accepts its tokens."""

from __future__ import annotations

import copy

import potstill as ps
import torch
from common import Source, better, draw, pretrained, report, shows, train, windows
from plots import bars
from potstill.methods.speculative import acceptance, block_tokens, verify_draft

CLAIM = "A distilled draft is accepted more often, and real rejection sampling accepts as often as sum min(p, q) says"
DIVERGENCES = {
    "forward KL": "forward_kl", "reverse KL": "reverse_kl", "JSD": ps.divergences.jsd(teacher_weight=0.5),
    "total variation": "total_variation",
}  # fmt: skip
GAMMA = 3


@torch.no_grad()
def accepted(draft, target, contexts, seed: int) -> tuple[float, float, float]:
    """Rate by the formula, rate of the first drafted token by sampling, and tokens a round, over contexts [N, 3]."""
    g = torch.Generator().manual_seed(seed)
    rate = float(acceptance(draft.logits(contexts), target.logits(contexts)).mean())
    tokens, q = [contexts[:, i] for i in range(3)], []
    for _ in range(GAMMA):
        q.append(draft.logits(torch.stack(tokens[-3:], 1)).softmax(-1))
        tokens.append(torch.multinomial(q[-1], 1, generator=g)[:, 0])
    made = torch.stack(tokens, 1)
    p = torch.stack([target.logits(made[:, i : i + 3]).softmax(-1) for i in range(GAMMA + 1)], 1)
    count, _ = verify_draft(made[:, 3:], torch.stack(q, 1), p, generator=g)
    return rate, float((count >= 1).double().mean()), float((count + 1).double().mean())


def experiment(seed: int, smoke: bool) -> dict:
    part = 20 if smoke else 1
    steps = 4 if smoke else 250
    source = Source(seed, order=3, sharpness=4.0)
    data = windows(draw(source, 800 // part, 30, seed))
    target = pretrained(seed, data, source.vocab, 96, 4 if smoke else 500)
    draft = pretrained(seed + 1, data, source.vocab, 12, 4 if smoke else 250, layers=1)
    prompts = windows(draw(target, 300 // part, 30, seed + 100))[0]
    found: dict = {}
    worst = 0.0
    for name in ("before", *DIVERGENCES):
        student = copy.deepcopy(draft)
        if name != "before":
            held: dict = {}

            def loss(step, i, student=student, name=name, held=held):
                if step % 50 == 0:  # half the target's sequences, half the draft's own, drawn anew
                    both = [draw(m, 60 // part, 12, seed + step) for m in (target, student)]
                    held["x"] = windows(torch.cat(both))[0]
                x = held["x"][i % len(held["x"])]
                return ps.linear_distill_loss(
                    student.hidden(x), student.head, target.teacher(x), divergence=DIVERGENCES[name]
                )

            train(student, loss, 1 << 20, steps, seed=seed, lr=3e-3)
        rate, sampled, tokens = accepted(student, target, prompts, seed + 7)
        found[f"{name}: acceptance"], found[f"{name}: by rejection sampling"] = rate, sampled
        found[f"{name}: tokens a round"], found[f"{name}: tokens by the formula"] = tokens, block_tokens(rate, GAMMA)
        worst = max(worst, abs(sampled - rate) / (rate * (1 - rate) / len(prompts)) ** 0.5)
    found["largest deviation of the sampling, in sigma"] = worst
    return found


def verdict(runs: list[dict]) -> tuple[bool, str]:
    gaps = {name: better(runs, "before: acceptance", f"{name}: acceptance") for name in DIVERGENCES}
    sigma = max(run["largest deviation of the sampling, in sigma"] for run in runs)
    said = ", ".join(f"{name} +{gap[0]:.3f} ± {gap[1]:.3f}" for name, gap in gaps.items())
    return all(map(shows, gaps.values())) and sigma < 3.5, (
        f"acceptance after distilling: {said}; sampling agrees within {sigma:.1f} sigma of {len(runs) * 5} comparisons"
    )


def picture(axis, runs) -> None:
    bars(axis, runs, {f"{name}: acceptance": name for name in ("before", *DIVERGENCES)}, "acceptance")


def main(argv=None) -> dict:
    return report(__file__, CLAIM, experiment, verdict, picture, seeds=3, argv=argv)


if __name__ == "__main__":
    main()
