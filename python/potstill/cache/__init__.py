"""The teacher cache: write a teacher's top-k rows once, read them for years, verified against the tokens
they belong to.

    spec = cache.Spec(vocab_size=49152, k=64, teacher="SmolLM2-135M-Instruct", tokenizer="...")
    with cache.Writer("rows", spec) as w:
        w.add(key, tokens, topk)
    rows = cache.open("rows")
    rows[key].topk;  rows.batch(keys, tokens=token_lists)

Importing this needs numpy and the Rust extension, not torch; torch is imported by the methods that return
tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from potstill.cache.dataset import Batch, Dataset, ShuffledBatches

try:
    from potstill._rust import FORMAT_VERSION, CacheError, TokenMismatch
except ImportError as error:
    raise ImportError(
        f"potstill.cache needs the Rust extension potstill._rust, which cannot be imported ({error}); "
        "install potstill again with cargo on the PATH, `potstill doctor` tells more"
    ) from error

from potstill.cache.buffers import Buffers
from potstill.cache.columns import Column
from potstill.cache.reader import Cache, CachedSequence, open, token_hash
from potstill.cache.spec import Spec
from potstill.cache.tools import Problem, Report, inspect_cache, recover_cache, verify_cache
from potstill.cache.writer import Writer

__all__ = [
    "FORMAT_VERSION",
    "Batch",
    "Buffers",
    "Cache",
    "CacheError",
    "CachedSequence",
    "Column",
    "Dataset",
    "Problem",
    "Report",
    "ShuffledBatches",
    "Spec",
    "TokenMismatch",
    "Writer",
    "inspect_cache",
    "open",
    "recover_cache",
    "token_hash",
    "verify_cache",
]


def __getattr__(name: str) -> Any:
    # the classes that need torch
    if name in ("Batch", "Dataset", "ShuffledBatches"):
        from potstill.cache import dataset

        return getattr(dataset, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
