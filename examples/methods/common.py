"""What the miniatures share: sequences of a known distribution, a tiny model, training, and the report."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import potstill as ps
import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
Run = dict[str, Any]  # of one seed: numbers under their names, and curves [(x, y), ...]


class Source:
    """Sequences over V tokens whose next token depends on the last `order` through a random net of `rank` units.

    `sharpness` sets how certain it is. Everything about it is exact: an oracle.
    """

    def __init__(self, seed: int, vocab: int = 32, *, order: int = 2, rank: int = 24, sharpness: float = 2.5) -> None:
        g = torch.Generator().manual_seed(1_000 + seed)
        self.vocab, self.order, self.context = vocab, order, order
        self.inner = torch.randn(order, vocab, rank, generator=g) * (2 / order) ** 0.5
        self.outer = torch.randn(rank, vocab, generator=g) * sharpness / rank**0.5

    def logits(self, contexts: Tensor) -> Tensor:
        """[..., C] tokens, of which the last `order` count -> [..., V] log-probabilities."""
        last = contexts[..., -self.order :]
        inner = sum(self.inner[i, last[..., i]] for i in range(self.order))
        return (torch.tanh(inner) @ self.outer).log_softmax(-1)


class TinyLM(nn.Module):
    """A language model of the last `context` tokens: their embeddings, residual blocks of an MLP, a head [V, D]."""

    def __init__(self, seed: int, vocab: int, width: int, *, layers: int = 2, context: int = 2, inner: int = 2) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.vocab, self.context = vocab, context
        self.embed = nn.Embedding(vocab, width)
        self.mix = nn.Linear(context * width, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, inner * width), nn.GELU(), nn.Linear(inner * width, width)
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Parameter(torch.randn(vocab, width) / width**0.5)

    def states(self, contexts: Tensor) -> list[Tensor]:
        """The stream [..., D] before the first block and behind each."""
        x = self.mix(self.embed(contexts[..., -self.context :]).flatten(-2))
        found = [x]
        for block in self.blocks:
            x = x + block(x)
            found.append(x)
        return found

    def hidden(self, contexts: Tensor) -> Tensor:
        return self.norm(self.states(contexts)[-1])

    @torch.no_grad()
    def logits(self, contexts: Tensor) -> Tensor:
        return self.hidden(contexts) @ self.head.T

    def teacher(self, contexts: Tensor) -> ps.HiddenTeacher:
        with torch.no_grad():
            return ps.HiddenTeacher(self.hidden(contexts), ps.Head(self.head.detach()))


def draw(model: Any, n: int, length: int, seed: int, prompts: Tensor | None = None) -> Tensor:
    """n sequences [n, C + length] of a Source or TinyLM at T = 1, behind prompts [n, C] or uniform tokens."""
    g = torch.Generator().manual_seed(seed)
    given = torch.randint(0, model.vocab, (n, 3), generator=g) if prompts is None else prompts
    tokens = [given[:, i] for i in range(given.shape[1])]
    for _ in range(length):
        context = torch.stack(tokens[-given.shape[1] :], 1)
        tokens.append(torch.multinomial(model.logits(context).softmax(-1), 1, generator=g)[:, 0])
    return torch.stack(tokens, 1)


def windows(sequences: Tensor, context: int = 3) -> tuple[Tensor, Tensor]:
    """Every context [N, C] in sequences [n, L] and the token behind it [N]."""
    cut = sequences.unfold(1, context + 1, 1).reshape(-1, context + 1)
    return cut[:, :-1].contiguous(), cut[:, -1].contiguous()


def train(
    model: nn.Module, loss: Callable[[int, Tensor], Tensor], rows: int, steps: int, *, seed: int = 0, batch: int = 192,
    lr: float = 5e-3, decay: bool = True, probe: Callable[[int], None] | None = None, every: int = 50,
    after: Callable[[], None] | None = None,
) -> None:  # fmt: skip
    """Adam, with linear decay; loss(step, indices [batch] of `rows`); probe(step) now and then; after() each step."""
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(steps):
        if probe is not None and step % every == 0:
            probe(step)
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps) if decay else lr
        value = loss(step, torch.randint(0, rows, (batch,), generator=g))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if after is not None:
            after()
    if probe is not None:
        probe(steps)


def cross_entropy(model: TinyLM, contexts: Tensor, labels: Tensor) -> Tensor:
    return ps.linear_distill_loss(model.hidden(contexts), model.head, None, labels, distill_weight=0.0, ce_weight=1.0)


def pretrained(
    seed: int, data: tuple[Tensor, Tensor], vocab: int, width: int, steps: int, *, layers: int = 2, context: int = 3,
    lr: float = 5e-3,
) -> TinyLM:  # fmt: skip
    """A TinyLM trained on the contexts and labels by cross-entropy."""
    model = TinyLM(seed, vocab, width, layers=layers, context=context)
    train(model, lambda _, i: cross_entropy(model, data[0][i], data[1][i]), len(data[0]), steps, seed=seed, lr=lr)
    return model


@torch.no_grad()
def distance(student: TinyLM, teacher: Any, contexts: Tensor, divergence: str = "forward_kl") -> float:
    """Mean divergence of the student from a Source or TinyLM over contexts."""
    target = ps.LogitsTeacher(teacher.logits(contexts))
    return float(ps.linear_distill_loss(student.hidden(contexts), student.head, target, divergence=divergence))


def better(runs: Sequence[Run], smaller: str, larger: str) -> tuple[float, float]:
    """Mean over seeds of run[larger] - run[smaller], pair by pair, and its standard error."""
    gaps = [run[larger] - run[smaller] for run in runs]
    return statistics.fmean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.inf


def shows(gap: tuple[float, float]) -> bool:
    """The gap is positive by more than two standard errors."""
    return gap[0] > 2 * gap[1]


def report(
    file: str, claim: str, experiment: Callable[[int, bool], Run], verdict: Callable[[list[Run]], tuple[bool, str]],
    picture: Callable[[Any, list[Run]], None], *, seeds: int = 3, argv: Sequence[str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Runs the experiment for each seed, prints and writes what came out, and draws it.

    verdict: (whether the claim's direction shows, a sentence with the figures).  picture(axis, runs).
    """
    parser = argparse.ArgumentParser(description=claim)
    parser.add_argument("--smoke", action="store_true", help="A few steps of one seed, to see that everything runs.")
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="Folder of the JSON and the picture.")
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    begun = time.process_time()
    runs = [experiment(seed, asked.smoke) for seed in range(1 if asked.smoke else asked.seeds)]
    shown, sentence = verdict(runs)
    numbers = {name: [run[name] for run in runs] for name, value in runs[0].items() if isinstance(value, float | int)}
    figures = {
        name: [statistics.fmean(v), statistics.stdev(v) / math.sqrt(len(v)) if len(v) > 1 else None]
        for name, v in numbers.items()
    }
    name = Path(file).stem
    found = {
        "name": name, "claim": claim, "shows": shown, "sentence": sentence, "figures": figures, "seeds": len(runs),
        "smoke": asked.smoke, "seconds": round(time.process_time() - begun, 1),
    }  # fmt: skip
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    from plots import draw_picture

    draw_picture(asked.out / f"{name}.png", claim, lambda axis: picture(axis, runs), dpi=50 if asked.smoke else 110)
    print(f"{name}: {claim}")
    for label, (mean, error) in figures.items():
        print(f"  {label:<42} {mean:10.4f}" + ("" if error is None else f" ± {error:.4f}"))
    print(f"  {'shows' if shown else 'does not show'}: {sentence}  [{found['seconds']} s]")
    return found
