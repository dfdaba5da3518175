"""torch.library: how an op of potstill is entered; the only file that names it.

Every op is opaque to torch.compile, with the chunk loop and the choice of the kernel inside. A backward is an op of its
own whose derivative raises, so a second derivative is an error, never a wrong number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from potstill.rows import Side

LIB = torch.library.Library("potstill", "DEF")


class Op(NamedTuple):
    """One op: `setup_context` and `backward` as torch.library.register_autograd takes them."""

    name: str
    schema: str
    run: Callable[..., Any]
    fake: Callable[..., Any]
    backward: Callable[..., Any]
    setup_context: Callable[..., Any] | None


def register(op: Op) -> None:
    """Make torch.ops.potstill.<name>."""
    qualified = f"potstill::{op.name}"
    torch.library.define(qualified, op.schema, lib=LIB, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "CompositeExplicitAutograd", op.run, lib=LIB)
    torch.library.register_fake(qualified, op.fake, lib=LIB)
    torch.library.register_autograd(qualified, op.backward, setup_context=op.setup_context, lib=LIB)


def no_second_derivative(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
    raise RuntimeError(
        "potstill's losses have first derivatives only; for second derivatives (create_graph=True) write the "
        "divergence in plain torch"
    )


def side_of(numbers: list[float]) -> Side:
    """(vocab_size, scale, softcap) as ops carry it."""
    vocab_size, scale, softcap = numbers
    return Side(int(vocab_size), scale, softcap)


def wide(x: Tensor) -> torch.dtype:
    """The dtype of results: fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
