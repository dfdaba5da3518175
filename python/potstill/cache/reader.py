"""Reading a cache by key or in batches, into memory of the caller's when wanted."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from potstill import _rust
from potstill._rust import TokenMismatch
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
    fp32 and log_rest [L] fp32. Row i is the teacher's distribution of the token after tokens[0..i].
    columns: the further columns of the spec by name, [L], [L, W] or, of the whole sequence, [W]."""

    key: str
    tokens: NDArray[np.int32]
    topk: TopK
    columns: dict[str, Tensor] = field(default_factory=dict)


class Cache:
    """A cache open for reading; made by `potstill.cache.open`. Safe to share with forked and spawned
    workers and between threads. It sees the sequences that were committed when it was opened or refreshed."""

    def __init__(self, path: str | os.PathLike[str], *, mmap: bool = False) -> None:
        self.path, self._mmap = os.fspath(path), mmap
        self._rust = _rust.Cache(self.path, mmap)
        self.spec = Spec.stored(self._rust.spec, self.path)
        self._by_hash: dict[int, list[str]] | None = None

    def __reduce__(self) -> Any:
        return _reopened, (os.path.abspath(self.path), self._mmap)

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

    def token_hash(self, key: str, length: int | None = None) -> int:
        """`potstill.cache.token_hash` of the sequence's tokens: from the index, or of the first `length` of them."""
        return self._rust.token_hash(key) if length is None else token_hash(self.tokens(key, length))

    def check_tokens(self, key: str, tokens: Any) -> None:
        """Compares tokens (or a prefix of them) with the cached ones; rows are not decoded. Raises TokenMismatch with
        the first differing position, as `batch` does."""
        given = int32(tokens, f"tokens of {key!r}", 1)
        if len(given) == self.length(key) and token_hash(given) == self.token_hash(key):
            return
        cached = self.tokens(key)
        differs = np.flatnonzero(given[: len(cached)] != cached[: len(given)])
        if not len(differs) and len(given) <= len(cached):
            return
        position = int(differs[0]) if len(differs) else len(cached)
        there = str(cached[position]) if position < len(cached) else f"absent (it has {len(cached)} tokens)"
        error = TokenMismatch(
            f"sequence {key!r}: token {position} is {given[position]}, the cached one is {there}; the rows of this key "
            "belong to other tokens (another text, tokenizer or template)"
        )
        error.key, error.position = key, position
        raise error

    def find(self, tokens: Any) -> list[str]:
        """Keys of the sequences whose tokens are exactly these, by token hash; the first call indexes all hashes."""
        if self._by_hash is None:
            self._by_hash = {}
            for key in self.keys():
                self._by_hash.setdefault(self.token_hash(key), []).append(key)
        return list(self._by_hash.get(token_hash(tokens), []))

    def refresh(self) -> int:
        """Takes in what was committed since the cache was opened, opening new shards alone; how many sequences are new.
        Damage raises CacheError and leaves the view as it was."""
        before, fresh = len(self), self._rust.refreshed()
        self._rust, self._by_hash = fresh, None
        return len(self) - before

    def tokens(self, key: str, length: int | None = None) -> NDArray[np.int32]:
        """Tokens int32 [L] of a sequence, or the first `length` of them, without decoding its rows."""
        out = np.empty(self.length(key) if length is None else length, np.int32)
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

    def read(self, key: str, tokens: NDArray[np.int32], out: Buffers) -> None:
        """Decodes the first len(tokens) tokens and rows of a sequence into memory of the caller's; needs no torch."""
        self._rust.read(key, tokens, **vars(out.checked(self.spec, len(tokens))))

    def _decode(self, key: str) -> tuple[NDArray[np.int32], Buffers]:
        n = self.length(key)
        tokens, buffers = np.empty(n, np.int32), Buffers.empty(self.spec, n)
        self._rust.read(key, tokens, **vars(buffers))
        return tokens, buffers

    def __getitem__(self, key: str) -> CachedSequence:
        tokens, buffers = self._decode(key)
        columns = {column.name: self.column(key, column.name) for column in self.spec.columns}
        return CachedSequence(key, tokens, buffers.topk(self.spec, (len(tokens),)), columns)

    def column(self, key: str, name: str) -> Tensor:
        """A further column of one sequence: [L] or [L, W] for tokens, [W] for a whole sequence, in its own dtype.

        Raises KeyError for an unknown key or column.
        """
        found = self.columns([key], name)
        return found[0]

    def numpy_columns(self, key: str) -> dict[str, NDArray[Any]]:
        """All further columns of one sequence by name, as `Writer.add(columns=)` takes them; bf16 as its bits, uint16.
        Needs no torch."""
        found = {}
        for number, column in enumerate(self.spec.columns):
            rows = column.rows(self.length(key))
            stored = np.empty(rows * column.stride, np.uint8)
            self._rust.read_column(number, [key], [rows], None, stored)
            found[column.name] = column.numpy(stored)
        return found

    def columns(
        self, keys: Sequence[str], name: str, *, rows: Sequence[int] | None = None, packed: bool = False
    ) -> Tensor:
        """A further column of B sequences, padded with zeros to the longest: [B, L] or [B, L, W]; packed, one behind
        the other, [N] or [N, W]; of whole sequences [B, W]. rows: the first so many of each, for prefixes of tokens."""
        number = next((i for i, column in enumerate(self.spec.columns) if column.name == name), None)
        if number is None:
            have = [column.name for column in self.spec.columns]
            raise KeyError(f"no column {name!r} in {self.path}, it has {have}")
        keys, column = list(keys), self.spec.columns[number]
        lengths = [self.length(key) for key in keys]
        wanted = [column.rows(n) for n in (lengths if rows is None else rows)]
        if len(wanted) != len(keys):
            raise ValueError(f"{len(wanted)} numbers of rows are given for {len(keys)} keys")
        longest = max(wanted, default=0)
        ragged = packed and column.per == "token"
        shape = (sum(wanted),) if ragged else (len(keys), longest) if column.per == "token" else (len(keys),)
        stored = np.empty(int(np.prod(shape)) * column.stride, np.uint8)
        self._rust.read_column(number, keys, wanted, None if ragged else longest, stored)
        return column.tensor(stored, *shape)

    def batch(
        self,
        keys: Sequence[str],
        tokens: Sequence[Any] | None = None,
        out: TopK | Buffers | None = None,
        *,
        threads: int = 1,
    ) -> TopK:
        """Rows of B sequences, padded to the longest: TopK with ids [B, L, K], log_probs [B, L, K] and
        log_rest [B, L], and lse, counts, log_rest_at and token_log_probs where the spec has them.

        tokens: B integer sequences (tensors, arrays or lists), each equal to the cached tokens or a prefix
            of them; the prefix's rows alone are then decoded. Any difference raises TokenMismatch, a
            ValueError that names sequence and first differing position (attributes key and position).
        out: a TopK of contiguous CPU tensors (ids int32, log_probs and log_rest fp32; pinned memory too)
            of B sequences and at least L rows, which is filled and returned; other columns are not read then. Or
            Buffers of at least B * L rows: the TopK that is returned lies in them.
        threads: sequences are shared out among so many, made for this call.

        Padding rows have ids -1, log_probs -inf and log_rest 0. Raises KeyError for an unknown key and
        CacheError naming shard and block for damage.
        """
        keys = list(keys)
        given, rows = self._rows(keys, tokens)
        b, k = len(keys), self.spec.k
        if isinstance(out, Buffers):
            n = max(rows, default=0)
            buffers = out.checked(self.spec, b * n)
            self._rust.read_many(keys, rows, n, tokens=given, threads=threads, **vars(buffers))
            return buffers.topk(self.spec, (b, n))
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
        self,
        keys: Sequence[str],
        tokens: Sequence[Any] | None = None,
        out: Buffers | None = None,
        *,
        threads: int = 1,
    ) -> tuple[TopK, NDArray[np.int32]]:
        """Rows of sequences one behind the other, without padding: TopK with ids [N, K] and so on, and cu_seqlens
        int32 [B + 1], the first row of each sequence and N. Arguments and errors as in `batch`; out: N rows or more."""
        keys = list(keys)
        given, rows = self._rows(keys, tokens)
        buffers = Buffers.empty(self.spec, sum(rows)) if out is None else out.checked(self.spec, sum(rows))
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


def token_hash(tokens: Any) -> int:
    """128-bit xxh3 of tokens [L] as little-endian int32: what the index holds of every sequence."""
    return _rust.token_hash(int32(tokens, "tokens", 1))


def open(path: str | os.PathLike[str], *, mmap: bool = False, **remote: Any) -> Cache:
    """Opens a cache folder for reading, or a cache at a URL: s3://, gs://, az://, http(s):// (extra `remote`), file://.

    mmap: shards are mapped into memory and decoded where they lie, which saves a copy; by default they are read. A
        mapped file that somebody cuts short ends the process, so leave it where writers are not trusted.
    For a URL: folder (where fetched bytes are kept; a temporary one otherwise), options (for obstore's `from_url`:
    credentials, endpoint, client_options, retry_config), requests (how many at a time, 16), read_ahead (bytes that are
    fetched beyond a sequence when sequences are read in order, 8 MiB; 0 for none).

    Raises CacheError when there is no cache, or a header, index, record or manifest is damaged (naming the
    file), or it needs a newer potstill.
    """
    if isinstance(path, str) and "://" in path:
        from potstill.cache.remote import RemoteCache, local_path

        local = local_path(path)
        if local is None and mmap:
            raise TypeError(f"mmap is given for {path}, which is no local folder")
        if local is None:
            return RemoteCache(path, **remote)
        path = local
    if remote:
        raise TypeError(f"{', '.join(remote)} is given for {os.fspath(path)}, which is a local folder")
    return Cache(path, mmap=mmap)


def _reopened(path: str, mmap: bool) -> Cache:
    return Cache(path, mmap=mmap)
