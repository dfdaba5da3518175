"""Distances of two Gram matrices, S S^T and T T^T, with the gradient in the forward pass and no N x N matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from potstill.arguments import check_choice

DISTANCES = ("squared", "l1", "cosine")
FORMS = ("auto", "tiles", "moments")


def gram(s: Tensor, t: Tensor, distance: str, form: str = "auto", tile_rows: int = 256) -> Tensor:
    """0-dim in the dtype of s [N, D_s], t [N, D_t] (fp32 or fp64); see `relation.gram_loss`. Gradient to s alone."""
    check_choice("distance", distance, DISTANCES)
    check_choice("form", form, FORMS)
    if tile_rows < 1:
        raise ValueError(f"tile_rows={tile_rows} must be at least 1")
    if form == "moments" and distance == "l1":
        raise ValueError("form='moments' with distance='l1': no identity over D x D gives it; use form='tiles'")
    n, d, e = len(s), s.shape[1], t.shape[1]
    if form == "auto":  # products of N^2 and N D, those of the moments in fp64
        form = "moments" if distance != "l1" and n > 2 * (d + e) else "tiles"
    out: Tensor = _Gram.apply(s, t.detach(), distance, form, tile_rows)
    return out


class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: Tensor, t: Tensor, distance: str, form: str, rows: int) -> Tensor:
        want = ctx.needs_input_grad[0]
        with torch.autocast(s.device.type, enabled=False):
            if distance == "cosine":
                sums, own, other = (_moment_sums if form == "moments" else _tile_sums)(s, t, want, rows)
                value, grad = _cosine(s, sums, own, other)
            elif form == "moments":
                (ss, tt, st), own, other = _moment_sums(s, t, want, rows)
                value = ss + tt - 2 * st
                grad = None if own is None or other is None else (4 * (own - other)).to(s.dtype)
            else:
                value, grad = _tiles(s, t, distance, want, rows)
        ctx.save_for_backward(*(() if grad is None else (grad,)))
        return value.to(s.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
        return (ctx.saved_tensors[0] * given if ctx.saved_tensors else None), None, None, None, None


def _tiles(s: Tensor, t: Tensor, distance: str, want: bool, rows: int) -> tuple[Tensor, Tensor | None]:
    """Sum of f(S S^T - T T^T), and 2 f'(.) S: f' is symmetric as the matrices are."""
    value = torch.zeros((), dtype=torch.float64, device=s.device)
    grad = torch.zeros_like(s) if want else None
    for at in range(0, len(s), rows):
        piece = slice(at, at + rows)
        gap = torch.addmm(s[piece] @ s.t(), t[piece], t.t(), alpha=-1)
        value += (gap.abs() if distance == "l1" else gap * gap).sum(dtype=torch.float64)
        if grad is not None:
            torch.mm(gap.sign_() if distance == "l1" else gap, s, out=grad[piece])
    if grad is not None:
        grad *= 2 if distance == "l1" else 4
    return value, grad


Sums = tuple[tuple[Tensor, Tensor, Tensor], Tensor | None, Tensor | None]


def _tile_sums(s: Tensor, t: Tensor, want: bool, rows: int) -> Sums:
    """(|S S^T|^2, |T T^T|^2, <S S^T, T T^T>) in fp64, S S^T S and T T^T S [N, D_s]."""
    ss, tt, st = (torch.zeros((), dtype=torch.float64, device=s.device) for _ in range(3))
    own, other = (torch.empty_like(s), torch.empty_like(s)) if want else (None, None)
    for at in range(0, len(s), rows):
        piece = slice(at, at + rows)
        a, b = s[piece] @ s.t(), t[piece] @ t.t()
        if own is not None and other is not None:
            torch.mm(a, s, out=own[piece])
            torch.mm(b, s, out=other[piece])
        ss += (a * a).sum(dtype=torch.float64)
        tt += (b * b).sum(dtype=torch.float64)
        st += (a * b).sum(dtype=torch.float64)
    return (ss, tt, st), own, other


def _moment_sums(s: Tensor, t: Tensor, want: bool, rows: int) -> Sums:
    """The same from S^T S, T^T T and S^T T, in fp64 throughout: near S = T they cancel."""
    rows = max(rows, 1024)
    d, e = s.shape[1], t.shape[1]
    a, b, c = (torch.zeros(x, dtype=torch.float64, device=s.device) for x in ((d, d), (e, e), (d, e)))
    for x, y in zip(s.split(rows), t.split(rows), strict=True):
        x, y = x.double(), y.double()
        a.addmm_(x.t(), x)
        b.addmm_(y.t(), y)
        c.addmm_(x.t(), y)
    own = other = None
    if want:
        own, other = (torch.empty(s.shape, dtype=torch.float64, device=s.device) for _ in range(2))
        for at in range(0, len(s), rows):
            piece = slice(at, at + rows)
            torch.mm(s[piece].double(), a, out=own[piece])
            torch.mm(t[piece].double(), c.t(), out=other[piece])
    return (a.square().sum(), b.square().sum(), c.square().sum()), own, other


def _cosine(
    s: Tensor, sums: tuple[Tensor, Tensor, Tensor], own: Tensor | None, other: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """1 - <G_s, G_t> / (|G_s| |G_t|) and its gradient; 1 and 0 where one matrix is 0."""
    ss, tt, st = sums
    some = (ss > 0) & (tt > 0)
    lengths = torch.where(some, ss.sqrt() * tt.sqrt(), 1.0)
    value = torch.where(some, (lengths - st) / lengths, 1.0)
    if own is None or other is None:
        return value, None
    slope = own * (st / (lengths * torch.where(some, ss, 1.0))) - other / lengths
    return value, torch.where(some, 2 * slope, 0.0).to(s.dtype)
