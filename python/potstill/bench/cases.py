"""Inputs of the loss benchmark, the loss in plain PyTorch, and the matrix products alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from potstill.extraction import topk
from potstill.losses import linear_distill_loss
from potstill.teachers import Head, HiddenTeacher, TopK

CHUNK = 256  # rows of the floor's logit buffer and of the rivals that take a chunk size
WIDENED = "eager on fp32 copies"
FRESH = "products alone, outputs allocated anew"
Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Shape:
    """form "dense" (a teacher's hidden states) or "sparse" (cached top-k rows); dtype is a name of torch's."""

    form: str
    rows: int
    hidden: int
    teacher_hidden: int
    vocab: int
    dtype: str = "float32"


class Case:
    """Random rows, about as peaked as a language model's, and the loss on them by name."""

    def __init__(self, shape: Shape, seed: int = 0):
        g = torch.Generator().manual_seed(seed)
        self.shape, dtype = shape, getattr(torch, shape.dtype)

        def make(rows: int, columns: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(rows, columns, generator=g) * scale).to(dtype)

        self.h = make(shape.rows, shape.hidden).requires_grad_()
        self.w = make(shape.vocab, shape.hidden, 2 / shape.hidden**0.5).requires_grad_()
        self.th = self.tw = None
        if shape.form == "dense":
            self.th = make(shape.rows, shape.teacher_hidden)
            self.tw = make(shape.vocab, shape.teacher_hidden, 2 / shape.teacher_hidden**0.5)
            self.teacher: Any = HiddenTeacher(self.th, Head(self.tw))
        else:
            rows = [topk(torch.randn(n, shape.vocab, generator=g) * 2, 64) for n in chunk_sizes(shape.rows)]
            rests = [r.log_rest for r in rows if r.log_rest is not None]
            ids, log_probs = torch.cat([r.ids for r in rows]), torch.cat([r.log_probs for r in rows])
            self.teacher = TopK(ids, log_probs, torch.cat(rests))

    def losses(self) -> dict[str, Loss]:
        """name -> the loss of this case; the rivals of other packages are in rivals.py."""
        found = {"potstill": self.potstill, "eager": self.eager}
        if self.shape.dtype in ("bfloat16", "float16"):
            found[WIDENED] = self.eager_widened
        return found

    def potstill(self) -> Tensor:
        return linear_distill_loss(self.h, Head(self.w), self.teacher)

    def eager(self) -> Tensor:
        return self.plain(self.h, self.w, self.teacher if self.th is None else (self.th, self.tw))

    def eager_widened(self) -> Tensor:
        """Eager on fp32 copies of all inputs: what one does where 16-bit products are slow."""
        teacher = self.teacher
        if self.th is not None and self.tw is not None:
            teacher = self.th.float(), self.tw.float()
        return self.plain(self.h.float(), self.w.float(), teacher)

    @property
    def plain(self) -> Callable[..., Tensor]:
        return eager_sparse if self.th is None else eager_dense

    def truth(self) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, its gradient by h, by w) in fp64."""
        h, w = (x.detach().double().requires_grad_() for x in (self.h, self.w))
        teacher: Any = self.teacher
        if self.th is not None:
            assert self.tw is not None
            teacher = self.th.double(), self.tw.double()
        loss = self.plain(h, w, teacher)
        dh, dw = torch.autograd.grad(loss, (h, w))
        return loss.detach(), dh, dw

    def floors(self) -> dict[str, Callable[[], None]]:
        """name -> the matrix products of forward and backward with nothing between them; 16-bit inputs also as fp32.

        A floor writes into buffers and gradients made beforehand. FRESH allocates them in the call, as any loss must
        that hands its gradients out: what it adds is the first touch of new pages.
        """
        found = {"floor": self._floor(getattr(torch, self.shape.dtype))}
        if self.shape.dtype != "float32":
            found["floor, fp32"] = self._floor(torch.float32)
        found[FRESH] = self._floor(torch.float32 if self.shape.dtype != "float64" else torch.float64, fresh=True)
        return found

    def _floor(self, dtype: torch.dtype, fresh: bool = False) -> Callable[[], None]:
        tensors = [None if x is None else x.detach().to(dtype) for x in (self.h, self.w, self.th, self.tw)]
        h, w, th, tw = tensors
        assert h is not None and w is not None

        def outputs() -> tuple[Tensor, Tensor, Tensor]:
            return h.new_empty(CHUNK, len(w)), torch.empty_like(h), torch.empty_like(w)

        kept = None if fresh else outputs()

        @torch.no_grad()
        def run() -> None:
            logits, dh, dw = kept or outputs()
            for i in range(0, len(h), CHUNK):
                chunk = logits[: len(h[i : i + CHUNK])]
                if th is not None and tw is not None:
                    torch.mm(th[i : i + CHUNK], tw.T, out=chunk)
                torch.mm(h[i : i + CHUNK], w.T, out=chunk)
                torch.mm(chunk, w, out=dh[i : i + CHUNK])
                dw.addmm_(chunk.T, h[i : i + CHUNK], beta=0 if i == 0 else 1)

        return run


def chunk_sizes(rows: int) -> list[int]:
    return [min(CHUNK, rows - i) for i in range(0, rows, CHUNK)]


def eager_dense(hidden: Tensor, weight: Tensor, teacher: tuple[Tensor, Tensor]) -> Tensor:
    """Forward KL as one writes it in plain PyTorch; 16-bit logits go to fp32 first, as trainers do."""
    log_q = widened(hidden @ weight.T).log_softmax(-1)
    with torch.no_grad():
        log_p = widened(teacher[0] @ teacher[1].T).log_softmax(-1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()


def eager_sparse(hidden: Tensor, weight: Tensor, teacher: TopK) -> Tensor:
    """Forward KL with a rest bucket in plain PyTorch: logits, log-softmax, gather, the rest's mass.

    Gathering first and subtracting the log-sum-exp takes the same time and a third more memory (docs/measured.md).
    """
    return bucket_kl(widened(hidden @ weight.T).log_softmax(-1).gather(-1, teacher.ids.long()), teacher)


def eager_gather_first(hidden: Tensor, weight: Tensor, teacher: TopK) -> Tensor:
    """The same value from the gathered logits and the log-sum-exp."""
    logits = widened(hidden @ weight.T)
    return bucket_kl(logits.gather(-1, teacher.ids.long()) - logits.logsumexp(-1, keepdim=True), teacher)


def bucket_kl(log_q: Tensor, teacher: TopK) -> Tensor:
    """log_q [rows, K] of the teacher's entries -> forward KL over them and the rest, its mass by subtraction."""
    log_q_rest = torch.log1p(-log_q.exp().sum(-1).clamp(max=1 - 1e-6))
    assert teacher.log_rest is not None
    inside = (teacher.log_probs.exp() * (teacher.log_probs - log_q)).sum(-1)
    return (inside + teacher.log_rest.exp() * (teacher.log_rest - log_q_rest)).mean()


def widened(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
