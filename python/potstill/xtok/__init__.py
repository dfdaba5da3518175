"""Cross-tokenizer distillation: exact alignment of two tokenizers by bytes, and losses over its chunks.

    aligner = xtok.Aligner(student_tokenizer, teacher_tokenizer)
    alignment = aligner(student_ids, teacher_ids)

The losses need no Rust extension; `VocabBytes` and `Aligner` do.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from potstill.xtok.aligner import Aligner, Stream
    from potstill.xtok.alignment import Alignment
    from potstill.xtok.alm import alm_loss, linear_alm_loss, next_token_log_probs
    from potstill.xtok.at import log_probs_at
    from potstill.xtok.uld import first_rows, gold_loss, uld_loss
    from potstill.xtok.vocab import VocabBytes

_NAMES = {
    "Aligner": "aligner",
    "Stream": "aligner",
    "Alignment": "alignment",
    "VocabBytes": "vocab",
    "alm_loss": "alm",
    "linear_alm_loss": "alm",
    "next_token_log_probs": "alm",
    "log_probs_at": "at",
    "first_rows": "uld",
    "gold_loss": "uld",
    "uld_loss": "uld",
}

__all__ = [
    "Aligner", "Alignment", "Stream", "VocabBytes", "alm_loss", "first_rows", "gold_loss", "linear_alm_loss",
    "log_probs_at", "next_token_log_probs", "uld_loss",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'potstill.xtok' has no attribute {name!r}")
    try:
        module = importlib.import_module(f"potstill.xtok.{_NAMES[name]}")
    except ImportError as error:
        raise ImportError(
            f"potstill.xtok.{name} needs the Rust extension potstill._rust, which cannot be imported ({error}); "
            "install potstill again with cargo on the PATH, `potstill doctor` tells more"
        ) from error
    value = getattr(module, name)
    globals()[name] = value
    return value
