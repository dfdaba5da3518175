"""A small student beside a small teacher, for recipes: two layers, V = 300, H = 64; and the two checks of every row."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import potstill as ps
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

V, H, E, B, T, HEADS = 300, 64, 48, 6, 8, 2


class Net(nn.Module):
    """Embeddings, two causal layers, a head; gives every layer's states and attention maps."""

    def __init__(self, width: int, sharpness: float):
        super().__init__()
        self.embed = nn.Embedding(V, width)
        self.mix = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(2))
        self.head = nn.Parameter(sharpness * torch.randn(V, width) / width**0.5)

    def forward(self, tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        x = self.embed(tokens)
        layers, maps = [x], []
        later = torch.ones(T, T, dtype=torch.bool).triu(1)
        for mix, up, down in zip(self.mix, self.up, self.down, strict=True):
            q, k, v = (
                y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in mix(F.layer_norm(x, x.shape[-1:])).chunk(3, -1)
            )
            a = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(later, -math.inf).softmax(-1)
            x = x + (a @ v).transpose(1, 2).flatten(-2)
            x = x + down(F.gelu(up(F.layer_norm(x, x.shape[-1:]))))
            layers.append(x)
            maps.append(a)
        return layers, maps


class World:
    """layers [3 x (B, T, H)], maps [2 x (B, heads, T, T)], weight (V, H); t_layers (E wide), t_maps, t_weight; extras.

    In fp64 the layers and maps are leaves; in fp32 they come from the net, which trains. With `rounded` every number is
    made in fp64 and rounded to it before it is taken to `dtype`, leaves too: the same inputs in two dtypes.
    """

    def __init__(
        self, dtype: torch.dtype, extras: dict[str, tuple[int, ...]], seed: int = 0, rounded: torch.dtype | None = None
    ):
        torch.manual_seed(seed)
        self.dtype, self.rounded, self.seed = dtype, rounded, seed
        made = dtype if rounded is None else torch.float64
        self.net, self.teacher_net = Net(H, 1.0).to(made), Net(E, 3.0).to(made).requires_grad_(False)
        self.tokens = torch.randint(0, V, (B, T))
        self.labels = torch.cat([self.tokens[:, 1:], torch.full((B, 1), -100)], 1)
        self.labels[0, 2], self.labels[3, 4:] = -100, -100
        self.keep = self.labels != -100
        self.classes = torch.arange(B) % 3
        self.t_layers, self.t_maps = ([self.given(x) for x in xs] for xs in self.teacher_net(self.tokens))
        self.t_hidden, self.t_weight = self.t_layers[-1], self.given(self.teacher_net.head)
        self.teacher = ps.HiddenTeacher(self.t_hidden, ps.Head(self.t_weight))
        self.zt = self.t_hidden @ self.t_weight.t()
        self.extras = {
            name: nn.Parameter(self.given(0.3 * torch.randn(shape, dtype=made))) for name, shape in extras.items()
        }
        self.constants: dict[object, Tensor] = {}
        self.refresh(leaves=dtype == torch.float64 or rounded is not None)

    def given(self, x: Tensor) -> Tensor:
        """A number that the formula is given: rounded, then in the dtype of this world."""
        return (x if self.rounded is None else x.to(self.rounded)).to(self.dtype)

    def refresh(self, leaves: bool = False) -> None:
        """The student's states anew."""
        self.layers, self.maps = self.net(self.tokens)
        self.weight = self.net.head
        if leaves:
            self.layers, self.maps = (
                [self.given(x.detach()).requires_grad_() for x in xs] for xs in (self.layers, self.maps)
            )
            if self.rounded is not None:
                self.weight = self.given(self.weight.detach()).requires_grad_()

    @property
    def hidden(self) -> Tensor:
        return self.layers[-1]

    @property
    def z(self) -> Tensor:
        return self.hidden @ self.weight.t()

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.layers, *self.maps, self.weight, *self.extras.values()]

    def step(self, loss: Tensor, rate: float = 1e-3) -> None:
        """One step by the signs of the gradients (Adam's first; torch.optim takes seconds to import its compiler)."""
        weights = [*self.net.parameters(), *self.extras.values()]
        with torch.no_grad():
            for p, g in zip(weights, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
                if g is not None:
                    p.sub_(rate * g.sign())

    def constant(self, *shape: int, name: object = None) -> Tensor:
        """Random numbers that stay the same for a name and shape."""
        key = (name, shape)
        if key not in self.constants:
            g = torch.Generator().manual_seed(zlib.crc32(repr((self.seed, key)).encode()))
            self.constants[key] = self.given(torch.randn(*shape, generator=g, dtype=torch.float64))
        return self.constants[key]

    def features(self, layer: int = -1, width: int = 16) -> Tensor:
        """[B, width] of the student, from a layer's mean over positions."""
        return self.layers[layer].mean(1) @ self.constant(H, width, name=("student", layer % 3))

    def t_features(self, layer: int = -1, width: int = 16) -> Tensor:
        """[B, width] of the teacher."""
        return self.t_layers[layer].mean(1) @ self.constant(E, width, name=("teacher", layer % 3))

    def __getitem__(self, name: str) -> Tensor:
        return self.extras[name]


@dataclass(frozen=True)
class Case:
    """A recipe, its formula in plain torch, and the parameters that both learn beside the net's."""

    call: Callable[[World], Tensor]
    plain: Callable[[World], Tensor]
    extras: dict[str, tuple[int, ...]] = field(default_factory=dict)
    falls: bool = True


def check_formula(case: Case) -> None:
    """Value and gradient to states, maps, head and extras: equal in fp64 to 1e-10."""
    w = World(torch.float64, case.extras)
    got, expected = case.call(w), case.plain(w)
    assert expected.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    pairs = [torch.autograd.grad(x, w.leaves, retain_graph=True, allow_unused=True) for x in (got, expected)]
    moved = 0
    for leaf, g, e in zip(w.leaves, *pairs, strict=True):
        g, e = (torch.zeros_like(leaf) if x is None else x for x in (g, e))
        largest = e.abs().max().item()
        moved += largest > 0
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-10 * largest + 1e-14)
    assert moved, "no gradient reaches anything"


def check_rounded(case: Case, dtype: torch.dtype) -> None:
    """Inputs of lower precision, value and gradients against the formula in fp64 at the same rounded inputs.

    No further off than three times plain torch in the same dtype, and 1e-6 of the largest entry (of 16 bits: two
    roundings, that of what is returned and of a scalar on its way).
    """
    worlds = [World(d, case.extras, rounded=dtype) for d in (dtype, dtype, torch.float64)]
    found = []
    for w, f in zip(worlds, (case.call, case.plain, case.plain), strict=True):
        value = f(w)
        grads = torch.autograd.grad(value, w.leaves, allow_unused=True)
        rows = [torch.zeros_like(x) if g is None else g for x, g in zip(w.leaves, grads, strict=True)]
        found.append([value.detach(), *rows])
    floor = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    for place, (got, plain, truth) in enumerate(zip(*found, strict=True)):
        errors = [(x.double() - truth).abs().max().item() for x in (got, plain)]
        largest = truth.abs().max().item()
        assert errors[0] <= 3 * errors[1] + floor * largest, (
            f"place {place}: {errors[0]:.3e} off {largest:.3e}, plain torch {errors[1]:.3e}"
        )


def check_falls(case: Case, steps: int = 8) -> None:
    """Eight steps on the tiny net lower the recipe's loss."""
    w = World(torch.float32, case.extras)
    losses = []
    for _ in range(steps):
        w.refresh()
        loss = case.call(w)
        losses.append(loss.item())
        w.step(loss)
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0], losses


def row_tests(cases: dict[str, Case]) -> tuple[Callable[..., None], ...]:
    """The three tests of a file's rows: the formula in fp64, lower precision, and a loss that falls."""

    @pytest.mark.parametrize("name", cases)
    def value_and_gradient(name):
        check_formula(cases[name])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    @pytest.mark.parametrize("name", cases)
    def lower_precision(name, dtype):
        check_rounded(cases[name], dtype)

    @pytest.mark.parametrize("name", cases)
    def the_loss_falls(name):
        check_falls(cases[name])

    return value_and_gradient, lower_precision, the_loss_falls


def kl(zt: Tensor, zs: Tensor) -> Tensor:
    """KL(softmax(zt) || softmax(zs)) of each row."""
    lp, lq = zt.log_softmax(-1), zs.log_softmax(-1)
    return (lp.exp() * (lp - lq)).sum(-1)


def soft_ce(zt: Tensor, zs: Tensor) -> Tensor:
    return -(zt.softmax(-1) * zs.log_softmax(-1)).sum(-1)


def ce(z: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each row, 0 at -100."""
    return F.cross_entropy(z.flatten(0, -2), labels.flatten(), reduction="none").reshape(labels.shape)


def mean(rows: Tensor, keep: Tensor) -> Tensor:
    return rows[keep].mean()


def infonce(a: Tensor, c: Tensor, tau: float | Tensor) -> Tensor:
    z = F.normalize(a, dim=-1) @ F.normalize(c, dim=-1).t() / tau
    return F.cross_entropy(z, torch.arange(len(a)))


@cache
def documented() -> dict[int, object]:
    from potstill.methods import catalog

    return {r.number: r for r in catalog()}
