"""Cross-tokenizer distillation: exact alignment of two tokenizers by bytes, and losses over its chunks.

    aligner = xtok.Aligner(student_tokenizer, teacher_tokenizer)
    alignment = aligner(student_ids, teacher_ids)

The losses need no Rust extension; `VocabBytes` and `Aligner` do.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from potstill.xtok import adapters
    from potstill.xtok.aligner import Aligner, Stream
    from potstill.xtok.alignment import Alignment
    from potstill.xtok.alm import alm_loss, linear_alm_loss
    from potstill.xtok.cached import ChunkBatch, ChunkCollator
    from potstill.xtok.chunks import chunk_log_probs, merged_at_words, next_token_log_probs
    from potstill.xtok.hybrid import gold_loss
    from potstill.xtok.projected import project_topk
    from potstill.xtok.rows import first_rows, merged_rows
    from potstill.xtok.uld import uld_loss
    from potstill.xtok.vocab import VocabBytes

_NAMES = {
    "Aligner": "aligner",
    "Stream": "aligner",
    "Alignment": "alignment",
    "ChunkBatch": "cached",
    "ChunkCollator": "cached",
    "VocabBytes": "vocab",
    "adapters": "",
    "alm_loss": "alm",
    "chunk_log_probs": "chunks",
    "first_rows": "rows",
    "gold_loss": "hybrid",
    "linear_alm_loss": "alm",
    "merged_at_words": "chunks",
    "merged_rows": "rows",
    "next_token_log_probs": "chunks",
    "project_topk": "projected",
    "uld_loss": "uld",
}

__all__ = [
    "Aligner", "Alignment", "ChunkBatch", "ChunkCollator", "Stream", "VocabBytes", "adapters", "alm_loss",
    "chunk_log_probs", "first_rows", "gold_loss", "linear_alm_loss", "merged_at_words", "merged_rows",
    "next_token_log_probs", "project_topk", "uld_loss",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'potstill.xtok' has no attribute {name!r}")
    try:
        module = importlib.import_module(f"potstill.xtok.{_NAMES[name] or name}")
    except ImportError as error:
        raise ImportError(
            f"potstill.xtok.{name} needs the Rust extension potstill._rust, which cannot be imported ({error}); "
            "install potstill again with cargo on the PATH, `potstill doctor` tells more"
        ) from error
    value = getattr(module, name) if _NAMES[name] else module
    globals()[name] = value
    return value
