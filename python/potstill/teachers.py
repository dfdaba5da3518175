"""The nouns of the three flows: Head, and the forms a teacher can take."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from potstill.rows import Side


def _side(vocab_size: int, logit_scale: float, softcap: float | None) -> Side:
    return Side(vocab_size, float(logit_scale), float(softcap or 0.0))


def _check_vocab_size(vocab_size: int | None, columns: int, what: str) -> int:
    if vocab_size is None:
        return columns
    if not 1 <= vocab_size <= columns:
        raise ValueError(f"vocab_size={vocab_size} is outside 1..{columns}, the columns of {what}")
    return int(vocab_size)


@dataclass(frozen=True, eq=False)
class Head:
    """The output projection of a language model: hidden states to logits.

    weight: [V, D] floating point.  bias: [V] or None.
    logit_scale multiplies the projection, then softcap (if given) bounds it:
    `z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)`.
    vocab_size: entries from this row on are padding of the matrix, get no probability mass and gradient 0.

    One shard of a head that is cut along the vocabulary over processes: `weight` and `bias` are its rows, `vocab_start`
    the id of the first of them, `group` the torch.distributed group that holds the others, `vocab_size` the size of the
    whole vocabulary. The shards follow each other without gap or overlap, and may differ in size.

    Raises ValueError on shapes that do not fit, TypeError on a sharded (DTensor) or non-floating weight.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = field(default=1.0, kw_only=True)
    softcap: float | None = field(default=None, kw_only=True)
    vocab_size: int | None = field(default=None, kw_only=True)
    vocab_start: int | None = field(default=None, kw_only=True)
    group: Any = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        w = self.weight
        if not isinstance(w, Tensor) or not w.is_floating_point():
            given = f"{describe(w)}; give Head(layer.weight, layer.bias)" if hasattr(w, "weight") else describe(w)
            raise TypeError(f"Head weight must be a floating-point tensor [V, D], not {given}")
        if type(w).__name__ == "DTensor" or (self.bias is not None and type(self.bias).__name__ == "DTensor"):
            raise TypeError(
                "Head weight or bias is a sharded DTensor; gather it with potstill.distributed.materialized_head(model)"
            )
        if w.dim() != 2 or 0 in w.shape:
            raise ValueError(
                f"Head weight has shape {list(w.shape)}; it must be [V, D] with V, D > 0 (an empty weight is usually "
                "a ZeRO-3 or FSDP shard: gather it with potstill.distributed.materialized_head(model))"
            )
        if self.bias is not None and (self.bias.shape != w.shape[:1] or self.bias.dtype != w.dtype):
            raise ValueError(
                f"Head bias is {describe(self.bias)}; it must be [{w.shape[0]}] of {w.dtype} as the weight"
            )
        if not (math.isfinite(self.logit_scale) and self.logit_scale != 0):
            raise ValueError(f"logit_scale={self.logit_scale} must be finite and not 0")
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise ValueError(f"softcap={self.softcap} must be positive and finite, or None for no softcap")
        if self.group is None and self.vocab_start is None:
            object.__setattr__(self, "vocab_size", _check_vocab_size(self.vocab_size, w.shape[0], "the head's weight"))
        else:
            self._check_shard()

    def _check_shard(self) -> None:
        given = {"vocab_size": self.vocab_size, "vocab_start": self.vocab_start, "group": self.group}
        if missing := [name for name, value in given.items() if value is None]:
            raise ValueError(
                f"a shard of a head needs vocab_start, group, and the whole vocab_size; {missing[0]} is None"
            )
        assert self.vocab_size is not None and self.vocab_start is not None
        if self.vocab_size < 1 or self.vocab_start < 0:
            raise ValueError(
                f"vocab_size={self.vocab_size}, vocab_start={self.vocab_start}: a shard is part of a vocabulary of one "
                "entry or more, whose ids start at 0"
            )
        from torch import distributed

        if not (distributed.is_available() and distributed.is_initialized()):
            raise ValueError("Head got a group, but torch.distributed is not initialised: call init_process_group")
        if distributed.get_rank(self.group) < 0:
            raise ValueError("Head got a group that this process is not in; give each process the group of its shards")

    @property
    def real_rows(self) -> int:
        """Rows of the weight that are no padding."""
        assert self.vocab_size is not None
        return min(max(self.vocab_size - (self.vocab_start or 0), 0), self.weight.shape[0])

    @property
    def side(self) -> Side:
        assert self.vocab_size is not None
        return _side(self.vocab_size, self.logit_scale, self.softcap)

    def detach(self) -> Head:
        """The same head without gradients."""
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    @classmethod
    def from_model(
        cls, model: Any, *, vocab_size: int | None = None, hidden: str | None = None, check: bool = True
    ) -> Head:
        """The head of a Hugging Face model, with bias, scale and softcap as the model itself applies them.

        The first call for a model runs it once on two tokens and holds what its configuration says against the logits
        it returns; later calls only read the weights.

        vocab_size: pass the tokenizer's length where the matrix is padded beyond it.
        hidden: which hidden states the head will be given, "last_hidden_state" (`hidden_states[-1]`) or "head_input"
            (what the model gives its projection; `student_hidden` of integrations.transformers returns these). They
            differ in models that scale or transform the last hidden state first (T5, MiniCPM 3); None refuses those.
        check: False skips the run and takes the usual meaning of the configuration.

        Raises TypeError for a model without output embeddings or whose are no plain linear layer, ValueError for an
        adapter on the head and for a model whose logits no known rule gives.
        """
        from potstill.heads import head_of

        return head_of(model, vocab_size=vocab_size, hidden=hidden, check=check)


@dataclass(frozen=True, eq=False)
class HiddenTeacher:
    """A teacher beside the student: hidden [..., D_t], whose rows line up with the student's, and its head."""

    hidden: Tensor
    head: Head


@dataclass(frozen=True, eq=False)
class LogitsTeacher:
    """A teacher given by its logits [..., V]; columns from vocab_size on are padding."""

    logits: Tensor
    vocab_size: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        size = _check_vocab_size(self.vocab_size, self.logits.shape[-1], "the teacher's logits")
        object.__setattr__(self, "vocab_size", size)

    @property
    def side(self) -> Side:
        assert self.vocab_size is not None
        return Side(self.vocab_size)


@dataclass(frozen=True, eq=False)
class TopK:
    """The K most probable entries of each row of a teacher, and the truth about the rest.

    ids: integers [..., K], in descending log-probability (drawn ids: descending count); -1 for a missing entry.
    log_probs: [..., K] log-probabilities at T = 1 over the full vocabulary, in nats; -inf for a missing entry.
    log_rest: [...] log of the mass outside the K entries (-inf for none), or None when it was not recorded.
    lse: [...] log-sum-exp of the logits, or None.
    counts: [..., K] how often each entry was drawn (0 for a missing one), or None where the ids were not drawn.
    token_log_probs, token_ranks: [...] the realised token's log-probability and number of entries above it, or None.
    log_rest_at: {T: [...]} log of the mass outside the K entries under softmax(logits / T), by temperature.
    sample_temperature: where the ids were drawn, the T of the softmax(logits / T) that they were drawn from.
    """

    ids: Tensor
    log_probs: Tensor
    log_rest: Tensor | None = None
    lse: Tensor | None = None
    counts: Tensor | None = None
    token_log_probs: Tensor | None = None
    token_ranks: Tensor | None = None
    log_rest_at: dict[float, Tensor] = field(default_factory=dict)
    sample_temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.ids.is_floating_point() or self.ids.dtype == torch.bool or self.ids.dim() < 1:
            raise TypeError(f"TopK ids must be integers [..., K], not {describe(self.ids)}")
        for name in ("log_probs", "counts"):
            value = getattr(self, name)
            if value is not None and value.shape != self.ids.shape:
                raise ValueError(f"TopK {name} has shape {list(value.shape)}; ids has {list(self.ids.shape)}")
        rows = {name: getattr(self, name) for name in ("log_rest", "lse", "token_log_probs", "token_ranks")}
        rows.update({f"log_rest_at[{t}]": value for t, value in self.log_rest_at.items()})
        for name, value in rows.items():
            if value is not None and value.shape != self.ids.shape[:-1]:
                raise ValueError(f"TopK {name} has shape {list(value.shape)}; it must be {list(self.ids.shape[:-1])}")
        if not self.log_probs.is_floating_point():
            raise TypeError(f"TopK log_probs must be floating point, not {self.log_probs.dtype}")
        for name, t in [("log_rest_at", t) for t in self.log_rest_at] + [
            ("sample_temperature", self.sample_temperature)
        ]:
            if not (math.isfinite(t) and t > 0):
                raise ValueError(f"TopK {name} names the temperature {t}; it must be positive and finite")

    @property
    def k(self) -> int:
        """Entries a row."""
        return self.ids.shape[-1]

    def rest_bounds(self, temperature: float, vocab_size: int) -> tuple[Tensor, Tensor]:
        """Bounds [...] of log sum p^(1/T) over the entries outside the K, from log_rest and the least kept entry alone.

        Each entry outside is at most the least of the K, and together they are exp(log_rest): the sum lies between the
        even spread over all `vocab_size - K` of them and the fewest that can hold it.
        """
        if self.log_rest is None:
            raise ValueError("the rest at another temperature is bounded from TopK.log_rest, which is None")
        given = self.ids >= 0
        others = (vocab_size - given.sum(-1)).clamp(min=1).to(self.log_rest.dtype)
        least = torch.where(given, self.log_probs, 0.0).amin(-1)
        even = (1 - 1 / temperature) * others.log() + self.log_rest / temperature
        fewest = self.log_rest + (1 / temperature - 1) * least
        return (fewest, even) if temperature > 1 else (even, fewest)

    def with_estimated_rest(self, temperature: float, vocab_size: int) -> TopK:
        """A copy whose log_rest_at[temperature] is estimated: the geometric middle of `rest_bounds`.

        The log of the outside sum is then wrong by at most half the distance of the bounds; look at it before use:
        `low, high = topk.rest_bounds(T, V); ((high - low) / 2).mean()`. Recording the rest at capture
        (`ps.topk(..., temperatures=(T,))`) costs little and is exact.
        """
        low, high = self.rest_bounds(temperature, vocab_size)
        rest = (low + high) / 2
        inside = (self.log_probs / temperature).logsumexp(-1)
        log_rest = torch.where(low == -math.inf, -math.inf, rest - torch.logaddexp(rest, inside))
        return replace(self, log_rest_at={**self.log_rest_at, float(temperature): log_rest})

    def _map(self, f: Callable[[Tensor], Tensor]) -> TopK:
        mapped: dict[str, Any] = {x.name: f(t) for x in fields(self) if isinstance(t := getattr(self, x.name), Tensor)}
        return replace(self, **mapped, log_rest_at={t: f(value) for t, value in self.log_rest_at.items()})

    def to(self, device: Any, *, non_blocking: bool = False) -> TopK:
        """Every tensor moved to the device."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> TopK:
        """Every tensor in pinned memory."""
        return self._map(lambda t: t.pin_memory())

    def __getitem__(self, index: Any) -> TopK:
        """The rows selected by indexing the leading dimensions (a boolean mask, a slice, an index tensor)."""
        return self._map(lambda t: t[index])


def describe(value: Any) -> str:
    """An argument as error messages name it."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)}"
    return f"{type(value).__name__}"
