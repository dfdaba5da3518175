"""MiniPLM (arXiv:2410.17215): pre-training on the half of a corpus that a large model likes most above a small one.

Half of the corpus is the language; a quarter is one token over and over, which both models know by heart, and a quarter
noise, which neither can. With an easy kind that only the large model masters (two tokens in turn, four refrains) the
score prefers that kind to the language: it rewards what the small model lacks, and the direction did not show.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import potstill as ps
import torch
from common import Source, better, cross_entropy, draw, pretrained, report, shows, train, windows
from common import TinyLM as Model
from plots import bars
from potstill.methods.scoring import ScoreDifference

CLAIM = (
    "At equal tokens, the better half by log p_teacher - log p_reference gives a lower held-out loss than a random half"
)
LENGTH = 24


def corpus(source: Source, seed: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences [4 n, 3 + LENGTH] and their kind: 0 of the source (half), 1 a token over and over, 2 noise."""
    g = torch.Generator().manual_seed(seed)
    easy = torch.randint(0, 4, (n, 1), generator=g).expand(-1, 3 + LENGTH)
    noise = torch.randint(0, source.vocab, (n, 3 + LENGTH), generator=g)
    kinds = torch.tensor([0, 0, 1, 2]).repeat_interleave(n)
    return torch.cat([draw(source, 2 * n, LENGTH, seed), easy, noise]), kinds


def score(model: Model, sequences: torch.Tensor, folder: Path) -> ps.cache.Cache:
    """A cache of the sequences' own log-probabilities, as `potstill score` writes it."""
    spec = ps.cache.Spec(vocab_size=model.vocab, k=1, values="fp32", token_log_probs=True)
    with ps.cache.Writer(folder, spec) as writer:
        for i, tokens in enumerate(sequences):
            contexts, following = windows(tokens[None])
            labels = torch.cat([following, following.new_full((1,), -100)])
            contexts = torch.cat([contexts, tokens[None, -3:]])
            writer.add(f"{i:05}", tokens[2:], ps.topk(model.logits(contexts), 1, ids=labels))
    return ps.cache.open(folder)


def experiment(seed: int, smoke: bool) -> dict:
    part = 20 if smoke else 1
    steps, n = (4, 10) if smoke else (350, 150)
    source = Source(seed, order=3, sharpness=4.0)
    sequences, kinds = corpus(source, seed, n)
    everything = windows(sequences)
    held_out = windows(draw(source, 150 // part, LENGTH, seed + 900))
    large = windows(corpus(source, seed + 300, 4 if smoke else 800)[0])  # the teacher has read far more
    teacher = pretrained(seed, large, source.vocab, 96, 4 if smoke else 600)
    reference = pretrained(seed + 1, everything, source.vocab, 8, 4 if smoke else 200, layers=1)
    with tempfile.TemporaryDirectory() as folder:
        caches = [score(m, sequences, Path(folder, name)) for m, name in ((teacher, "t"), (reference, "r"))]
        kept = np.array([int(key) for key in ScoreDifference(*caches).kept(0.5)])
    chance = np.random.default_rng(seed).permutation(len(sequences))[: len(kept)]
    found: dict = {f"share of kind {k} kept": float((kinds[kept] == k).float().mean()) for k in range(3)}
    for name, rows in (("random half", chance), ("best half", kept), ("everything", np.arange(len(sequences)))):
        data = windows(sequences[torch.from_numpy(np.sort(rows))])
        student = Model(seed + 50, source.vocab, 48, context=3)
        train(
            student, lambda _, i, s=student, d=data: cross_entropy(s, d[0][i], d[1][i]), len(data[0]), steps, seed=seed
        )
        found[f"{name}: held-out loss"] = float(cross_entropy(student, *held_out).detach())
    return found


def verdict(runs: list[dict]) -> tuple[bool, str]:
    gap = better(runs, "best half: held-out loss", "random half: held-out loss")
    rest = better(runs, "best half: held-out loss", "everything: held-out loss")
    return shows(gap), (
        f"held-out loss {gap[0]:.3f} ± {gap[1]:.3f} nats below the random half's, {rest[0]:.3f} ± {rest[1]:.3f} below "
        "that of everything"
    )


def picture(axis, runs) -> None:
    names = ("everything", "random half", "best half")
    bars(axis, runs, {f"{name}: held-out loss": name for name in names}, "held-out cross-entropy, nats")


def main(argv=None) -> dict:
    return report(__file__, CLAIM, experiment, verdict, picture, argv=argv)


if __name__ == "__main__":
    main()
