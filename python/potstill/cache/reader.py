"""Reading a cache by key or in batches, into memory of the caller's when wanted."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from potstill import _rust
from potstill.cache.arrays import int32
from potstill.cache.buffers import Buffers
from potstill.cache.spec import Spec
from potstill.cache.tools import Report, verify_cache

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from potstill.teachers import TopK

Arrays = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True)
class CachedSequence:
    """One sequence: tokens int32 [L] and topk with torch CPU tensors ids [L, K] int32, log_probs [L, K]
    fp32 and log_rest [L] fp32. Row i is the teacher's distribution of the token after tokens[0..i]."""

    key: str
    tokens: NDArray[np.int32]
    topk: TopK


class Cache:
    """A cache open for reading; made by `potstill.cache.open`. Safe to share with forked and spawned
    workers and between threads. It sees the sequences that were committed when it was opened."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._rust = _rust.Cache(self.path)
        self.spec = Spec.from_json(self._rust.spec)

    def __reduce__(self) -> tuple[type[Cache], tuple[str]]:
        return Cache, (os.path.abspath(self.path),)

    def __repr__(self) -> str:
        return f"Cache({self.path!r}, {len(self)} sequences, {self.num_tokens} tokens, k={self.spec.k})"

    def __len__(self) -> int:
        return len(self._rust)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and key in self._rust

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> list[str]:
        """All keys in commit order."""
        return self._rust.keys()

    @property
    def num_tokens(self) -> int:
        return self._rust.num_tokens

    @property
    def num_bytes(self) -> int:
        """Bytes of all shard files."""
        return self._rust.num_bytes

    def length(self, key: str) -> int:
        """Tokens of a sequence, from the index. Raises KeyError."""
        return self._rust.length(key)

    def token_hash(self, key: str) -> int:
        """128-bit xxh3 of the sequence's tokens as little-endian int32, from the index."""
        return self._rust.token_hash(key)

    def tokens(self, key: str) -> NDArray[np.int32]:
        """Tokens int32 [L] of a sequence, without decoding its rows."""
        out = np.empty(self.length(key), np.int32)
        self._rust.read_tokens(key, out)
        return out

    def numpy(self, key: str) -> Arrays:
        """(tokens int32 [L], ids int32 [L, K], log_probs fp32 [L, K], log_rest fp32 [L]); needs no torch.

        Missing entries are id -1 with log_prob -inf. Raises KeyError; CacheError naming shard and block
        for damage.
        """
        tokens, buffers = self._decode(key)
        n, k = len(tokens), self.spec.k
        return tokens, buffers.ids.reshape(n, k), buffers.log_probs.reshape(n, k), buffers.log_rest

    def _decode(self, key: str) -> tuple[NDArray[np.int32], Buffers]:
        n = self.length(key)
        tokens, buffers = np.empty(n, np.int32), Buffers.empty(self.spec, n)
        self._rust.read(key, tokens, **vars(buffers))
        return tokens, buffers

    def __getitem__(self, key: str) -> CachedSequence:
        tokens, buffers = self._decode(key)
        return CachedSequence(key, tokens, buffers.topk(self.spec, (len(tokens),)))

    def batch(
        self,
        keys: Sequence[str],
        tokens: Sequence[Any] | None = None,
        out: TopK | None = None,
        *,
        threads: int = 1,
    ) -> TopK:
        """Rows of B sequences, padded to the longest: TopK with ids [B, L, K], log_probs [B, L, K] and
        log_rest [B, L], and lse, counts, log_rest_at and token_log_probs where the spec has them.

        tokens: B integer sequences (tensors, arrays or lists), each equal to the cached tokens or a prefix
            of them; the prefix's rows alone are then decoded. Any difference raises TokenMismatch, a
            ValueError that names sequence and first differing position (attributes key and position).
        out: a TopK of contiguous CPU tensors (ids int32, log_probs and log_rest fp32; pinned memory too)
            of B sequences and at least L rows, which is filled and returned; other columns are not read then.
        threads: sequences are shared out among so many, made for this call.

        Padding rows have ids -1, log_probs -inf and log_rest 0. Raises KeyError for an unknown key and
        CacheError naming shard and block for damage.
        """
        keys = list(keys)
        given, rows = self._rows(keys, tokens)
        b, k = len(keys), self.spec.k
        if out is not None:
            n = _check_out(out, b, max(rows, default=0), k)
            ids, log_probs = out.ids.view(-1).numpy(), out.log_probs.view(-1).numpy()
            assert out.log_rest is not None
            self._rust.read_many(
                keys, rows, n, ids, log_probs, out.log_rest.view(-1).numpy(), tokens=given, threads=threads
            )
            return out
        n = max(rows, default=0)
        buffers = Buffers.empty(self.spec, b * n)
        self._rust.read_many(keys, rows, n, tokens=given, threads=threads, **vars(buffers))
        return buffers.topk(self.spec, (b, n))

    def packed(
        self, keys: Sequence[str], tokens: Sequence[Any] | None = None, *, threads: int = 1
    ) -> tuple[TopK, NDArray[np.int32]]:
        """Rows of sequences one behind the other, without padding: TopK with ids [N, K] and so on, and cu_seqlens
        int32 [B + 1], the first row of each sequence and N. Arguments and errors as in `batch`."""
        keys = list(keys)
        given, rows = self._rows(keys, tokens)
        buffers = Buffers.empty(self.spec, sum(rows))
        self._rust.read_many(keys, rows, None, tokens=given, threads=threads, **vars(buffers))
        return buffers.topk(self.spec, (sum(rows),)), np.cumsum([0, *rows], dtype=np.int32)

    def _rows(self, keys: list[str], tokens: Sequence[Any] | None) -> tuple[list[NDArray[np.int32]] | None, list[int]]:
        given = self._given(keys, tokens)
        lengths = [self.length(key) for key in keys]
        return given, lengths if given is None else [min(n, len(t)) for n, t in zip(lengths, given, strict=True)]

    def _given(self, keys: list[str], tokens: Sequence[Any] | None) -> list[NDArray[np.int32]] | None:
        if tokens is None:
            return None
        if len(tokens) != len(keys):
            raise ValueError(f"{len(tokens)} token sequences are given for {len(keys)} keys")
        return [int32(t, f"tokens of {key!r}", 1) for key, t in zip(keys, tokens, strict=True)]

    def verify(self) -> Report:
        """Checks every byte and every row of the cache on disk; raises nothing for damage, see `Report`."""
        return verify_cache(self.path)


def _check_out(out: TopK, b: int, n: int, k: int) -> int:
    import torch

    if out.log_rest is None:
        raise ValueError("out.log_rest is None; give a TopK of three buffers")
    rows = out.log_rest.shape[1] if out.log_rest.dim() == 2 else -1
    _check_buffer("ids", out.ids, torch.int32, (b, rows, k), n)
    _check_buffer("log_probs", out.log_probs, torch.float32, (b, rows, k), n)
    _check_buffer("log_rest", out.log_rest, torch.float32, (b, rows), n)
    return rows


def _check_buffer(name: str, buffer: Tensor, dtype: torch.dtype, shape: tuple[int, ...], n: int) -> None:
    if buffer.dtype != dtype or buffer.device.type != "cpu" or not buffer.is_contiguous():
        layout = "" if buffer.is_contiguous() else ", not contiguous"
        raise ValueError(
            f"out.{name} is {buffer.dtype} on {buffer.device}{layout}; a contiguous {dtype} tensor on the "
            "CPU is accepted"
        )
    if tuple(buffer.shape) != shape or shape[1] < n:
        needed = [shape[0], f"at least {n}", *shape[2:]]
        raise ValueError(f"out.{name} has shape {list(buffer.shape)}, {needed} is needed")


def open(path: str | os.PathLike[str]) -> Cache:
    """Opens a cache folder for reading.

    Raises CacheError when there is no cache, or a header, index, record or manifest is damaged (naming the
    file), or it needs a newer potstill.
    """
    return Cache(path)
