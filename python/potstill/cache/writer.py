"""Writing a cache: sequences go into an open shard, shards are committed whole and never change."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any

from potstill import _rust
from potstill.cache.arrays import float32, int32
from potstill.cache.spec import Spec


class Writer:
    """Writes sequences of teacher rows into a cache folder.

    path: a new, empty or (resume=True) existing cache folder. Several writers, in several processes, may
        share one.
    resume: continue an existing cache of an equal spec; whole sequences of writers that died are taken
        over. False refuses an existing cache.
    shard_bytes: a shard is committed when it reaches this size; a kill loses at most the sequence being
        written and a power failure at most the open shard.

    A with-block commits and closes at its end; left by an exception it commits what is whole, and the
    exception goes on.

    Raises CacheError when the folder is not a cache, is damaged, or has another spec
    (naming the field); OSError when the system refuses, with everything committed so far intact.
    """

    def __init__(
        self, path: str | os.PathLike[str], spec: Spec, *, resume: bool = True, shard_bytes: int = 64 << 20
    ) -> None:
        if not isinstance(spec, Spec):
            raise TypeError(f"spec is a {type(spec).__name__}, a potstill.cache.Spec is accepted")
        if shard_bytes < 1:
            raise ValueError(f"shard_bytes is {shard_bytes}, at least 1 is accepted")
        self.path = os.fspath(path)
        self.spec = spec
        self._rust = _rust.Writer(self.path, spec.to_json(), bool(resume), int(shard_bytes))

    def add(self, key: str, tokens: Any, topk: Any) -> bool:
        """Adds a sequence: row i is the teacher's distribution of the token after tokens[0..i].

        key: 1 to 512 bytes of UTF-8. tokens: [L] integers (tensor, array or list), L >= 1.
        topk: anything with ids [L, K] integers, log_probs [L, K] and log_rest [L], K <= spec.k; each row
            in descending log-probability, a missing entry (at the end of a row) is id -1 with log_prob -inf.

        Returns False, and writes nothing, when the key is there already with equal content.
        Raises ValueError naming key, row and value: other content under a known key, wrong shapes, ids
        outside the vocabulary or twice in a row, NaN, a log-probability above 1e-3, a row whose mass is
        above 1 + 1e-3.
        """
        if not isinstance(key, str):
            raise TypeError(f"key is a {type(key).__name__}, a str is accepted")
        rest = getattr(topk, "log_rest", None)
        if rest is None:
            raise ValueError(
                f"sequence {key!r}: topk.log_rest is missing; a cache keeps the log mass outside the entries "
                "of each row (potstill.topk gives it; for renormalised rows it is -inf)"
            )
        return self._rust.add(
            key,
            int32(tokens, f"sequence {key!r}: tokens", 1),
            int32(topk.ids, f"sequence {key!r}: topk.ids", 2),
            float32(topk.log_probs, f"sequence {key!r}: topk.log_probs", 2),
            float32(rest, f"sequence {key!r}: topk.log_rest", 1),
        )

    def __contains__(self, key: object) -> bool:
        """True when the key is committed or waits in the open shard."""
        return isinstance(key, str) and key in self._rust

    def __len__(self) -> int:
        """Sequences committed and waiting."""
        return self._rust.committed + self._rust.pending[0]

    @property
    def committed(self) -> int:
        """Sequences that are safe on disk."""
        return self._rust.committed

    @property
    def pending(self) -> int:
        """Sequences that the next commit will hold."""
        return self._rust.pending[0]

    @property
    def salvaged(self) -> int:
        """Sequences taken over, when this writer was opened, from writers that died."""
        return self._rust.salvaged[0]

    def flush(self) -> str | None:
        """Commits everything added so far as one shard; its name, or None when there was nothing new."""
        return self._rust.flush()

    def close(self) -> None:
        """Commits and writes the manifest. Closing twice is harmless."""
        self._rust.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as failed:
            if error is None:
                raise
            error.add_note(f"the cache could not be closed either: {failed}") if hasattr(error, "add_note") else None
