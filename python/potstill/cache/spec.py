"""What a cache holds: vocabulary, k, and whose rows they are. Stored with the cache and bound to every
shard by its hash."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from potstill._rust import CacheError
from potstill.cache.columns import Column, normalised

VALUES = ("1/8", "1/16", "1/32", "1/64", "bf16_logits", "fp16", "fp32", "plain")
PLAIN = {"values": "plain", "temperatures": (1.0,), "sampled": False, "token_log_probs": False}
LATER = {
    "columns": (),
    "template": "",
    "dtype": "",
    "min_mass": 1.0,
}  # left out where they are empty, so that stored specs stay equal


@dataclass(frozen=True)
class Spec:
    """Identity of a cache. Two caches are the same work when their specs are equal.

    vocab_size: columns of the teacher's head, 1 to 2**31 - 1; every id is below it.
    k: most entries of a row, 0 to min(65535, vocab_size); a row may have fewer. With 0 a row is the realised token's
        log-probability alone (token_log_probs, and none of "plain", "bf16_logits", temperatures, sampled).
    teacher, teacher_revision, tokenizer: names or hashes; empty when not known.
    values: how log-probabilities are stored. "1/8", "1/16", "1/32", "1/64": on a grid of that many nat, moved in each
        row to where it fits best, off by at most half of it; "bf16_logits": bit exact for bf16 logits given with their
        lse; "fp32", "fp16": as they are; "plain": fp16 and bit-packed ids, larger, and all that version 1.0 of the
        format knows.
    temperatures: log_rest is kept at 1 and at each of these; rows then need topk.log_rest_at[T].
    sampled: rows are draws, with topk.counts.
    token_log_probs: rows carry topk.token_log_probs, the realised token's log-probability.
    columns: what sequences hold besides rows: `Column.hidden(width)`, `Column.scores("reward", ...)`,
        `Column.classes(width)`, any other `Column`, or a name for one fp16 number a token.
    template, dtype: hash or name of the chat template that the texts went through, and the dtype the teacher ran in;
        empty when not known.
    min_mass: keep of each row the fewest first entries that hold this probability (top-p), at most k; what is cut joins
        log_rest, at every temperature. 1 keeps all that are given.
    extra: any other JSON object: data set, length, ...
    codec: 2, or 1 for what version 1.1 of the format reads: the same grid in every row, so a divergence nearly twice
        as large. Always 0 with "plain".

    Raises ValueError for numbers out of range and TypeError for values that JSON cannot hold.
    """

    vocab_size: int
    k: int
    teacher: str = ""
    teacher_revision: str = ""
    tokenizer: str = ""
    values: str = "1/16"
    temperatures: tuple[float, ...] = (1.0,)
    sampled: bool = False
    token_log_probs: bool = False
    columns: tuple[Column, ...] = ()
    template: str = ""
    dtype: str = ""
    min_mass: float = 1.0
    extra: dict[str, Any] = field(default_factory=dict)
    codec: int = 2

    def __post_init__(self) -> None:
        for name in ("vocab_size", "k"):
            if not isinstance(getattr(self, name), int) or isinstance(getattr(self, name), bool):
                raise TypeError(f"Spec.{name} is {getattr(self, name)!r}, an int is accepted")
        for name in ("teacher", "teacher_revision", "tokenizer", "values", "template", "dtype"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"Spec.{name} is {getattr(self, name)!r}, a str is accepted")
        if not 1 <= self.vocab_size < 2**31:
            raise ValueError(f"Spec.vocab_size is {self.vocab_size}, 1 to {2**31 - 1} is accepted")
        if not 0 <= self.k <= min(65535, self.vocab_size):
            raise ValueError(f"Spec.k is {self.k}, 0 to {min(65535, self.vocab_size)} is accepted")
        self._check_layout()
        self._check_min_mass()
        object.__setattr__(self, "columns", normalised(self.columns))
        if not isinstance(self.extra, dict):
            raise TypeError(f"Spec.extra is a {type(self.extra).__name__}, a dict is accepted")
        # the stored form is compared on resume, so tuples and the like become what JSON makes of them
        try:
            object.__setattr__(self, "extra", json.loads(json.dumps(self.extra, allow_nan=False)))
        except (TypeError, ValueError) as error:
            raise TypeError(f"Spec.extra must be a JSON object: {error}") from None

    def _check_layout(self) -> None:
        if self.values not in VALUES:
            raise ValueError(f"Spec.values is {self.values!r}, one of {', '.join(VALUES)} is accepted")
        if self.codec not in (0, 1, 2) or isinstance(self.codec, bool):
            raise ValueError(f"Spec.codec is {self.codec!r}, 1 or 2 is accepted")
        object.__setattr__(self, "codec", 0 if self.values == "plain" else max(self.codec, 1))
        for name in ("sampled", "token_log_probs"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"Spec.{name} is {getattr(self, name)!r}, True or False is accepted")
        try:
            temperatures = tuple(sorted({1.0, *map(float, self.temperatures)}))
        except (TypeError, ValueError):
            raise TypeError(f"Spec.temperatures is {self.temperatures!r}, a tuple of numbers is accepted") from None
        if not all(math.isfinite(t) and t > 0 for t in temperatures):
            raise ValueError(f"Spec.temperatures is {self.temperatures!r}, positive numbers are accepted")
        object.__setattr__(self, "temperatures", temperatures)
        if self.values == "plain" and (len(temperatures) > 1 or self.sampled or self.token_log_probs):
            raise ValueError('Spec.values is "plain", which keeps one log_rest a row and nothing else; give "1/16"')
        without = self.token_log_probs and len(temperatures) == 1 and not self.sampled and self.values != "bf16_logits"
        if self.k == 0 and not without:
            raise ValueError(
                "Spec.k is 0, which keeps the realised token's log-probability alone: it takes token_log_probs=True, "
                'no other temperature, sampled=False, and values other than "plain" and "bf16_logits"'
            )
        if self.values != "plain" and self.vocab_size > 1 << 22:
            raise ValueError(f'Spec.vocab_size is {self.vocab_size}; above {1 << 22} only values="plain" is accepted')

    def _check_min_mass(self) -> None:
        if not isinstance(self.min_mass, (int, float)) or isinstance(self.min_mass, bool):
            raise TypeError(f"Spec.min_mass is {self.min_mass!r}, a number is accepted")
        if not 0 < self.min_mass <= 1:
            raise ValueError(f"Spec.min_mass is {self.min_mass}, above 0 and up to 1 is accepted")
        if self.min_mass < 1 and self.sampled:
            raise ValueError(f"Spec.min_mass is {self.min_mass}, but draws have no mass to cut by; leave it at 1")
        object.__setattr__(self, "min_mass", float(self.min_mass))

    @property
    def extra_columns(self) -> tuple[str | float, ...]:
        """What a row holds beside log_rest: other temperatures, ascending, then "token_log_probs"."""
        other = tuple(t for t in self.temperatures if t != 1.0)
        return (*other, "token_log_probs") if self.token_log_probs else other

    def to_json(self) -> str:
        """The spec as JSON text. Fields that version 1.0 did not have are left out at their plain values."""
        stored = {k: v for k, v in asdict(self).items() if {**PLAIN, **LATER}.get(k, ...) != v}
        if self.columns:
            stored["columns"] = [column.to_dict() for column in self.columns]
        if self.codec < 2:
            del stored["codec"]
        return json.dumps(stored, allow_nan=False)

    @classmethod
    def stored(cls, text: str, where: object) -> Spec:
        """`from_json` of a cache's own spec, which a stranger may have written: CacheError for what no Spec is."""
        try:
            return cls.from_json(text)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CacheError(f"the spec of {where} cannot be read: {error}") from None

    @classmethod
    def from_json(cls, text: str) -> Spec:
        """The spec of a stored cache; names that this version does not know become part of extra."""
        stored = {"values": "plain", "codec": 1, **json.loads(text)}
        stored["columns"] = [Column.from_dict(column) for column in stored.get("columns", ())]
        known = {f.name for f in fields(cls)}
        unknown = {name: value for name, value in stored.items() if name not in known}
        given = {name: value for name, value in stored.items() if name in known}
        return cls(**{**given, "extra": {**given.get("extra", {}), **unknown}})
