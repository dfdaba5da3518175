"""Losses on a GPU: row kernels and losses beside eager PyTorch and torch.compile.

    python bench/gpu_losses.py [--out gpu_losses.json] [--seconds 150] [--tiny] [--device cuda]

Variants of one case are interleaved, call by call, and reported as medians with their peak memory beyond the
inputs. A variant whose result differs from the first one's is reported as wrong, without a time. Floors: for
rows a copy of the same bytes, for losses the matrix products alone. Cases past the time are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import potstill as ps
import torch
import torch.nn.functional as F
from gpu_bench import Bench, options, run
from potstill import dispatch, divergences
from potstill.bench.measure import Variant
from potstill.rows import RowSpec, Side
from torch import Tensor

K = 64


def row_case(bench: Bench, name: str, form: str, x: Tensor, y: Tensor, entries: tuple[Tensor, ...]) -> None:
    """One row kernel with a gradient, on each backend; the floor copies what must be read and written."""
    rows, vocab = x.shape
    side = Side(vocab)
    spec = RowSpec(divergences.get(name), side, side if form == "dense" else None)
    parts = (y,) if form == "dense" else entries
    coef, grad, other = (
        torch.full((rows,), 1 / rows, device=x.device),
        torch.empty_like(x),
        torch.empty_like(y),
    )

    def variant(run: Callable[..., Tensor]) -> Variant:
        return lambda: run(x, *parts, coef, None, spec, grad)

    def copy() -> None:
        grad.copy_(x)
        if form == "dense":
            other.copy_(y)

    facts = dispatch.Facts(f"{form}_rows", x.device, x.dtype, vocab, K, name)
    served = [k for k in dispatch.kernels(facts.op) if k.refuses(facts) is None]
    variants = {k.backend: variant(k.run) for k in sorted(served, key=lambda k: k.rank)}
    label = f"{form} rows {name} {x.dtype} [{rows}, {vocab}]"
    about = dict(kernel=f"{form}_rows_{name}", mode="full", rows=rows, vocab=vocab, dtype=str(x.dtype)[6:])
    bench.case(label, variants, copy, lambda out: torch.cat([out[0], grad.float().abs().sum(1)]), 0.02, **about)


def row_cases(bench: Bench, rows: int, vocab: int) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        x = (torch.randn(rows, vocab, device=bench.device) * 3).to(dtype)
        y = (x.float() + torch.randn(x.shape, device=bench.device)).to(dtype)
        log_probs = y.float().log_softmax(-1)
        top = log_probs.topk(K, -1)
        log_rest = log_probs.scatter(1, top.indices, float("-inf")).logsumexp(-1)
        entries = (top.indices.int(), top.values.contiguous(), log_rest)
        del log_probs, top
        for name in ("forward_kl", "jsd"):
            for form in ("dense", "sparse"):
                row_case(bench, name, form, x, y, entries)


def block_cases(bench: Bench, rows: int, vocab: int) -> None:
    """Triton launch shapes, to choose DENSE_BLOCK and SPARSE_BLOCK by."""
    from potstill.kernels import triton_rows

    chosen = triton_rows.launch_shape
    x = (torch.randn(rows, vocab, device=bench.device) * 3).bfloat16()
    y = (x + torch.randn_like(x)).contiguous()
    grad, coef, side = torch.empty_like(x), torch.ones(rows, device=bench.device), Side(vocab)
    try:
        for name in ("forward_kl", "jsd"):
            spec = RowSpec(divergences.get(name), side, side)
            variants = {}
            for block, warps in (
                (2048, 8),
                (1024, 4),
                (2048, 4),
                (4096, 8),
                (4096, 16),
                (8192, 16),
                (8192, 32),
            ):
                shape = {"BLOCK": block, "num_warps": warps, "maxnreg": min(255, 65536 // (32 * warps))}

                def run(shape: dict[str, int] = shape, spec: RowSpec = spec) -> Tensor:
                    triton_rows.launch_shape = lambda columns, largest: shape
                    return triton_rows.dense_rows(x, y, coef, None, spec, grad)

                variants[f"BLOCK={block} warps={warps}"] = run
            label = f"triton dense blocks {name} bf16 [{rows}, {vocab}]"
            about = dict(kernel="triton_blocks", mode="full", rows=rows, vocab=vocab, dtype="bfloat16")
            bench.case(label, variants, lambda: grad.copy_(x), lambda out: out[0], 1e-4, **about)
    finally:
        triton_rows.launch_shape = chosen


def eager_loss(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    student = (hidden @ weight.t()).float().log_softmax(-1)
    with torch.no_grad():
        teacher = (teacher_hidden @ teacher_weight.t()).float().log_softmax(-1)
    return F.kl_div(student, teacher, log_target=True, reduction="sum") / len(hidden)


def eager_sparse_loss(hidden: Tensor, weight: Tensor, ids: Tensor, log_probs: Tensor, log_rest: Tensor) -> Tensor:
    log_q = (hidden @ weight.t()).float().log_softmax(-1)
    inside = log_q.gather(1, ids)
    rest = log_q.scatter(1, ids, float("-inf")).logsumexp(-1)
    kl = (log_probs.exp() * (log_probs - inside)).sum(-1) + log_rest.exp() * (log_rest - rest)
    return kl.sum() / len(hidden)


def loss_cases(bench: Bench, rows: int, vocab: int, width: int, compiled: bool) -> None:
    """Losses with both gradients; the floor is their matrix products in bf16."""

    def make(*shape: int) -> Tensor:
        return (torch.randn(*shape, device=bench.device) / shape[-1] ** 0.25).bfloat16()

    hidden, weight = make(rows, width).requires_grad_(), make(vocab, width).requires_grad_()
    t_hidden, t_weight = make(rows, width), make(vocab, width)

    def step(loss: Callable[[], Tensor]) -> Variant:
        def run() -> Tensor:
            hidden.grad = weight.grad = None
            value = loss()
            value.backward()
            return value.detach()

        return run  # fmt: skip

    def values(out: Tensor) -> Tensor:
        assert hidden.grad is not None and weight.grad is not None
        return torch.stack([out.float(), hidden.grad.float().norm(), weight.grad.float().norm()])

    logits = make(min(rows, 2048), vocab)

    def products(teacher: bool) -> Variant:
        def run() -> None:
            with torch.no_grad():
                for i in range(0, rows, len(logits)):
                    h = hidden[i : i + len(logits)]
                    for _ in range(2 if teacher else 1):
                        torch.mm(h, weight.t(), out=logits[: len(h)])
                    logits[: len(h)] @ weight
                    logits[: len(h)].t() @ h

        return run  # fmt: skip

    teacher = ps.HiddenTeacher(t_hidden, ps.Head(t_weight))
    variants = {
        "eager": step(lambda: eager_loss(hidden, weight, t_hidden, t_weight)),
        "potstill": step(lambda: ps.linear_distill_loss(hidden, ps.Head(weight), teacher)),
    }
    if bench.device.type == "cuda":
        variants["potstill cuda"] = step(
            lambda: ps.linear_distill_loss(hidden, ps.Head(weight), teacher, backend="cuda")
        )
    if compiled:
        fused = torch.compile(eager_loss)
        variants["torch.compile"] = step(lambda: fused(hidden, weight, t_hidden, t_weight))
    label = f"linear_distill_loss bf16 rows={rows} V={vocab} D={width}"
    about: dict[str, Any] = dict(mode="full", rows=rows, vocab=vocab, hidden=width, dtype="bfloat16")
    bench.case(label, variants, products(True), values, 0.02, kernel="linear_distill_loss_dense", **about)

    with torch.no_grad():
        found = ps.linear_topk(t_hidden, ps.Head(t_weight), K)
    ids = found.ids.long()
    variants = {
        "eager": step(lambda: eager_sparse_loss(hidden, weight, ids, found.log_probs, found.log_rest)),
        "potstill": step(lambda: ps.linear_distill_loss(hidden, ps.Head(weight), found)),
    }
    if bench.device.type == "cuda":
        variants["potstill cuda"] = step(lambda: ps.linear_distill_loss(hidden, ps.Head(weight), found, backend="cuda"))
    about |= dict(kernel="linear_distill_loss_sparse", k=K)
    bench.case(f"{label} TopK k={K}", variants, products(False), values, 0.02, **about)


def main() -> int:
    chosen = options(__doc__, "gpu_losses.json", 150.0)
    rows, vocab, tokens, width = (8, 1000, 16, 32) if chosen.tiny else (2048, 151936, 8192, 2048)

    sections: dict[str, Callable[[Bench], None]] = {
        "losses": lambda bench: loss_cases(bench, tokens, vocab, width, compiled=not chosen.tiny),
        "rows": lambda bench: row_cases(bench, rows, vocab),
    }
    if chosen.device.type == "cuda":
        sections["blocks"] = lambda bench: block_cases(bench, rows, vocab)
    return run(chosen, 15, sections)


if __name__ == "__main__":
    raise SystemExit(main())
