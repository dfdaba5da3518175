"""The kernel registry: which backend serves an op, and why the others do not.

A backend registers a function for an op with a rank and `refuses(facts)`, which returns None or a sentence. The
highest-ranked backend that does not refuse is chosen, inside the op, so torch.compile sees one opaque op.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# module -> imported on first use; each registers its kernels and says in refuses() why it cannot serve
BACKEND_MODULES = (
    "potstill.reference",
    "potstill.kernels.cpp",
    "potstill.kernels.cpp_topk",
    "potstill.kernels.cpp_parts",
    "potstill.kernels.cpp_chunks",
    "potstill.kernels.cuda",
    "potstill.kernels.cuda_topk",
    "potstill.kernels.triton_backend",
)


@dataclass(frozen=True)
class Facts:
    """What a backend is told about a call; a `divergence` of None means none in particular."""

    op: str
    device: torch.device
    dtype: torch.dtype
    columns: int = 0
    k: int = 0
    divergence: str | None = None


@dataclass(frozen=True)
class Kernel:
    """One backend's implementation of one op; a higher rank is preferred."""

    op: str
    backend: str
    rank: int
    run: Callable[..., Any]
    refuses: Callable[[Facts], str | None]


_kernels: dict[tuple[str, str], Kernel] = {}
_loaded = False


def register(op: str, backend: str, *, rank: int, refuses: Callable[[Facts], str | None]) -> Callable[..., Any]:
    """Decorator: the function serves `op` as `backend`."""

    def enter(run: Callable[..., Any]) -> Callable[..., Any]:
        _kernels[op, backend] = Kernel(op, backend, rank, run, refuses)
        return run

    return enter


def _load() -> None:
    global _loaded
    if not _loaded:
        for module in BACKEND_MODULES:
            importlib.import_module(module)
        _loaded = True


def kernels(op: str) -> list[Kernel]:
    """The kernels of an op, best first."""
    _load()
    return sorted((k for k in _kernels.values() if k.op == op), key=lambda k: -k.rank)


def ops() -> list[str]:
    """The names of the ops that have kernels."""
    _load()
    return sorted({op for op, _ in _kernels})


def explain(facts: Facts) -> list[tuple[str, str | None]]:
    """(backend, None or the sentence with which it refuses), best first."""
    return [(kernel.backend, kernel.refuses(facts)) for kernel in kernels(facts.op)]


def select(facts: Facts, backend: str = "auto") -> Kernel:
    """The kernel that serves the call. Raises ValueError with every refusal when none does."""
    candidates = kernels(facts.op)
    if backend != "auto":
        known = [k.backend for k in candidates]
        if backend not in known:
            raise ValueError(f"backend={backend!r} has no {facts.op!r}; it is served by {', '.join(known)}, or 'auto'")
        candidates = [k for k in candidates if k.backend == backend]
    refusals = []
    for kernel in candidates:
        sentence = kernel.refuses(facts)
        if sentence is None:
            return kernel
        refusals.append(f"  {kernel.backend}: {sentence}")
    raise ValueError(
        f"no backend serves {facts.op!r} for {facts.dtype} on {facts.device.type}:\n" + "\n".join(refusals)
    )
