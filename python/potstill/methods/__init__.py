"""What published methods need beyond the losses, and every published method as a recipe: `catalog()`.

Modules and names are imported on first use. Functions are named for what they compute; docstrings say which paper it is
and how well its formula is known ("read in the authors' code", "read in the paper", "second hand", "from memory").
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from potstill.methods import (
        blocks,
        contrastive,
        ema,
        hidden,
        metrics,
        on_policy,
        papers,
        preference,
        recipes,
        relation,
        restricted,
        rollout,
        samplers,
        schedules,
        scoring,
        sources,
        speculative,
    )
    from potstill.methods.papers import catalog

_MODULES: tuple[str, ...] = (
    "blocks", "contrastive", "ema", "hidden", "metrics", "on_policy", "papers", "preference", "recipes", "relation",
    "restricted", "rollout", "samplers", "schedules", "scoring", "sources", "speculative",
)  # fmt: skip
_NAMES: dict[str, str] = {"catalog": "papers"}  # public name -> the module that has it

__all__ = [
    "blocks", "catalog", "contrastive", "ema", "hidden", "metrics", "on_policy", "papers", "preference", "recipes",
    "relation", "restricted", "rollout", "samplers", "schedules", "scoring", "sources", "speculative",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(f"potstill.methods.{_NAMES[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"potstill.methods.{name}")
    raise AttributeError(f"module 'potstill.methods' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
