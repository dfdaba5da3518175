"""The vocabulary in parts: tiles over time (low_memory) and shards over processes (vocabulary-parallel) alike.

    1  every part    logits, their log-sum-exps; the teacher's K entries and the label where they lie in the part
       combine       log-add-exp over tiles; over processes one all-gather, and an all-reduce of [rows, K] entries
    2  every part    logits again, sums of terms and slopes (dense teachers; the K entries need no second pass)
       combine       sums over tiles; over processes one all-gather
    3  every part    logits again, their gradient, two products (in the backward pass)

With tiles, each step runs over all rows before the next one and a tile is the outer loop, so its head gradient is
summed in fp32 in [tile, D] and the processes meet twice a call, once more in backward for d_hidden. Without tiles, the
steps run chunk by chunk, the second from the same logits, and the processes meet twice a chunk. Between forward and
backward O(N) numbers are kept, and [N, K] of a sparse teacher. The peak beyond inputs and outputs is
O(chunk_rows * tile + N * (K + 10) + tile * D), in 16 bits also d_hidden in fp32: independent of V, and no [N, V].
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from potstill import dispatch, gemm
from potstill.chunked import Wanted, pieces
from potstill.parts_entries import entries_of, value_at
from potstill.parts_inputs import Group, PartTeacher, Projection, Rows, Shard
from potstill.rows import RowSpec
from potstill.rows_parts import part_of

CPU_ROWS, CPU_TILE = 512, 4096
CUDA_ROWS, CUDA_TILE = 4096, 16384


class Parts:
    """One call: its tensors, chunks of rows, tiles and kernels."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: PartTeacher, coef: Tensor,
                 labels: Tensor | None, spec: RowSpec, shard: Shard, rows: int, precise: bool,
                 backend: str):  # fmt: skip
        self.teacher, self.coef, self.labels, self.spec, self.shard = teacher, coef, labels, spec, shard
        self.group = Group(shard.group)
        device, n = hidden.device, len(hidden)
        cpu = device.type == "cpu"
        dtype = gemm.plan(device, hidden.dtype, precise).logit_dtype
        real = min(max(shard.vocab_size - shard.start, 0), len(weight))
        self.real = real
        width = min(real, CPU_TILE if cpu else CUDA_TILE) if shard.tiled else real
        if not rows and shard.tiled:
            rows = CPU_ROWS if cpu else CUDA_ROWS
        # the number of chunks, and with it of collectives, is the same in every process: never from the shard's width
        rows = rows or gemm.chunk_rows(device, -(-shard.vocab_size // self.group.size), dtype)
        self.tiles = [slice(v, min(v + width, real)) for v in range(0, real, width or 1)]
        self.chunks = list(enumerate(pieces(coef, rows)))
        most = max((p.stop - p.start if isinstance(p, slice) else len(p) for _, p in self.chunks), default=0)
        self.student = Projection(hidden, weight, bias, precise, most, width)
        self.other: Projection | None = None
        if teacher.hidden is not None:
            assert teacher.weight is not None
            self.other = Projection(teacher.hidden, teacher.weight, teacher.bias, precise, most, width)
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        none = torch.empty(n, 0, dtype=torch.int64, device=device)
        self.ids = teacher.ids if teacher.ids is not None else none

        def kernel(op: str) -> dispatch.Kernel:
            named = spec.divergence.name if op.startswith("dense") else None
            return dispatch.select(dispatch.Facts(op, device, dtype, width, divergence=named), backend)

        self.lse = kernel("part_lse").run
        if teacher.dense:
            self.sums, self.dense_grad = kernel("dense_part_sums").run, kernel("dense_part_grad").run
        else:
            self.sparse_grad = kernel("sparse_part_grad").run

    def teacher_logits(self, number: int, piece: Rows, tile: slice) -> Tensor:
        if self.other is not None:
            return self.other(number, piece, tile)
        assert self.teacher.logits is not None
        return self.teacher.logits[:, tile][piece]

    def local(self, ids: Tensor, tile: slice) -> Tensor:
        """ids of the whole vocabulary as columns of the tile; < 0 or >= its width elsewhere."""
        return torch.where(ids >= 0, ids - (self.shard.start + tile.start), -1)

    # ---- forward

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """(parts [2, N], stats [5, N] fp64, entries [N, K])."""
        n, device = len(self.coef), self.coef.device
        f64 = torch.float64
        # student's log-sum-exp at T (of the columns outside the K for a bucket), teacher's, student's at 1
        self.lses = torch.full((3, n), -torch.inf, dtype=f64, device=device)
        self.at_label = torch.zeros(n, dtype=f64, device=device)
        self.found = torch.zeros(self.ids.shape, dtype=self.wide, device=device)  # student's logits of the K entries
        self.totals = torch.zeros(2, n, dtype=f64, device=device)
        self.parts = torch.zeros(2, n, dtype=self.wide, device=device)
        self.stats = torch.zeros(5, n, dtype=f64, device=device)
        self.entries = torch.zeros(self.ids.shape, dtype=self.wide, device=device)
        at_once = [self.chunks] * bool(self.chunks) if self.shard.tiled else [[chunk] for chunk in self.chunks]
        for chunks in at_once:
            at: Rows = slice(0, n) if self.shard.tiled else chunks[0][1]
            for tile in self.tiles:
                for number, piece in chunks:
                    self.measure(number, piece, tile)
            self.meet(at)
            if self.teacher.dense:
                for tile in self.tiles:
                    for number, piece in chunks:
                        self.add_up(number, piece, tile)
                self.totals[:, at] = self.group.gather(self.totals[:, at]).sum(0)
            for _, piece in chunks:
                self.finish(piece)
        return self.parts, self.stats, self.entries

    @property
    def tempered(self) -> bool:
        return bool(self.spec.ce_weight) and self.spec.temperature != 1

    def measure(self, number: int, piece: Rows, tile: slice) -> None:
        """Step 1 on one chunk and tile."""
        x, t = self.student(number, piece, tile), self.spec.temperature
        side = part_of(self.spec, tile.stop - tile.start).student
        ids = self.local(self.ids[piece], tile)
        found = [self.lse(x, side, t, ids if ids.shape[1] and self.spec.tail == "bucket" else None), None, None]
        if self.teacher.dense:
            assert self.spec.teacher is not None
            y = self.teacher_logits(number, piece, tile)
            found[1] = self.lse(y, replace(self.spec.teacher, vocab_size=side.vocab_size), t)
        if self.tempered:
            found[2] = self.lse(x, side, 1.0)
        for whole, part in zip(self.lses, found, strict=True):
            if part is not None:
                whole[piece] = torch.logaddexp(whole[piece], part)
        if ids.shape[1]:
            self.found[piece] += value_at(x, ids, (ids >= 0) & (ids < side.vocab_size), side)
        if self.spec.ce_weight:
            assert self.labels is not None
            label = self.local(self.labels[piece], tile)[:, None]
            self.at_label[piece] += value_at(x, label, (label >= 0) & (label < side.vocab_size), side)[:, 0].double()

    def meet(self, at: Rows) -> None:
        """Combine step 1 over the processes."""
        if self.group.size == 1:
            return
        rows = torch.cat([self.lses, self.at_label[None]])[:, at]
        every = self.group.gather_shards(rows, self.shard, self.real)
        self.lses[:, at], self.at_label[at] = every[:, :3].logsumexp(0), every[:, 3].sum(0)
        if self.ids.shape[1]:
            self.found[at] = self.group.sum_(self.found[at].contiguous())

    def add_up(self, number: int, piece: Rows, tile: slice) -> None:
        """Step 2 on one chunk and tile."""
        x, y = self.student(number, piece, tile), self.teacher_logits(number, piece, tile)
        spec = part_of(self.spec, tile.stop - tile.start)
        self.totals[:, piece] += self.sums(x, y, *self.lses[:2, piece], self.coef[piece], spec)

    def finish(self, piece: Rows) -> None:
        """Results of the rows and what their backward needs."""
        d, spec = self.spec.divergence, self.spec
        scale = spec.distill_weight / spec.temperature
        lse, lse_t, lse_1 = self.lses[:, piece]
        if self.teacher.dense:
            value, total = self.totals[:, piece]
            value, factor = d.outer(value, total, *d.values) if d.outer else (value, 1.0)
            stats = [lse, lse_t, total, scale * factor + 0 * lse]
        elif self.teacher.ids is not None:
            value, lse, stats, entries = entries_of(
                self.teacher, piece, self.found[piece], lse, self.shard.vocab_size, spec, scale
            )
            self.entries[piece] = entries.to(self.wide)
        else:
            value, stats = torch.zeros_like(lse), [lse, lse, 0 * lse, 0 * lse]
        lse_1 = lse_1 if self.tempered else lse
        live = self.coef[piece] != 0
        self.parts[0, piece] = torch.where(live, value, 0.0).to(self.wide)
        if spec.ce_weight:
            assert self.labels is not None
            known = (self.labels[piece] >= 0) & (self.labels[piece] < self.shard.vocab_size)
            ce = torch.where(known, lse_1 - self.at_label[piece], float("nan"))
            self.parts[1, piece] = torch.where(live, ce, 0.0).to(self.wide)
        self.stats[:, piece] = torch.stack([*stats, lse_1])

    # ---- backward

    def backward(self, stats: Tensor, entries: Tensor, want: Wanted) -> tuple[Tensor, Tensor, Tensor]:
        """(d_hidden [N, D], d_weight [V, D], d_bias [V]) of the shard; one that is not wanted is empty."""
        hidden, weight = self.student.hidden, self.student.weight
        how, dtype, device = self.student.how, hidden.dtype, hidden.device
        acc_hidden = torch.zeros(hidden.shape if want.hidden else 0, dtype=self.wide, device=device)
        d_weight = torch.zeros(weight.shape if want.weight else 0, dtype=dtype, device=device)
        d_bias = torch.zeros(len(weight) if want.bias else 0, dtype=dtype, device=device)
        grads = self.student.buffer
        if how.grad_dtype != how.logit_dtype:
            grads = torch.empty_like(grads, dtype=how.grad_dtype)
        for tile in self.tiles if self.chunks else ():
            columns = tile.stop - tile.start
            acc = torch.empty(0)
            if want.weight:
                own = d_weight.dtype == self.wide
                acc = d_weight[tile] if own else torch.empty(columns, hidden.shape[1], dtype=self.wide, device=device)
            acc_bias = torch.zeros(columns, dtype=self.wide, device=device)
            for number, piece in self.chunks:
                x = self.student(number, piece, tile)
                grad = grads[: x.numel()].view(x.shape)
                self.gradient(number, piece, tile, x, stats, entries, grad)
                self.student.holds = None
                if want.hidden:
                    add_hidden_gradient(acc_hidden, piece, grad, *self.student.weight_of(tile))
                if want.weight:
                    gemm.weight_gradient_add(acc, grad, hidden[piece], number == 0)
                if want.bias:
                    acc_bias += grad.sum(0, dtype=self.wide)
            if want.weight and acc.dtype != d_weight.dtype:
                d_weight[tile] = acc.to(d_weight.dtype)
            if want.bias:
                d_bias[tile] = acc_bias.to(d_bias.dtype)
        if want.hidden:
            self.group.sum_(acc_hidden)
        return acc_hidden.to(dtype), d_weight, d_bias

    def gradient(self, number: int, piece: Rows, tile: slice, x: Tensor, stats: Tensor, entries: Tensor,
                 grad: Tensor) -> None:  # fmt: skip
        """Step 3 on one chunk and tile: grad [R, C]."""
        spec = part_of(self.spec, tile.stop - tile.start)
        coef, labels = self.coef[piece], None
        *four, lse_1 = stats[:, piece]
        if spec.ce_weight:
            assert self.labels is not None
            labels = self.local(self.labels[piece], tile)
        if self.teacher.dense:
            y = self.teacher_logits(number, piece, tile)
            self.dense_grad(x, y, *four, coef, labels, lse_1, spec, grad)
        else:
            ids = self.local(self.ids[piece], tile)
            self.sparse_grad(x, ids, entries[piece], *four, coef, labels, lse_1, spec, grad)


def add_hidden_gradient(acc: Tensor, piece: Rows, grad: Tensor, weight: Tensor, how: gemm.Plan) -> None:
    """acc [N, D] at the rows `piece` += grad [R, C] @ weight [C, D]; acc is fp32 or fp64."""
    if isinstance(piece, slice) and grad.dtype == acc.dtype == weight.dtype:
        acc[piece].addmm_(grad, weight)
        return
    if grad.is_cuda and grad.dtype != acc.dtype and gemm.cuda_has_fp32_out():
        product = torch.mm(grad, weight, out_dtype=acc.dtype)
    else:
        product = torch.empty(len(grad), weight.shape[1], dtype=grad.dtype, device=grad.device)
        gemm.hidden_gradient_into(product, grad, weight, how)
    acc[piece] += product.to(acc.dtype)


def linear_parts(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: PartTeacher, coef: Tensor, labels: Tensor | None,
    spec: RowSpec, shard: Shard, rows: int, precise: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """hidden [N, D], weight [V, D] -> (parts [2, N], stats [5, N] fp64, entries [N, K]); see chunked.linear_rows.

    stats and entries are what linear_parts_backward takes. rows = 0: from a budget. In a process group every process
    calls it with the same hidden, coef, labels, spec and sparse teacher, and gets the same parts.
    """
    with torch.autocast(hidden.device.type, enabled=False), torch.no_grad():
        call = Parts(hidden, weight, bias, teacher, coef, labels, spec, shard, rows, precise, backend)
        return call.forward()


def linear_parts_backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: PartTeacher, coef: Tensor, labels: Tensor | None,
    stats: Tensor, entries: Tensor, spec: RowSpec, shard: Shard, want: Wanted, rows: int, precise: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(d_hidden [N, D] of the whole vocabulary, d_weight [V, D] and d_bias [V] of the shard).

    The gradients are those of `sum(coef * (distill_weight * parts[0] + ce_weight * parts[1]))`.
    """
    with torch.autocast(hidden.device.type, enabled=False), torch.no_grad():
        call = Parts(hidden, weight, bias, teacher, coef, labels, spec, shard, rows, precise, backend)
        return call.backward(stats, entries, want)
