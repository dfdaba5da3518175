"""What a loss compares the student with: teacher forms to tensors and a plan, and the plan run on a chunk of rows.

An op takes a teacher as a list of tensors, a list of numbers, and a plan, JSON text, that says what they are:
    ["hidden", hidden, weight, bias | null, side]     ["logits", logits, side]     ["student"]     ["uniform"]
    ["onehot", labels]     ["entries", ids, log_probs, log_rest | null]     side = [vocab_size, scale, softcap]
    ["mix", space, tail, [[coefficient, temperature, source], ...]]
    ["topk", ids, log_probs, log_rest | null, weights | null, log_probs at T=1, log_rest at T=1 | null]
where a name is a place in a list, of numbers for side, temperature, ratio and softness. "topk" stands alone: it is the
sparse form; all others give dense logits. The plan is
    {"source": one of these, "ratio": T / teacher_temperature, "masked": softness | null}
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from potstill import gemm
from potstill.reference.rows import apply_side
from potstill.rows import RowSpec, Side

NEG_INF = float("-inf")


@lru_cache(maxsize=256)
def parse(plan: str) -> Any:
    return json.loads(plan)


class Target:
    """A plan with its tensors, for chunks of at most `rows` rows of V student columns."""

    def __init__(
        self, tensors: list[Tensor], numbers: list[float], plan: str, student: Side, device: torch.device,
        dtype: torch.dtype, rows: int, precise: bool,
    ):  # fmt: skip
        read = parse(plan)
        self.tensors, self.numbers, self.source = tensors, numbers, read["source"]
        self.ratio = numbers[read["ratio"]]
        self.softness = None if read["masked"] is None else numbers[read["masked"]]
        self.student, self.device, self.precise, self.rows = student, device, precise, rows
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.sparse = self.source[0] == "topk"
        self.buffers: dict[str, Tensor] = {}

    def at(self, place: int | None, piece: Any) -> Tensor | None:
        return None if place is None else self.tensors[place][piece]

    def side(self, places: list[int]) -> Side:
        vocab_size, scale, softcap = (self.numbers[i] for i in places)
        return Side(int(vocab_size), scale, softcap)

    def entries(self, piece: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """ids, log_probs, log_rest and weights of a sparse teacher's rows, at the loss's temperature."""
        _, ids, log_probs, log_rest, weights, *_ = self.source
        return (
            self.tensors[ids][piece],
            self.tensors[log_probs][piece],
            self.at(log_rest, piece),
            self.at(weights, piece),
        )

    def entries_at_one(self, piece: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """ids, log_probs and log_rest at T = 1."""
        _, ids, _, _, _, log_probs, log_rest = self.source
        return self.tensors[ids][piece], self.tensors[log_probs][piece], self.at(log_rest, piece)

    @property
    def teacher_side(self) -> Side:
        """How what `dense` returns becomes logits at T = 1."""
        if self.source[0] in ("hidden", "logits"):
            return self.side(self.source[-1])
        return self.student if self.source[0] == "student" else Side(self.student.vocab_size)

    def dense(self, piece: Any, student: Tensor, spec: RowSpec) -> tuple[Tensor, RowSpec]:
        """Raw logits [R, V'] of a dense teacher's rows, and spec with its side; student [R, V]: its raw logits."""
        mix = self.source[0] == "mix"
        logits = self._mix(piece, student) if mix else self._raw(self.source, piece, student)[0]
        return logits, replace(spec, teacher=scaled(self.teacher_side, self.ratio))

    def _buffer(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        held = self.buffers.get(name)
        if held is None or held.shape[1] != shape[1] or held.dtype != dtype:
            held = torch.empty((max(self.rows, shape[0]), shape[1]), dtype=dtype, device=self.device)
            self.buffers[name] = held
        return held[: shape[0]]

    def _raw(self, source: list[Any], piece: Any, student: Tensor) -> tuple[Tensor, Side]:
        match source:
            case ["hidden", hidden, weight, bias, side]:
                h, w = self.tensors[hidden][piece], self.tensors[weight]
                how = gemm.plan(self.device, h.dtype, self.precise)
                logits = self._buffer(f"logits{len(w)}", (len(h), len(w)), how.logit_dtype)
                gemm.logits_into(logits, h, w, None if bias is None else self.tensors[bias], how)
                return logits, self.side(side)
            case ["logits", logits, side]:
                return self.tensors[logits][piece], self.side(side)
            case ["student"]:
                return student, self.student
        raise AssertionError(source)

    def _mix(self, piece: Any, student: Tensor) -> Tensor:
        """[R, vocab_size] in fp32 (fp64): logits, or log-probabilities, which are logits too."""
        _, space, tail, terms = self.source
        total = self._buffer("mix", (len(student), self.student.vocab_size), self.wide)
        for i, (coefficient, place, source) in enumerate(terms):
            temperature = self.numbers[place]
            a = self.tensors[coefficient].to(self.wide)
            a = a[piece][:, None] if a.dim() else a
            if space == "logits":
                z = self._logits(source, temperature, piece, student)
                part = torch.where(z == NEG_INF, z, z * a)  # an entry banned by one source is banned
                part = torch.where(a == 0, 0.0, part)
                total.copy_(part) if i == 0 else total.add_(part)
                continue
            lp = self._log_probs(source, temperature, piece, student, tail) + a.log()
            total.copy_(lp) if i == 0 else torch.logaddexp(total, lp, out=total)
        return total

    def _logits(self, source: list[Any], temperature: float, piece: Any, student: Tensor) -> Tensor:
        raw, side = self._raw(source, piece, student)
        z = apply_side(raw, side)[0].to(self.wide)
        return z / temperature if temperature != 1 else z

    def _log_probs(self, source: list[Any], temperature: float, piece: Any, student: Tensor, tail: str) -> Tensor:
        v = self.student.vocab_size
        match source:
            case ["uniform"]:
                return torch.full((1, 1), -math.log(v), dtype=self.wide, device=self.device)
            case ["onehot", labels]:
                column = self.tensors[labels][piece]
                known = (column >= 0) & (column < v)
                lp = torch.full((len(column), v), NEG_INF, dtype=self.wide, device=self.device)
                return lp.scatter_(1, torch.where(known, column, 0)[:, None], 0.0)
            case ["entries", ids, log_probs, log_rest]:
                return self._entries(
                    self.tensors[ids][piece], self.tensors[log_probs][piece], self.at(log_rest, piece), tail
                )
        return self._logits(source, temperature, piece, student).log_softmax(-1)

    def _entries(self, ids: Tensor, log_probs: Tensor, log_rest: Tensor | None, tail: str) -> Tensor:
        """A TopK written out: [R, V] log-probabilities, the rest spread evenly or dropped."""
        v = self.student.vocab_size
        given = ids >= 0
        log_probs = torch.where(given, log_probs.to(self.wide), NEG_INF)
        if tail == "uniform":
            assert log_rest is not None
            others = (v - given.sum(-1)).to(self.wide)
            fill = torch.where(others > 0, log_rest.to(self.wide) - others.clamp(min=1).log(), NEG_INF)
        else:
            log_probs = log_probs.log_softmax(-1)
            fill = torch.full((len(ids),), NEG_INF, dtype=self.wide, device=self.device)
        out = fill[:, None].expand(-1, v + 1).contiguous()  # one column more takes the missing entries
        return out.scatter_(1, torch.where(given, ids, v).long(), log_probs)[:, :v]


def scaled(side: Side, ratio: float) -> Side:
    """The side whose logits are `ratio` times those of `side`."""
    return side if ratio == 1 else Side(side.vocab_size, side.scale * ratio, side.softcap * ratio)
