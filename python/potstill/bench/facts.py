"""`python -m potstill.bench.facts` measures again what docs/measured.md states: products, centre, the eager rival."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch

from potstill import divergences
from potstill.bench import losses
from potstill.bench.measure import Variant, in_turns, peak_in_process

SHAPE: dict[str, Any] = dict(
    form="sparse", rows=1024, hidden=576, teacher_hidden=0, vocab=49_152, gather_first=True
)  # fmt: skip


def products() -> dict[str, float]:
    """GFLOP/s of [256, 1024] x [1024, 32768] by dtype."""
    x, w = torch.randn(256, 1024), torch.randn(32_768, 1024)
    calls: dict[str, Variant] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a, b = x.to(dtype), w.to(dtype)
        calls[str(dtype)] = lambda a=a, b=b: a @ b.T  # type: ignore[misc]
    flops = 2 * 256 * 1024 * 32_768
    return {name: flops / median(s) / 1e9 for name, s in in_turns(calls, 5).items()}


def summation(name: str, distance: float) -> tuple[float, float, float]:
    """(largest KL, largest error of the plain fp32 sum, of the centred one) over 64 rows of V = 5,000."""
    g = torch.Generator().manual_seed(1)
    z = torch.randn(64, 5000, generator=g) * 3
    lp, lq = z.log_softmax(-1), (z + distance * torch.randn(z.shape, generator=g)).log_softmax(-1)
    d = divergences.TABLE[name]

    def rows(a: torch.Tensor, b: torch.Tensor, centre: float) -> torch.Tensor:
        return (d.formula(a, b, *d.values)[0] + centre * (b.exp() - a.exp())).sum(-1)

    truth = rows(lp.double(), lq.double(), d.centre)
    plain, centred = ((rows(lp, lq, c) - truth).abs().max().item() for c in (0.0, d.centre))
    return truth.max().item(), plain, centred


def main() -> None:
    torch.set_num_threads(1)
    print("GFLOP/s, one thread:", {name: round(rate) for name, rate in products().items()})
    for name in ("forward_kl", "jsd", "symmetric_kl"):
        for distance in (1e-2, 1e-3, 1e-4):
            largest, plain, centred = summation(name, distance)
            print(f"{name}: value {largest:.1e}, error of the plain sum {plain:.1e}, centred {centred:.1e}")
    torch.set_num_threads(2)
    seconds = in_turns(losses.variants(**SHAPE), 5)
    peaks = {
        which: peak_in_process("potstill.bench.losses:variants", {**SHAPE, "choose": which}, 2)
        for which in seconds
        if which != "floor"
    }
    for name, taken in seconds.items():
        print(f"{name}: {median(taken):.2f} s", f"{peaks[name] / 1e6:.0f} MB" if name in peaks else "")


if __name__ == "__main__":
    main()
