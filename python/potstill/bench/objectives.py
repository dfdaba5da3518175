"""What the loss must hold beside its time: every divergence alike, exact gradients near convergence, bounded memory."""

from __future__ import annotations

from dataclasses import asdict, replace
from statistics import median
from typing import Any

import torch

from potstill import divergences
from potstill.bench.cases import CHUNK, Case, Shape
from potstill.bench.losses import Note, Row, extra_peak, title
from potstill.bench.measure import Variant, in_turns, spread
from potstill.losses import distill_loss, linear_distill_loss
from potstill.teachers import Head, HiddenTeacher, LogitsTeacher


def divergence_rows(shape: Shape, *, repeats: int) -> list[Row]:
    """Every divergence over forward KL, in turns: the whole loss, and the row kernel alone on logits at hand."""
    case = Case(shape)
    logits = torch.randn(shape.rows, shape.vocab).requires_grad_()
    teacher: Any = case.teacher if case.th is None else LogitsTeacher(torch.randn(shape.rows, shape.vocab))

    def whole(name: str) -> Variant:
        def run() -> None:
            linear_distill_loss(case.h, Head(case.w), case.teacher, divergence=name).backward()
            case.h.grad = case.w.grad = None

        return run

    def kernel(name: str) -> Variant:
        def run() -> None:
            distill_loss(logits, teacher, divergence=name).backward()
            logits.grad = None

        return run

    names = divergences.names()
    losses = in_turns({name: whole(name) for name in names}, repeats)
    kernels = in_turns({name: kernel(name) for name in names}, repeats)
    return [
        {
            "case": title(shape), "divergence": name,
            "loss_over_forward_kl": median(losses[name]) / median(losses["forward_kl"]),
            "kernel_over_forward_kl": median(kernels[name]) / median(kernels["forward_kl"]),
            "loss_spread": spread(losses[name]), "kernel_spread": spread(kernels[name]), **asdict(shape),
        }
        for name in names
    ]  # fmt: skip


def precision_rows(vocab: int = 32_000, rows: int = 64, hidden: int = 256, distance: float = 0.3) -> list[Row]:
    """Gradient errors of bf16 inputs near convergence (mean KL about 0.04), against fp64 on the same bf16 numbers."""
    g = torch.Generator().manual_seed(0)
    h = torch.randn(rows, hidden, generator=g).bfloat16().requires_grad_()
    teacher_weight = (torch.randn(vocab, hidden, generator=g) * 2 / hidden**0.5).bfloat16()
    noise = torch.randn(vocab, hidden, generator=g) * distance / hidden**0.5
    w = (teacher_weight.float() + noise).bfloat16().requires_grad_()
    th = h.detach()

    def plain(hidden: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Logits in the inputs' dtype, the loss in `dtype`."""
        lq = (hidden @ weight.T).to(dtype).log_softmax(-1)
        lp = (th.to(hidden.dtype) @ teacher_weight.to(hidden.dtype).T).to(dtype).log_softmax(-1)
        return torch.nn.functional.kl_div(lq, lp, log_target=True, reduction="none").sum(-1).mean()

    def ours(precise: bool) -> torch.Tensor:
        return linear_distill_loss(h, Head(w), HiddenTeacher(th, Head(teacher_weight)), precise=precise)

    h64, w64 = h.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    truth = plain(h64, w64, torch.float64)
    expected = torch.autograd.grad(truth, (h64, w64))
    losses = {
        "potstill, precise=True": lambda: ours(True),
        "potstill": lambda: ours(False),
        "eager, bf16 logits, loss in fp32": lambda: plain(h, w, torch.float32),
        "eager, all in bf16": lambda: plain(h, w, torch.bfloat16),
    }
    found = []
    for name, loss in losses.items():
        value = loss()
        got = torch.autograd.grad(value, (h, w))
        off = [float(((a.double() - b).norm() / b.norm()).detach()) for a, b in zip(got, expected, strict=True)]
        found.append({
            "variant": name, "kl": truth.item(), "value_error": abs(value.item() / truth.item() - 1),
            "hidden_gradient_error": off[0], "head_gradient_error": off[1], "vocab": vocab, "rows": rows,
        })  # fmt: skip
    return found


def memory_rows(shape: Shape, lengths: tuple[int, ...], *, compiled: bool, note: Note) -> list[Row]:
    """Peak bytes by number of rows, gradients left out, beside 2 chunk x V buffers of fp32; narrow hidden states."""
    from potstill.bench.losses import all_losses

    names = all_losses(Case(replace(shape, rows=8, vocab=128)), compiled)[0]
    found = []
    for rows in lengths:
        for name in names:
            if name == "eager" and rows * shape.vocab * 4 * 6 > 16e9:
                note(f"memory: eager at {rows:,} rows would need more than 16 GB: not run")
                continue
            sized = replace(shape, rows=rows)
            peak = extra_peak(sized, name, compiled)
            buffers = (2 if shape.form == "dense" else 1) * CHUNK * shape.vocab * 4
            found.append({
                "case": title(sized), "variant": name, "peak_bytes": peak, "over_buffers": peak / buffers,
                **asdict(sized),
            })  # fmt: skip
    return found
