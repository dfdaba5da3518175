"""Minitron (arXiv:2407.14679): prune a model's depth and width, then retrain it by its own former logits.

The retraining set is small (4,500 tokens), so labels alone hardly help the pruned model.
"""

from __future__ import annotations

import copy

import potstill as ps
import torch
from common import Source, TinyLM, better, cross_entropy, draw, pretrained, report, shows, train, windows
from plots import curves
from torch import nn

CLAIM = "At equal tokens, retraining a pruned model on the whole one's logits beats labels and a fresh start"
LAYERS, KEPT = 4, 2


@torch.no_grad()
def pruned(model: TinyLM, contexts: torch.Tensor) -> TinyLM:
    """The first and last of four blocks, with the half of their inner units that is most active on `contexts`."""
    small = copy.deepcopy(model)
    states = small.states(contexts)
    kept = []
    for place in (0, LAYERS - 1):
        norm, up, act, down = small.blocks[place]
        active = act(up(norm(states[place]))).abs().mean(0) * down.weight.norm(dim=0)
        best = active.topk(len(active) // 2).indices.sort().values
        thin = nn.Sequential(norm, nn.Linear(up.in_features, len(best)), act, nn.Linear(len(best), down.out_features))
        thin[1].weight.copy_(up.weight[best])
        thin[1].bias.copy_(up.bias[best])
        thin[3].weight.copy_(down.weight[:, best])
        thin[3].bias.copy_(down.bias)
        kept.append(thin)
    small.blocks = nn.ModuleList(kept)
    return small.requires_grad_(True)


def experiment(seed: int, smoke: bool) -> dict:
    part = 20 if smoke else 1
    steps = 4 if smoke else 300
    source = Source(seed, order=3, sharpness=6.0)
    data = windows(draw(source, 1200 // part, 30, seed))
    few = windows(draw(source, 150 // part, 30, seed + 100))
    held_out = windows(draw(source, 150 // part, 30, seed + 500))
    whole = pretrained(seed, data, source.vocab, 48, 4 if smoke else 700, layers=LAYERS)
    found: dict = {"whole: held-out loss": float(cross_entropy(whole, *held_out).detach())}
    for name in ("logits", "labels", "labels, from scratch"):
        student = pruned(whole, few[0])
        if "scratch" in name:
            student = TinyLM(seed + 50, source.vocab, 48, layers=KEPT, context=3, inner=1)
        curve: list = []

        def loss(_, i, student=student, name=name):
            x, y = few[0][i], few[1][i]
            if name != "logits":
                return cross_entropy(student, x, y)
            return ps.linear_distill_loss(student.hidden(x), student.head, whole.teacher(x))

        def probe(step, student=student, curve=curve):
            curve.append((192 * step, float(cross_entropy(student, *held_out).detach())))

        train(student, loss, len(few[0]), steps, seed=seed, lr=3e-3, probe=probe, every=max(1, steps // 20))
        found[f"{name} curve"] = curve
        if name == "logits":
            found["pruned: held-out loss"] = curve[0][1]
            found["parameters left"] = sum(p.numel() for p in student.blocks.parameters()) / sum(
                p.numel() for p in whole.blocks.parameters()
            )
        found[f"{name}: held-out loss"] = curve[-1][1]
    return found


def verdict(runs: list[dict]) -> tuple[bool, str]:
    gaps = [better(runs, "logits: held-out loss", f"{n}: held-out loss") for n in ("labels", "labels, from scratch")]
    left = sum(run["parameters left"] for run in runs) / len(runs)
    return all(map(shows, gaps)), (
        f"with {left:.0%} of the blocks' parameters, {gaps[0][0]:.3f} ± {gaps[0][1]:.3f} nats below labels "
        f"and {gaps[1][0]:.3f} ± {gaps[1][1]:.3f} below a fresh start"
    )


def picture(axis, runs) -> None:
    names = {
        "logits curve": "pruned, logits",
        "labels curve": "pruned, labels",
        "labels, from scratch curve": "scratch",
    }
    curves(axis, runs, names, "tokens", "held-out cross-entropy, nats")


def main(argv=None) -> dict:
    return report(__file__, CLAIM, experiment, verdict, picture, argv=argv)


if __name__ == "__main__":
    main()
