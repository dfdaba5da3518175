"""What a cache holds: vocabulary, k, and whose rows they are. Stored with the cache and bound to every
shard by its hash."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Spec:
    """Identity of a cache. Two caches are the same work when their specs are equal.

    vocab_size: columns of the teacher's head, 1 to 2**31 - 1; every id is below it.
    k: most entries of a row, 1 to min(65535, vocab_size); a row may have fewer.
    teacher, teacher_revision, tokenizer: names or hashes; empty when not known.
    extra: any JSON object: template, dtype, data set, ...

    Raises ValueError for numbers out of range and TypeError for values that JSON cannot hold.
    """

    vocab_size: int
    k: int
    teacher: str = ""
    teacher_revision: str = ""
    tokenizer: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "k"):
            if not isinstance(getattr(self, name), int) or isinstance(getattr(self, name), bool):
                raise TypeError(f"Spec.{name} is {getattr(self, name)!r}, an int is accepted")
        for name in ("teacher", "teacher_revision", "tokenizer"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"Spec.{name} is {getattr(self, name)!r}, a str is accepted")
        if not 1 <= self.vocab_size < 2**31:
            raise ValueError(f"Spec.vocab_size is {self.vocab_size}, 1 to {2**31 - 1} is accepted")
        if not 1 <= self.k <= min(65535, self.vocab_size):
            raise ValueError(f"Spec.k is {self.k}, 1 to {min(65535, self.vocab_size)} is accepted")
        if not isinstance(self.extra, dict):
            raise TypeError(f"Spec.extra is a {type(self.extra).__name__}, a dict is accepted")
        # the stored form is compared on resume, so tuples and the like become what JSON makes of them
        try:
            object.__setattr__(self, "extra", json.loads(json.dumps(self.extra, allow_nan=False)))
        except (TypeError, ValueError) as error:
            raise TypeError(f"Spec.extra must be a JSON object: {error}") from None

    def to_json(self) -> str:
        """The spec as JSON text."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Spec:
        """The spec of a stored cache; names that this version does not know become part of extra."""
        stored = json.loads(text)
        known = {f.name for f in fields(cls)}
        unknown = {name: value for name, value in stored.items() if name not in known}
        given = {name: value for name, value in stored.items() if name in known}
        return cls(**{**given, "extra": {**given.get("extra", {}), **unknown}})
