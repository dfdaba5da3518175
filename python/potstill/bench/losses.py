"""Losses on CPU: forward and backward beside eager PyTorch, torch.compile and the matrix products alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from potstill.bench.measure import Variant
from potstill.extraction import topk
from potstill.losses import linear_distill_loss
from potstill.teachers import Head, HiddenTeacher, TopK

SHAPES = [
    # name, form, rows, student hidden, teacher hidden, vocabulary
    ("dense teacher, V=151,936", "dense", 512, 512, 1024, 151_936),
    ("cached top-64, V=151,936", "sparse", 512, 512, 0, 151_936),
]
SMOKE = [
    ("dense teacher, V=4,001", "dense", 64, 32, 48, 4_001),
    ("cached top-64, V=4,001", "sparse", 64, 32, 0, 4_001),
]


def eager_dense(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
    """Forward KL as one writes it in plain PyTorch."""
    log_q = (hidden @ weight.T).log_softmax(-1)
    with torch.no_grad():
        log_p = (teacher_hidden @ teacher_weight.T).log_softmax(-1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()


def eager_sparse(hidden: Tensor, weight: Tensor, teacher: TopK) -> Tensor:
    """Forward KL with a rest bucket in plain PyTorch: logits, log-softmax, gather, the rest's mass.

    Gathering first and subtracting the log-sum-exp takes the same time and a third more memory (docs/measured.md).
    """
    return bucket_kl(torch.log_softmax(hidden @ weight.T, dim=-1).gather(-1, teacher.ids.long()), teacher)


def eager_gather_first(hidden: Tensor, weight: Tensor, teacher: TopK) -> Tensor:
    """The same value from the gathered logits and the log-sum-exp."""
    logits = hidden @ weight.T
    return bucket_kl(logits.gather(-1, teacher.ids.long()) - logits.logsumexp(-1, keepdim=True), teacher)


def bucket_kl(log_q: Tensor, teacher: TopK) -> Tensor:
    """log_q [rows, K] of the teacher's entries -> forward KL over them and the rest, its mass by subtraction."""
    log_q_rest = torch.log1p(-log_q.exp().sum(-1).clamp(max=1 - 1e-6))
    assert teacher.log_rest is not None
    inside = (teacher.log_probs.exp() * (teacher.log_probs - log_q)).sum(-1)
    return (inside + teacher.log_rest.exp() * (teacher.log_rest - log_q_rest)).mean()


def variants(
    form: str,
    rows: int,
    hidden: int,
    teacher_hidden: int,
    vocab: int,
    compiled: bool = False,
    gather_first: bool = False,
) -> dict[str, Variant]:
    """name -> forward and backward of one loss, returning its value; "floor" runs the matrix products alone.

    Random rows, about as peaked as a language model's. The gradients are dropped after each call.
    """
    g = torch.Generator().manual_seed(0)
    h = torch.randn(rows, hidden, generator=g).requires_grad_()
    w = (torch.randn(vocab, hidden, generator=g) * 2 / hidden**0.5).requires_grad_()
    if form == "dense":
        th = torch.randn(rows, teacher_hidden, generator=g)
        tw = torch.randn(vocab, teacher_hidden, generator=g) * 2 / teacher_hidden**0.5
        teacher: Any = HiddenTeacher(th, Head(tw))
        eager = lambda: eager_dense(h, w, th, tw)  # noqa: E731
        plain, arguments = eager_dense, (h, w, th, tw)
    else:
        teacher = topk(torch.randn(rows, vocab, generator=g) * 2, 64)
        eager = lambda: eager_sparse(h, w, teacher)  # noqa: E731
        plain, arguments = eager_sparse, (h, w, teacher)  # type: ignore[assignment]

    def step(loss: Any) -> Variant:
        def run() -> float:
            value = loss()
            value.backward()
            h.grad = w.grad = None
            return float(value.detach())

        return run

    logits, dh, dw = torch.empty(rows, vocab), torch.empty(rows, hidden), torch.empty(vocab, hidden)

    @torch.no_grad()
    def floor() -> None:
        for i in range(0, rows, 256):
            chunk = logits[: len(h[i : i + 256])]
            if form == "dense":
                torch.mm(th[i : i + 256], tw.T, out=chunk)
            torch.mm(h[i : i + 256], w.T, out=chunk)
            torch.mm(chunk, w, out=dh[i : i + 256])
            dw.addmm_(chunk.T, h[i : i + 256], beta=0 if i == 0 else 1)

    found = {
        "potstill": step(lambda: linear_distill_loss(h, Head(w), teacher)),
        "eager": step(eager),
        "floor": floor,
    }
    if gather_first:
        assert form == "sparse"
        found["eager, gather first"] = step(lambda: eager_gather_first(h, w, teacher))
    if compiled:
        faster = torch.compile(plain)
        found["torch.compile"] = step(lambda: faster(*arguments))
    return found
