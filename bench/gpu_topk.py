"""Top-k with the log-sum-exp on a GPU: each backend beside torch.topk and torch.logsumexp, checked before it is timed.

    python bench/gpu_topk.py [--out gpu_topk.json] [--seconds 60] [--tiny] [--device cuda]

The floor is one read of the logits at the bandwidth of a copy in the same run: half of the rows copied, which moves as
many bytes. Variants are interleaved call by call; medians, in milliseconds. The ids of every variant of ours are held
against a stable sort on the first and last rows, all log-probabilities against torch's. Rows go to JSON and CSV.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu_bench import Bench, options, run
from potstill import dispatch
from potstill.bench.measure import Variant
from potstill.rows import Side
from torch import Tensor


def fill(x: Tensor, kind: str) -> None:
    """x [R, V] gets rows of the kind, a few at a time."""
    for part in x.split(512):
        z = torch.randn(part.shape, device=x.device) * 3
        if kind == "ascending":
            z = z.sort(-1).values
        elif kind == "equal":
            z.fill_(1.0)
        elif kind == "third banned":
            z.masked_fill_(torch.rand_like(z) < 1 / 3, float("-inf"))
        part.copy_(z)


def torch_topk(x: Tensor, k: int, order: bool) -> tuple[Tensor, ...]:
    """(ids, log_probs, lse) with logsumexp in fp32, 1,024 rows at a time: at once it would take 5 GB more."""
    found = []
    for part in x.split(1024):
        top, lse = part.topk(k, -1, sorted=order), part.float().logsumexp(-1)
        found.append((top.indices.int(), top.values.float() - lse[:, None], lse))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def complaint(run: Callable[..., tuple[Tensor, ...]], x: Tensor, k: int) -> str:
    """Empty where ids are those of a stable descending sort, on 16 rows at either end of all of them."""
    ids = run(x, k, Side(x.shape[1]))[0].cpu()
    ends = torch.cat([torch.arange(16), torch.arange(16) + len(x) - 16]).clamp(0, len(x) - 1).to(x.device)
    order = x[ends].float().sort(dim=-1, descending=True, stable=True).indices[:, :k].cpu()
    return "" if (order == ids[ends.cpu()]).all() else "ids are not those of a stable sort"


def topk_case(bench: Bench, rows: int, vocab: int, k: int, dtype: torch.dtype, kind: str, rivals: bool) -> None:
    label = f"topk {str(dtype)[6:]} [{rows}, {vocab}] k={k} {kind}"
    x = torch.empty(rows, vocab, dtype=dtype, device=bench.device)
    fill(x, kind)
    half = torch.empty_like(x[: rows // 2])
    variants: dict[str, Variant] = {"torch": lambda: torch_topk(x, k, True)}
    if rivals:
        variants["torch sorted=False"] = lambda: torch_topk(x, k, False)
    for kernel in dispatch.kernels("topk"):
        facts = dispatch.Facts("topk", x.device, dtype, vocab, k)
        if kernel.backend in ("torch", *bench.banned) or kernel.refuses(facts) is not None or label in bench.done:
            continue
        row = {"case": label, "variant": kernel.backend}
        try:
            if bad := complaint(kernel.run, x, k):
                bench.rows.append(row | {"wrong": bad})
                continue
        except Exception as failure:
            bench.rows.append(row)
            bench.failed(row, failure)
            continue
        variants[kernel.backend] = lambda run=kernel.run: run(x, k, Side(vocab))  # type: ignore[misc]

    def value(out: tuple[Tensor, ...]) -> Tensor:
        return out[1].sort(-1).values

    about = dict(kernel="topk", mode="forward", rows=rows, vocab=vocab, k=k, dtype=str(dtype)[6:], kind=kind)
    bench.case(label, variants, lambda: half.copy_(x[: rows // 2]), value, 1e-5, **about)


def main() -> int:
    chosen = options(__doc__, "gpu_topk.json", 60.0)
    rows, vocab = (34, 3000) if chosen.tiny else (8192, 151936)
    bf16, fp32 = torch.bfloat16, torch.float32
    cases = [
        (rows, 64, bf16, "gaussian"),
        *((rows, 64, bf16, kind) for kind in ("ascending", "equal", "third banned")),
        (rows // 2, 64, fp32, "gaussian"),
        *((rows, k, bf16, "gaussian") for k in (512, 1024)),
        (rows // 32 * 2, 64, bf16, "gaussian"),
    ]

    def section(number: int) -> Callable[[Bench], None]:
        some, k, dtype, kind = cases[number]
        return lambda bench: topk_case(bench, some, vocab, k, dtype, kind, rivals=number == 0)

    return run(chosen, 11, {f"case {number}": section(number) for number in range(len(cases))})


if __name__ == "__main__":
    raise SystemExit(main())
