"""What the part engine works on: the teacher, the shard, the processes, and logits of some rows against a tile."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from potstill import gemm

Rows = Tensor | slice
CHECKED: set[tuple[str, int, int, int]] = set()


@dataclass(frozen=True)
class PartTeacher:
    """A teacher of N rows: hidden, logits, ids, or nothing (cross-entropy alone). Weight and logits hold this shard."""

    hidden: Tensor | None = None  # [N, Dt] with weight [Vt, Dt] and bias [Vt]
    weight: Tensor | None = None
    bias: Tensor | None = None
    logits: Tensor | None = None  # [N, Vt]
    ids: Tensor | None = None  # [N, K] of the whole vocabulary, with log_probs [N, K] at the loss's temperature
    log_probs: Tensor | None = None
    log_rest: Tensor | None = None  # [N] for tail "bucket"
    weights: Tensor | None = None  # [N, K] for tail "sampled"

    @property
    def dense(self) -> bool:
        return self.hidden is not None or self.logits is not None


@dataclass(frozen=True)
class Shard:
    """Which part of the vocabulary this process holds.

    vocab_size: entries of the whole vocabulary; start: id of the head's first row; group: name of the process group
    that holds the others ("": none); tiled: whether the shard is worked on in tiles.
    """

    vocab_size: int
    start: int = 0
    group: str = ""
    tiled: bool = True


class Group:
    """The processes that hold the other shards; every collective gives all of them the same bits."""

    def __init__(self, name: str):
        self.name, self.size = name, 1
        self.group: Any = None
        if name:
            from torch.distributed import distributed_c10d, get_world_size

            self.group = distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
            self.size = get_world_size(self.group)

    def gather(self, x: Tensor) -> Tensor:
        """x of every process: [size, *x.shape], in order of rank."""
        if self.group is None:
            return x[None]
        found = [torch.empty_like(x) for _ in range(self.size)]
        torch.distributed.all_gather(found, x.contiguous(), group=self.group)
        return torch.stack(found)

    def gather_shards(self, x: Tensor, shard: Shard, rows: int) -> Tensor:
        """x [S, R] fp64 of every process: [size, S, R]. Where its shard lies goes with it; checked once."""
        stop = shard.start + rows
        bounds = torch.tensor([[shard.start], [stop]], dtype=x.dtype, device=x.device).expand(2, x.shape[1])
        every = self.gather(torch.cat([x, bounds]))
        key = (self.name, shard.vocab_size, shard.start, stop)
        if key not in CHECKED:  # looks at the numbers: a synchronisation, so not at every call
            check_shards([(int(a), int(b)) for a, b in every[:, -2:, 0].tolist()], shard.vocab_size)
            CHECKED.add(key)
        return every[:, :-2]

    def sum_(self, x: Tensor) -> Tensor:
        """x becomes the sum over the processes."""
        if self.group is not None:
            torch.distributed.all_reduce(x, group=self.group)
        return x


def check_shards(shards: list[tuple[int, int]], vocab_size: int) -> None:
    """Raise ValueError unless the ids [start, stop) of all processes are the vocabulary, each id once."""
    at = 0
    for start, stop in sorted(s for s in shards if s[0] < s[1]):
        if start != at:
            break
        at = stop
    else:
        if at == vocab_size:
            return
    raise ValueError(
        f"the shards hold the ids [start, stop) {shards} by rank; they must be 0..{vocab_size - 1}, each id once"
    )


class Projection:
    """One side's logits, some rows against a tile at a time, in a buffer that is used again."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, precise: bool, rows: int, width: int):
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.how = gemm.plan(hidden.device, hidden.dtype, precise)
        self.buffer = torch.empty(rows * width, dtype=self.how.logit_dtype, device=hidden.device)
        self.width = width
        self.tile: slice | None = None
        self.holds: tuple[int, slice] | None = None

    def weight_of(self, tile: slice) -> tuple[Tensor, gemm.Plan]:
        """The tile's weight [C, D] and how products with it run; widened once a tile where products are fp32."""
        if self.tile != tile:
            self.tile, self.tile_weight, self.tile_how = tile, self.weight[tile], self.how
            if self.how.widen and self.width <= gemm.TILE:
                self.tile_weight = self.tile_weight.to(self.how.logit_dtype)
                self.tile_how = replace(self.how, widen=False)
        return self.tile_weight, self.tile_how

    def __call__(self, number: int, piece: Rows, tile: slice) -> Tensor:
        """[R, C] of the rows `piece`, chunk `number`; computed again only when the buffer holds others."""
        h = self.hidden[piece]
        columns = tile.stop - tile.start
        out = self.buffer[: len(h) * columns].view(len(h), columns)
        if self.holds != (number, tile):
            weight, how = self.weight_of(tile)
            if how is not self.how:
                h = h.to(weight.dtype)
            gemm.logits_into(out, h, weight, None if self.bias is None else self.bias[tile], how)
            self.holds = (number, tile)
        return out
