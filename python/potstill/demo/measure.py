"""The fused sparse loss against eager PyTorch: time taken in turns, memory each in a process of its own.

`python -m potstill.demo.measure WHICH ROWS HIDDEN VOCAB K` prints the peak bytes of one forward and backward
of WHICH ("fused" or "eager") above what was resident just before it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from potstill.losses import linear_distill_loss
from potstill.teachers import Head, TopK

STEPS = ("fused", "eager")


@dataclass(frozen=True)
class Shape:
    """rows of hidden states [rows, hidden] through a head [vocab, hidden] against k teacher entries a row."""

    rows: int
    hidden: int
    vocab: int
    k: int


@dataclass(frozen=True)
class Comparison:
    """Medians in seconds, peaks in bytes, of one forward and backward; `loss_difference` is relative."""

    shape: Shape
    fused_seconds: float
    eager_seconds: float
    fused_bytes: int
    eager_bytes: int
    loss_difference: float
    repeats: int

    @property
    def time_ratio(self) -> float:
        return self.fused_seconds / self.eager_seconds

    @property
    def memory_ratio(self) -> float:
        return self.fused_bytes / self.eager_bytes


def eager_loss(hidden: Tensor, weight: Tensor, teacher: TopK) -> Tensor:
    """Forward KL with a rest bucket as one writes it in plain PyTorch: logits, log-softmax, gather, the
    rest's mass.
    """
    log_q = torch.log_softmax(hidden @ weight.T, dim=-1)  # [rows, vocab]
    log_q = log_q.gather(-1, teacher.ids.long())  # [rows, k]
    log_q_rest = torch.log1p(-log_q.exp().sum(-1).clamp(max=1 - 1e-6))
    assert teacher.log_rest is not None
    inside = (teacher.log_probs.exp() * (teacher.log_probs - log_q)).sum(-1)
    outside = teacher.log_rest.exp() * (teacher.log_rest - log_q_rest)
    return (inside + outside).mean()


def fused_loss(hidden: Tensor, weight: Tensor, teacher: TopK) -> Tensor:
    return linear_distill_loss(hidden, Head(weight), teacher)


def case(shape: Shape, seed: int = 0) -> tuple[Tensor, Tensor, TopK]:
    """(hidden, head weight, teacher rows): random, the teacher as peaked as a language model (3 nats of
    entropy).
    """
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(shape.rows, shape.hidden, generator=g).requires_grad_()
    weight = (torch.randn(shape.vocab, shape.hidden, generator=g) / shape.hidden**0.5).requires_grad_()
    log_probs, _ = (torch.randn(shape.rows, shape.k + 1, generator=g) * 2).log_softmax(-1).sort(descending=True)
    ids = torch.randint(shape.vocab // shape.k, (shape.rows, shape.k), generator=g)
    ids = ids + torch.arange(shape.k) * (shape.vocab // shape.k)  # no entry twice in a row
    return hidden, weight, TopK(ids.int(), log_probs[:, :-1].contiguous(), log_probs[:, -1].contiguous())


def one_step(which: str, hidden: Tensor, weight: Tensor, teacher: TopK) -> float:
    """Loss and both gradients, which are dropped again; the loss."""
    hidden.grad = weight.grad = None
    loss = (fused_loss if which == "fused" else eager_loss)(hidden, weight, teacher)
    loss.backward()
    value = float(loss.detach())
    hidden.grad = weight.grad = None
    return value


def compare(shape: Shape, *, repeats: int = 5, note: Callable[[str], None] = lambda _: None) -> Comparison:
    """Times both in this process, taking turns, and measures each one's memory in a process of its own."""
    inputs = case(shape)
    losses = {which: one_step(which, *inputs) for which in STEPS}  # also the warm-up
    seconds: dict[str, list[float]] = {which: [] for which in STEPS}
    for turn in range(repeats):
        for which in STEPS if turn % 2 else STEPS[::-1]:
            start = time.perf_counter()
            one_step(which, *inputs)
            seconds[which].append(time.perf_counter() - start)
        note(f"turn {turn + 1} of {repeats}")
    del inputs
    peaks = {which: _peak_in_process(which, shape) for which in STEPS}
    return Comparison(
        shape,
        median(seconds["fused"]),
        median(seconds["eager"]),
        peaks["fused"],
        peaks["eager"],
        abs(losses["fused"] - losses["eager"]) / abs(losses["eager"]),
        repeats,
    )


def _peak_in_process(which: str, shape: Shape) -> int:
    words = [
        which,
        str(shape.rows),
        str(shape.hidden),
        str(shape.vocab),
        str(shape.k),
        str(torch.get_num_threads()),
    ]
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-m", "potstill.demo.measure", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    if done.returncode:
        raise RuntimeError(f"the memory measurement of the {which} loss failed:\n{done.stderr[-2000:]}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def _resident() -> tuple[int, int]:
    """(resident bytes, peak resident bytes) of this process."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    status = Path("/proc/self/status")
    if not status.exists():
        return peak, peak
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if line.startswith("Vm"))
    return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024


def peak_bytes(which: str, shape: Shape) -> int:
    """Peak resident bytes of one step of `which` above what was resident before it. For a process of its own.

    A small step first brings in the libraries and thread pools, which are no part of the loss's memory.
    """
    one_step(which, *case(Shape(8, shape.hidden, 512, min(shape.k, 64))))
    inputs = case(shape)
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # resets the peak to what is resident
    before = _resident()[0]
    one_step(which, *inputs)
    return _resident()[1] - before


if __name__ == "__main__":
    chosen, rows, hidden, vocab, k, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(json.dumps(peak_bytes(chosen, Shape(int(rows), int(hidden), int(vocab), int(k)))))
