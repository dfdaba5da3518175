"""Teacher capture: text -> token sequences -> top-k rows -> cache.

`build` writes a cache from a causal language model; `potstill build` is its command line.
Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .builder import BuildReport, build, cache_spec
    from .hidden import final_hidden
    from .models import Loaded, load_model, load_tokenizer, tokenizer_hash
    from .plan import Shard, rank_and_world, shard_of
    from .sequences import TokenSequence, token_sequences
    from .text import Document, TextSource, open_text

_HOMES = {
    "BuildReport": "builder",
    "build": "builder",
    "cache_spec": "builder",
    "final_hidden": "hidden",
    "Loaded": "models",
    "load_model": "models",
    "load_tokenizer": "models",
    "tokenizer_hash": "models",
    "Shard": "plan",
    "rank_and_world": "plan",
    "shard_of": "plan",
    "TokenSequence": "sequences",
    "token_sequences": "sequences",
    "Document": "text",
    "TextSource": "text",
    "open_text": "text",
}

__all__ = [
    "BuildReport",
    "Document",
    "Loaded",
    "Shard",
    "TextSource",
    "TokenSequence",
    "build",
    "cache_spec",
    "final_hidden",
    "load_model",
    "load_tokenizer",
    "open_text",
    "rank_and_world",
    "shard_of",
    "token_sequences",
    "tokenizer_hash",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
