"""SquareHead (arXiv:2310.06927): fine-tuning a model of which three quarters of the weights are zero.

The tuning set is small (2,400 tokens): cross-entropy on it loses more than it recovers, as the row "not tuned" says.
"""

from __future__ import annotations

import copy

import potstill as ps
import torch
from common import Source, TinyLM, better, cross_entropy, draw, pretrained, report, shows, train, windows
from plots import bars
from potstill.methods.hidden import normalized_mse

CLAIM = "At 75 % sparsity, normalised squared errors of every layer recover more than cross-entropy does"
SPARSITY = 0.75
EPS = 2.0**-7


def pruned(model: TinyLM) -> tuple[TinyLM, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A copy without the smallest three quarters of each block's weights, and (weight, mask) to keep them away."""
    sparse = copy.deepcopy(model)
    masks = []
    for block in sparse.blocks:
        for part in block:
            if isinstance(part, torch.nn.Linear):
                size = part.weight.detach().abs()
                mask = size > size.flatten().kthvalue(int(SPARSITY * size.numel())).values
                part.weight.data.mul_(mask)
                masks.append((part.weight, mask))
    return sparse, masks


def experiment(seed: int, smoke: bool) -> dict:
    part = 20 if smoke else 1
    steps = 4 if smoke else 300
    source = Source(seed, order=3, sharpness=6.0)
    data = windows(draw(source, 1200 // part, 30, seed))
    few = windows(draw(source, 80 // part, 30, seed + 100))
    held_out = windows(draw(source, 150 // part, 30, seed + 500))
    dense = pretrained(seed, data, source.vocab, 48, 4 if smoke else 700, layers=2)
    found = {"dense: held-out loss": float(cross_entropy(dense, *held_out).detach())}
    for name in ("not tuned", "cross-entropy", "and logits", "and SquareHead"):
        student, masks = pruned(dense)

        def loss(_, i, student=student, name=name):
            x, y = few[0][i], few[1][i]
            if name == "cross-entropy":
                return cross_entropy(student, x, y)
            states = student.states(x)
            total = ps.linear_distill_loss(student.norm(states[-1]), student.head, dense.teacher(x), y, ce_weight=1.0)
            if name == "and SquareHead":
                with torch.no_grad():
                    wanted = dense.states(x)
                total = total + sum(normalized_mse(s, t, eps=EPS) for s, t in zip(states[1:], wanted[1:], strict=True))
            return total

        def keep_sparse(masks=masks):
            for weight, mask in masks:
                weight.data.mul_(mask)

        if name != "not tuned":
            train(student, loss, len(few[0]), steps, seed=seed, lr=3e-3, after=keep_sparse)
        zeros = sum(int((w == 0).sum()) for w, _ in masks) / sum(w.numel() for w, _ in masks)
        assert zeros >= SPARSITY - 1e-3
        found[f"{name}: held-out loss"] = float(cross_entropy(student, *held_out).detach())
    return found


def verdict(runs: list[dict]) -> tuple[bool, str]:
    best = "and SquareHead: held-out loss"
    gap, more = better(runs, best, "cross-entropy: held-out loss"), better(runs, best, "and logits: held-out loss")
    left = better(runs, "dense: held-out loss", best)
    return shows(gap), (
        f"held-out loss {gap[0]:.3f} ± {gap[1]:.3f} below cross-entropy's, {more[0]:.3f} ± {more[1]:.3f} below that "
        f"of logits alone, {left[0]:.3f} ± {left[1]:.3f} above the dense model's"
    )


def picture(axis, runs) -> None:
    names = ("dense", "not tuned", "cross-entropy", "and logits", "and SquareHead")
    labels = {f"{name}: held-out loss": name.replace("and ", "with ") for name in names}
    bars(axis, runs, labels, "held-out cross-entropy, nats")


def main(argv=None) -> dict:
    return report(__file__, CLAIM, experiment, verdict, picture, argv=argv)


if __name__ == "__main__":
    main()
