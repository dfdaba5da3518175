"""potstill: LLM distillation that is cheap to run.

Names are imported on first use, so that `import potstill` costs nothing and tools that need no torch never load it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from potstill import cache, capture, divergences, integrations, methods, xtok
    from potstill.extraction import linear_sample, linear_topk, sample, topk
    from potstill.losses import DistillLoss, LinearDistillLoss, distill_loss, linear_distill_loss
    from potstill.mixtures import Masked, Mix, OneHot, Student, Uniform
    from potstill.teachers import Head, HiddenTeacher, LogitsTeacher, TopK
    from potstill.tokens import TokenLogprobs, token_logprobs

_NAMES = {
    "DistillLoss": "losses",
    "LinearDistillLoss": "losses",
    "distill_loss": "losses",
    "linear_distill_loss": "losses",
    "Head": "teachers",
    "HiddenTeacher": "teachers",
    "LogitsTeacher": "teachers",
    "TopK": "teachers",
    "Masked": "mixtures",
    "Mix": "mixtures",
    "OneHot": "mixtures",
    "Student": "mixtures",
    "Uniform": "mixtures",
    "linear_sample": "extraction",
    "linear_topk": "extraction",
    "sample": "extraction",
    "topk": "extraction",
    "TokenLogprobs": "tokens",
    "token_logprobs": "tokens",
}
_MODULES = ("cache", "capture", "divergences", "integrations", "methods", "xtok")

__all__ = [
    "DistillLoss", "Head", "HiddenTeacher", "LinearDistillLoss", "LogitsTeacher", "Masked", "Mix", "OneHot", "Student",
    "TokenLogprobs", "TopK", "Uniform", "cache", "capture", "distill_loss", "divergences", "integrations",
    "linear_distill_loss", "linear_sample", "linear_topk", "methods", "sample", "token_logprobs", "topk", "xtok",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"potstill.{name}")
    if name not in _NAMES:
        raise AttributeError(f"module 'potstill' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"potstill.{_NAMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
