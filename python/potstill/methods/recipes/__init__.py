"""Published methods in a few lines each over the primitives of this library; `potstill.methods.catalog()` lists them.

A recipe is named for what it computes. Rows are aligned and nothing is shifted; the teacher has no gradient; T
squared is
multiplied in only where the row says so. Where a recipe ends in `**options` these go to `linear_distill_loss`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from potstill.methods.recipes import embeddings, encoders, layers, logits, preferences, text

_MODULES = ("embeddings", "encoders", "layers", "logits", "preferences", "text")
__all__ = ["embeddings", "encoders", "layers", "logits", "preferences", "text"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"potstill.methods.recipes.{name}")
    raise AttributeError(f"module 'potstill.methods.recipes' has no attribute {name!r}")
