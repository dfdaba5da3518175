"""A divergence's formula as a Triton device function: the same code object under other globals.

Nothing is rewritten. `device_function` gives the formula's code the globals below (`exp` is the Triton one
and so on), does the same to every plain Python function that it calls, and hands the result to `triton.jit`.
The primitives are fp32, need no libdevice, so that they run in the interpreter too, and keep what formulas
rely on near 0 and at -inf: expm1(-inf) = -1, exp(-inf) = 0, log1p(-1) = -inf, and NaN stays NaN.
"""

from __future__ import annotations

import builtins
import types
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def exp(x):
    return tl.exp(x)


@triton.jit
def log(x):
    return tl.log(x)


@triton.jit
def abs(x):
    return tl.abs(x)


@triton.jit
def where(condition, a, b):
    return tl.where(condition, a, b)


@triton.jit
def expm1(x):
    """exp(x) - 1: Taylor to x^9 for |x| < 1/2, where the difference would cancel."""
    high = 1.0 / 720 + x * (1.0 / 5040 + x * (1.0 / 40320 + x * (1.0 / 362880)))
    series = 1.0 + x * (1.0 / 2 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * high))))
    return tl.where(tl.abs(x) < 0.5, x * series, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x) = 2 atanh(s), s = x / (2 + x), for x in [-1/2, 1]; elsewhere 1 + x loses nothing."""
    s = x / (2.0 + x)
    t = s * s
    tail = t * (1.0 / 9 + t * (1.0 / 11 + t * (1.0 / 13 + t * (1.0 / 15))))
    series = 1.0 + t * (1.0 / 3 + t * (1.0 / 5 + t * (1.0 / 7 + tail)))
    return tl.where((x >= -0.5) & (x <= 1.0), 2.0 * s * series, tl.log(1.0 + x))


@triton.jit
def tanh(x):
    """Through expm1, so that it is as accurate near 0 as at 1."""
    e = expm1(-2.0 * tl.abs(x))
    t = -e / (2.0 + e)
    return tl.where(x < 0, -t, t)


# what a formula's globals may hold, by the object they hold -> what Triton sees in its place
PRIMITIVES: dict[Any, Any] = {
    torch.exp: exp, torch.log: log, torch.expm1: expm1, torch.log1p: log1p, torch.abs: abs, builtins.abs: abs,
    torch.where: where,
}  # fmt: skip
INTERPRETED = not isinstance(exp, triton.JITFunction)

_converted: dict[Callable[..., Any], Any] = {}


def device_function(formula: Callable[..., Any]) -> Any:
    """The Triton function of a formula written as divergences.py says; made once per function object.

    Raises TypeError naming what the formula uses that has no Triton form.
    """
    if formula not in _converted:
        _converted[formula] = triton.jit(_with_triton_globals(formula))
    return _converted[formula]


def _with_triton_globals(function: Callable[..., Any]) -> types.FunctionType:
    if not isinstance(function, types.FunctionType):
        raise TypeError(f"a formula must be a plain Python function, not {function!r}")
    code = function.__code__
    # the interpreter looks for `tl` among the globals; __name__ becomes part of the mangled name
    scope: dict[str, Any] = {"tl": tl, "__name__": function.__module__, "__builtins__": builtins}
    for name in code.co_names:
        if name in function.__globals__:
            scope[name] = _translate(function, name, function.__globals__[name])
        elif name == "abs":
            scope[name] = abs
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    closure = tuple(types.CellType(_translate(function, name, cell.cell_contents)) for name, cell in cells)
    twin = types.FunctionType(code, scope, function.__name__, function.__defaults__, closure)
    twin.__qualname__ = function.__qualname__
    return twin


def _translate(function: Callable[..., Any], name: str, value: Any) -> Any:
    if isinstance(value, (int, float)):
        return value if INTERPRETED else tl.constexpr(value)
    if isinstance(value, types.FunctionType):
        return device_function(value)
    try:
        return PRIMITIVES[value]
    except (KeyError, TypeError):
        known = ", ".join(sorted({p.__name__ for p in PRIMITIVES}))
        raise TypeError(
            f"formula {function.__name__!r} uses {name} = {value!r}, which has no Triton form; formulas use "
            f"{known} (imported from torch by name), numbers and plain functions written with these"
        ) from None
