"""A teacher form, checked against the student's rows, as the tensors and the plan that an op takes (targets.py)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from potstill.divergences import Divergence
from potstill.mixtures import Masked, Mix, OneHot, Student, Teacher, Uniform
from potstill.parts_arguments import same_shard
from potstill.rows import COMPLETE, Side
from potstill.teachers import HiddenTeacher, LogitsTeacher, TopK

if TYPE_CHECKING:
    from potstill.arguments import Call

SPARSE_TEMPERATURE = (
    "the mass outside the K entries at that temperature was not recorded; capture it with "
    "ps.topk(..., temperatures=({0},)), name an approximation with TopK.with_estimated_rest({0}, vocab_size), use "
    "temperature=1.0, or tail='renormalize'"
)


def written(node: Any) -> str:
    """JSON of a plan, by code that torch.compile can trace (json.dumps is C)."""
    if node is None:
        return "null"
    if isinstance(node, dict):
        return "{" + ", ".join([f'"{k}": {written(v)}' for k, v in node.items()]) + "}"
    if isinstance(node, list):
        return "[" + ", ".join([written(x) for x in node]) + "]"
    return f'"{node}"' if isinstance(node, str) else str(node)


class Encoder:
    """Collects tensors, flattened to rows and detached, as a plan is put together."""

    def __init__(self, call: Call):
        self.call = call
        self.tensors: list[Tensor] = []
        self.numbers: list[float] = []

    def number(self, x: float) -> int:
        """The place of a number; not in the plan, which torch.compile holds constant."""
        self.numbers.append(float(x))
        return len(self.numbers) - 1

    def place(self, x: Tensor | None) -> int | None:
        if x is None:
            return None
        self.tensors.append(x.detach())
        return len(self.tensors) - 1

    def side(self, side: Side) -> list[int]:
        own = self.call.side
        if side.vocab_size != own.vocab_size:
            raise ValueError(
                f"the teacher's vocabulary has {side.vocab_size} entries and the student's {own.vocab_size}; where one "
                "is padded, give the true size to both: Head(..., vocab_size=n), LogitsTeacher(..., vocab_size=n)"
            )
        return [self.number(side.vocab_size), self.number(side.scale), self.number(side.softcap)]

    def source(self, t: Any) -> list[Any]:
        """The plan of one source. No `match` here: torch.compile before 2.7 does not know it."""
        call = self.call
        if isinstance(t, HiddenTeacher):
            from potstill.arguments import promote

            hidden, weight, bias = promote(t.hidden, t.head, shard=call.shard is not None)
            same_shard(call.shard, t.head)
            if hidden.shape[-1] != weight.shape[1]:
                raise ValueError(
                    f"the teacher's hidden has shape {list(hidden.shape)}; its last size must be its head's "
                    f"D = {weight.shape[1]}"
                )
            call.check_rows("the teacher's hidden", hidden, 1)
            side = self.side(t.head.side)
            places = (self.place(hidden.reshape(-1, hidden.shape[-1])), self.place(weight), self.place(bias))
            return ["hidden", *places, side]
        if isinstance(t, LogitsTeacher):
            call.check_rows("the teacher's logits", t.logits, 1)
            return ["logits", self.place(t.logits.reshape(-1, t.logits.shape[-1])), self.side(t.side)]
        if isinstance(t, Student):
            return ["student"]
        if isinstance(t, Uniform):
            return ["uniform"]
        if isinstance(t, OneHot):
            call.check_rows("OneHot's labels", t.labels)
            return ["onehot", self.place(t.labels.reshape(-1).long())]
        if isinstance(t, TopK):
            return ["entries", *(self.place(x) for x in self.entries(t)), self.place(self.rows(t.log_rest))]
        if isinstance(t, Mix):
            terms = []
            for a, source, temperature in t.terms:
                if isinstance(a, Tensor) and a.dim():
                    call.check_rows("a coefficient of Mix", a)
                    a = a.reshape(-1)
                elif not isinstance(a, Tensor):
                    a = torch.full((), float(a), dtype=call.wide, device=call.device)
                terms.append([self.place(a), self.number(temperature), self.source(source)])
            return ["mix", t.space, t.tail, terms]
        raise AssertionError(t)

    def rows(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().reshape(-1).to(self.call.wide)

    def entries(self, t: TopK) -> tuple[Tensor, Tensor]:
        """ids [N, K] int64 and log_probs [N, K] at T = 1."""
        from potstill.arguments import check_ids

        self.call.check_rows("the teacher's ids", t.ids, 1)
        if t.k == 0:
            raise ValueError(
                "the TopK has rows without entries (k = 0), as a cache of `potstill build --xtok` or `potstill score`; "
                "they hold the realised tokens' log-probabilities alone, for potstill.xtok.alm_loss and "
                "potstill.methods.scoring"
            )
        ids = t.ids.reshape(-1, t.k).long()
        check_ids("the teacher's ids", ids, self.call.side.vocab_size, -1)
        return ids, t.log_probs.detach().reshape(-1, t.k).to(self.call.wide)

    def topk(self, t: TopK, metrics: tuple[str, ...]) -> list[Any]:
        """The plan of a sparse teacher at the loss's temperature."""
        call = self.call
        ids, at_one = self.entries(t)
        log_probs, log_rest, weights = at_one, None, None
        if not isinstance(call.divergence, Divergence):
            log_probs = at_one / call.teacher_temperature
        elif call.tail == "renormalize":
            log_probs = at_one / call.teacher_temperature
            total = log_probs.logsumexp(-1, keepdim=True)
            log_probs = log_probs - torch.where(total == -math.inf, 0.0, total)
        elif call.tail == "sampled":
            weights = self._weights(t, at_one)
        else:
            log_probs, log_rest = self._at_temperature(t, at_one)
        first = self.place(ids), self.place(log_probs), self.place(log_rest), self.place(weights)
        if not metrics:
            return ["topk", *first, None, None]
        return ["topk", *first, self.place(at_one), self.place(self.rows(t.log_rest))]

    def _at_temperature(self, t: TopK, log_probs: Tensor) -> tuple[Tensor, Tensor | None]:
        """log_probs [N, K] and, for a bucket, log_rest [N] at the teacher's temperature."""
        temperature, tail = self.call.teacher_temperature, self.call.tail
        if temperature == 1:
            if tail == "bucket" and t.log_rest is None:
                raise ValueError(
                    "tail='bucket' needs TopK.log_rest, the log of the mass outside the K entries; give it, or choose "
                    "tail='renormalize' or 'drop'"
                )
            return log_probs, self.rows(t.log_rest) if tail == "bucket" else None
        rest = self.rows(t.log_rest_at.get(temperature))
        if rest is None:
            recorded = sorted({1.0, *t.log_rest_at})
            raise ValueError(
                f"temperature={temperature} with a TopK teacher and tail={tail!r}, recorded at {recorded}: "
                + SPARSE_TEMPERATURE.format(temperature)
            )
        scaled = log_probs / temperature
        inside = scaled.logsumexp(-1)  # of p^(1/T); the K entries have the mass 1 - exp(rest) of the whole
        empty = inside == -math.inf
        log_mass = torch.log(-torch.expm1(rest))
        norm = torch.where(empty, 0.0, inside - torch.where(empty, 0.0, log_mass))
        return scaled - norm[:, None], rest if tail == "bucket" else None

    def _weights(self, t: TopK, log_probs: Tensor) -> Tensor:
        """[N, K]: what multiplies each drawn entry's term, so that the sum estimates that over the vocabulary."""
        call = self.call
        if call.teacher_temperature != 1:
            raise ValueError(
                f"temperature={call.teacher_temperature} with tail='sampled': the entries' probabilities at that "
                "temperature are not known; use 1.0 (and draw at any temperature)"
            )
        given = t.ids.reshape(-1, t.k) >= 0
        estimator = call.divergence.kind == "estimator"
        if t.counts is None and not estimator:
            raise ValueError("tail='sampled' needs TopK.counts, how often each entry was drawn (see potstill.sample)")
        counts = given if t.counts is None else t.counts.reshape(-1, t.k).clamp(min=0) * given
        share = counts.to(call.wide)
        share = share / share.sum(-1, keepdim=True).clamp(min=1)
        if estimator:
            return share
        share = torch.where(given, share * (-log_probs / t.sample_temperature).exp(), 0.0)
        if t.sample_temperature == 1:
            return share
        mass = (share * torch.where(given, log_probs.exp(), 0.0)).sum(-1, keepdim=True)
        return torch.where(mass > 0, share / mass, 0.0)


def encode(
    call: Call, teacher: Teacher | None, metrics: tuple[str, ...]
) -> tuple[list[Tensor], list[float], str, Tensor | None]:
    """(tensors, numbers, plan, bounds) of a teacher; see targets.py."""
    encoder = Encoder(call)
    bounds = softness = None
    if isinstance(teacher, Masked):
        limits = []
        for bound, name in ((teacher.lower, "lower"), (teacher.upper, "upper")):
            bound = torch.as_tensor(bound, dtype=call.wide, device=call.device)
            if bound.dim():
                call.check_rows(f"Masked {name}", bound)
            limits.append(bound.expand(call.lead).reshape(-1))
        bounds, softness, teacher = torch.stack(limits), teacher.softness, teacher.teacher
    if teacher is None:
        none = torch.empty(math.prod(call.lead), 0, dtype=call.wide, device=call.device)
        source = ["topk", encoder.place(none.long()), encoder.place(none), None, None, None, None]
    elif isinstance(teacher, TopK):
        source = encoder.topk(teacher, metrics)
    else:
        source = encoder.source(teacher)
    ratio = call.temperature / call.teacher_temperature
    masked = None if softness is None else encoder.number(softness)
    plan = written({"source": source, "ratio": encoder.number(ratio), "masked": masked})
    return encoder.tensors, encoder.numbers, plan, bounds


def check_objective(call: Call, teacher: Teacher | None, backend: str) -> None:
    """Raise where the divergence, the teacher's form, the tail and the backend do not go together."""
    d, sparse = call.divergence, isinstance(teacher, TopK)
    if isinstance(d, Divergence):
        if d.kind == "estimator" and not (sparse and call.tail == "sampled"):
            raise ValueError(
                f"divergence={d.name!r} is an estimate from sampled tokens: give TopK(ids=tokens[..., None], "
                "log_probs=teacher_log_probs[..., None]) and tail='sampled'"
            )
        if d.outer and sparse and call.tail not in COMPLETE:
            raise ValueError(
                f"divergence={d.name!r} is no sum over the vocabulary, so tail={call.tail!r} cannot stand for a part "
                "of it; use tail='bucket' or 'renormalize'"
            )
    elif teacher is not None and ("sparse" if sparse else "dense") not in d.takes:
        raise ValueError(
            f"divergence={d.name!r} takes "
            + (
                "a TopK; extract it with potstill.topk or linear_topk"
                if sparse is False
                else "a dense teacher, no TopK"
            )
        )
    if isinstance(teacher, Masked) and (not isinstance(d, Divergence) or d.name == "soft_cross_entropy"):
        raise ValueError(f"divergence={d.name!r} cannot be masked; take a divergence that is a sum (forward_kl for it)")
    by_torch = not isinstance(d, Divergence) or isinstance(teacher, Masked)
    if by_torch and backend not in ("auto", "torch"):
        what = "a Masked teacher" if isinstance(teacher, Masked) else f"divergence={d.name!r}"
        raise ValueError(f"backend={backend!r}: {what} is computed in torch; use backend='auto'")
