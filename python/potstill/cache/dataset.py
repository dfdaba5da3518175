"""A cache as a torch Dataset, and a shuffling sampler that resumes and does not care how many processes there are."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.cache.buffers import Buffers
from potstill.cache.reader import Cache, CachedSequence

if TYPE_CHECKING:
    from potstill.teachers import TopK

FORMS = ("sequences", "padded", "packed")


@dataclass(frozen=True)
class Batch:
    """B sequences. Padded: tokens int64 [B, L] (0 behind each sequence's end), topk [B, L, K]. Packed: tokens [N], topk
    [N, K], cu_seqlens int32 [B + 1]. lengths int64 [B]; columns by name, padded or packed in the same way."""

    keys: list[str]
    tokens: Tensor
    lengths: Tensor
    topk: TopK
    cu_seqlens: Tensor | None = None
    columns: dict[str, Tensor] = field(default_factory=dict)

    def pin_memory(self) -> Batch:
        """The same in page-locked memory; DataLoader(pin_memory=True) calls it."""
        return self._map(lambda t: t.pin_memory())

    def to(self, device: Any, *, non_blocking: bool = False) -> Batch:
        """Every tensor moved to the device."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def _map(self, f: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            tokens=f(self.tokens),
            lengths=f(self.lengths),
            topk=self.topk._map(f),
            cu_seqlens=None if self.cu_seqlens is None else f(self.cu_seqlens),
            columns={name: f(value) for name, value in self.columns.items()},
        )


class Dataset(torch.utils.data.Dataset[Any]):
    """Sequence i of a cache, in commit order or in that of `keys`.

    cache: a Cache or its folder. keys: a choice of sequences. form: what a list of indices gives a DataLoader:
    "sequences" (a list of CachedSequence), or one Batch "padded" or "packed"; pass collate_fn=Dataset.as_is.
    max_tokens: rows behind so many tokens are left out. columns: names of further columns to read.

    Safe in forked, spawned and forkserver workers: what is sent to one is the path and the choice, and it opens the
    cache itself. Sequences that a writer commits later are not part of it; make another one for them.
    """

    def __init__(
        self,
        cache: Cache | str | os.PathLike[str],
        keys: Sequence[str] | None = None,
        *,
        form: str = "padded",
        max_tokens: int | None = None,
        columns: Sequence[str] = (),
    ) -> None:
        if form not in FORMS:
            raise ValueError(f"form is {form!r}, one of {', '.join(FORMS)} is accepted")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}, at least 1 is accepted")
        self.cache = cache if isinstance(cache, Cache) else Cache(cache)
        self.form, self.max_tokens, self.columns = form, max_tokens, tuple(columns)
        have = {column.name for column in self.cache.spec.columns}
        if missing := [name for name in self.columns if name not in have]:
            raise KeyError(f"no columns {missing} in {self.cache.path}, it has {sorted(have)}")
        self.chosen = keys is not None
        self.keys = list(keys) if keys is not None else self.cache.keys()
        if unknown := next((key for key in self.keys if key not in self.cache), None):
            raise KeyError(f"no sequence {unknown!r} in {self.cache.path}")

    def __getstate__(self) -> dict[str, Any]:
        if self.chosen:
            return dict(vars(self))
        return {**vars(self), "keys": (len(self.keys), _digest(self.keys))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if not self.chosen:
            n, digest = state["keys"]
            self.keys = self.cache.keys()[:n]  # later commits stand behind
            if _digest(self.keys) != digest:
                raise RuntimeError(f"{self.cache.path} lost or reordered sequences since the Dataset was made")

    def __len__(self) -> int:
        return len(self.keys)

    def rows(self, index: int) -> int:
        """Tokens of sequence `index`, at most max_tokens."""
        n = self.cache.length(self.keys[index])
        return n if self.max_tokens is None else min(n, self.max_tokens)

    def __getitem__(self, index: int) -> CachedSequence:
        one = self.batch([index], packed=True)
        return CachedSequence(one.keys[0], one.tokens.numpy().astype(np.int32), one.topk, one.columns)

    def __getitems__(self, indices: Sequence[int]) -> list[CachedSequence] | Batch:
        if self.form == "sequences":
            return [self[i] for i in indices]
        return self.batch(indices, packed=self.form == "packed")

    @staticmethod
    def as_is(batch: Any) -> Any:
        """For DataLoader(collate_fn=...): batches come made."""
        return batch

    def batch(self, indices: Sequence[int], *, packed: bool = False) -> Batch:
        """Tokens, rows and columns of several sequences; each block is read and checked once."""
        keys, rows = [self.keys[i] for i in indices], [self.rows(i) for i in indices]
        longest = max(rows, default=0)
        spec, total = self.cache.spec, sum(rows) if packed else len(rows) * longest
        buffers, tokens = Buffers.empty(spec, total), np.zeros(total, np.int32)
        start = 0
        for key, n in zip(keys, rows, strict=True):
            self.cache.read(key, tokens[start : start + n], buffers.part(spec, start, start + n))
            if packed:
                start += n
                continue
            buffers.part(spec, start + n, start + longest).clear()
            start += longest
        shape = (total,) if packed else (len(rows), longest)
        names = self.columns
        return Batch(
            keys,
            torch.from_numpy(tokens).long().view(*shape),
            torch.tensor(rows, dtype=torch.int64),
            buffers.topk(spec, shape),
            torch.from_numpy(np.cumsum([0, *rows], dtype=np.int32)) if packed else None,
            {name: self.cache.columns(keys, name, rows=rows, packed=packed) for name in names} if keys else {},
        )


def _digest(keys: list[str]) -> bytes:
    return hashlib.blake2b("\0".join(keys).encode(), digest_size=16).digest()


class ShuffledBatches:
    """Batches of indices 0 to n - 1 in an order drawn by (seed, epoch), for DataLoader(batch_sampler=...).

    batch_size is that of all ranks together: rank r of w takes the r-th w-th of each. The global order is therefore the
    same for any number of ranks and workers, and a run may go on with another number of them. No permutation is held:
    memory does not grow with n. rank, world: default from torch.distributed where it is initialised, else 0 of 1.

    drop_last: leave out a last batch that is not full; otherwise it is filled up from the beginning of the order.
    Iterating ends with the epoch, and then goes on with the next.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int | None = None,
        world: int | None = None,
        drop_last: bool = True,
        shuffle: bool = True,
    ) -> None:
        if (rank is None) != (world is None):
            raise ValueError(f"rank is {rank} and world is {world}: give both or neither")
        if rank is None or world is None:
            on = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if on else (0, 1)
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}: a rank is from 0 to the number of processes - 1")
        if n < 1 or batch_size < 1 or batch_size % world:
            raise ValueError(
                f"n is {n} and batch_size {batch_size} for {world} ranks: both must be at least 1, and batch_size, "
                "that of all ranks together, a multiple of their number"
            )
        self.n, self.batch_size, self.seed, self.rank, self.world = n, batch_size, seed, rank, world
        self.drop_last, self.shuffle = drop_last, shuffle
        self.epoch = self.start = self.handed_out = 0  # start, handed_out: batches of this epoch

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.n // self.batch_size if self.drop_last else -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = _Order(self.n, self.seed, self.epoch) if self.shuffle else None
        share = self.batch_size // self.world
        self.handed_out = self.start
        while self.handed_out < len(self):
            first = self.handed_out * self.batch_size + self.rank * share
            places = np.arange(first, first + share, dtype=np.uint64) % np.uint64(self.n)
            self.handed_out += 1
            yield [int(i) for i in (order(places) if order else places)]
        self.set_epoch(self.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """The next iteration gives all of `epoch`, which trainers call; nothing changes for the epoch it is in."""
        if epoch != self.epoch:
            self.epoch, self.start, self.handed_out = epoch, 0, 0

    def state_dict(self, trained: int | None = None) -> dict[str, int]:
        """Where to go on. trained: batches of this epoch that were trained on, counted by the training loop; DataLoader
        workers fetch ahead, so without workers alone may it be left out (then: all that were handed out)."""
        batches = self.handed_out if trained is None else trained
        if not 0 <= batches <= len(self):
            raise ValueError(f"trained is {batches}, an epoch has {len(self)} batches")
        samples = batches * self.batch_size
        return {"n": self.n, "batch_size": self.batch_size, "seed": self.seed, "epoch": self.epoch, "samples": samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on behind the samples that the state names, whatever the number of ranks was."""
        for name in ("n", "seed"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the state was saved with {name} = {state[name]}, this sampler has {getattr(self, name)}"
                )
        if state["samples"] % self.batch_size:
            raise ValueError(
                f"{state['samples']} samples were taken in batches of {state['batch_size']}: no whole number of "
                f"batches of {self.batch_size}; give the old batch_size, or one that divides this number"
            )
        self.epoch, self.start = state["epoch"], state["samples"] // self.batch_size
        self.handed_out = self.start


class _Order:
    """A permutation of 0 to n - 1 that is computed, not held: a Feistel network over the next even number of bits,
    applied again to what falls outside (Luby and Rackoff 1988; Black and Rogaway 2002)."""

    ROUNDS = 6

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        self.n = n
        self.half = np.uint64(max(1, (max(n - 1, 1).bit_length() + 1) // 2))
        self.mask = np.uint64((1 << int(self.half)) - 1)
        name = f"{seed}:{epoch}".encode()
        drawn = hashlib.blake2b(name, digest_size=8 * self.ROUNDS, person=b"potstill order").digest()
        self.keys = np.frombuffer(drawn, "<u8")

    def __call__(self, places: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """places uint64 [m] below n -> their indices [m]."""
        found = self._mix(places)
        while (outside := found >= self.n).any():
            found[outside] = self._mix(found[outside])
        return found

    def _mix(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x >> self.half, x & self.mask
        for key in self.keys:
            h = (right + key) * np.uint64(0x9E3779B97F4A7C15)
            h = (h ^ (h >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((h ^ (h >> np.uint64(32))) & self.mask)
        return (left << self.half) | right
