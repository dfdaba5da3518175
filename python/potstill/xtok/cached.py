"""A cached teacher for a student of another tokenizer: what `potstill build --xtok` wrote, aligned as it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from potstill.xtok.aligner import Aligner
from potstill.xtok.alignment import Alignment
from potstill.xtok.vocab import SPECIAL, VocabBytes

WORD_END = "word_end"  # the column that `potstill build --xtok` writes


@dataclass(frozen=True, eq=False)
class ChunkBatch:
    """B texts in the student's tokens, and what the teacher says of their chunks.

    input_ids int64 [B, T], padded; attention_mask int64 [B, T].  alignment: of the rows without padding, so that
    `hidden[mask.bool()]` and `input_ids[mask.bool()]` are laid out as alignment.student_chunk.
    teacher_log_probs fp32 [m], of every teacher token given those before it (0 for a row's first).  teacher_boundary
    fp32 [m], that a word ends behind each, or None where the cache does not say.
    """

    input_ids: Tensor
    attention_mask: Tensor
    alignment: Alignment
    teacher_log_probs: Tensor
    teacher_boundary: Tensor | None = None

    def to(self, device: torch.device | str) -> ChunkBatch:
        """The same on another device."""
        moved: dict[str, Any] = {n: None if value is None else value.to(device) for n, value in vars(self).items()}
        return ChunkBatch(**moved)

    @property
    def mask(self) -> Tensor:
        """bool [B, T]: no padding."""
        return self.attention_mask.bool()


class ChunkCollator:
    """Keys of a cache to ChunkBatch, for a DataLoader over {"key": key} or over keys.

    cache: one with token_log_probs, as `potstill build --xtok` writes.  teacher: its tokenizer, anything
        `VocabBytes.from_tokenizer` takes.  student: the student's.
    encode: text to ids without special tokens; default the student tokenizer's own.
    bos_id: put before every row, so that the first token of a text is predicted too.  max_length: most student tokens
        of a row; what is cut off is in no chunk.  Further arguments are Aligner's.

    The text is what the cached tokens spell; special tokens of a role that the student has too (an end of text) stand
    where they stood. Raises ValueError when the cache has no log-probabilities of its tokens, and TypeError without a
    way to encode.
    """

    def __init__(
        self, cache: Any, teacher: Any, student: Any, *, encode: Callable[[str], Sequence[int]] | None = None,
        bos_id: int | None = None, pad_id: int = 0, max_length: int | None = None, **options: Any,
    ):  # fmt: skip
        if not cache.spec.token_log_probs:
            raise ValueError("the cache has no log-probabilities of its tokens; build it with --xtok")
        self.cache, self.bos_id, self.pad_id, self.max_length = cache, bos_id, pad_id, max_length
        self.aligner = Aligner(student, teacher, **options)
        self.encode = encoder(student) if encode is None else encode
        own, other = self.aligner.student.roles, self.aligner.teacher.roles
        self._partners = {id: own[role] for role, id in other.items() if role in own and role not in ("pad", "unk")}
        self._prefix = self.aligner.teacher.rules["prefix"]

    def __call__(self, features: Sequence[Any]) -> ChunkBatch:
        rows, teachers, log_probs, boundary = [], [], [], []
        for feature in features:
            sequence = self.cache[feature["key"] if isinstance(feature, Mapping) else feature]
            rows.append(self._student_ids(sequence.tokens.tolist()))
            teachers.append(sequence.tokens)
            found = sequence.topk.token_log_probs
            log_probs.append(torch.cat([found.new_zeros(1), found[:-1]]))  # row i is of token i + 1
            if WORD_END in sequence.columns:
                boundary.append(sequence.columns[WORD_END].float())
        width = max(map(len, rows), default=0)
        ids = torch.full((len(rows), width), self.pad_id)
        mask = torch.zeros(len(rows), width, dtype=torch.int64)
        for n, row in enumerate(rows):
            ids[n, : len(row)] = torch.tensor(row)
            mask[n, : len(row)] = 1
        return ChunkBatch(
            ids, mask, self.aligner(rows, teachers), torch.cat(log_probs), torch.cat(boundary) if boundary else None
        )

    def _student_ids(self, tokens: list[int]) -> list[int]:
        out = [] if self.bos_id is None else [self.bos_id]
        for part in self._parts(tokens):
            out += [part] if isinstance(part, int) else self.encode(part)
        return out[: self.max_length]

    def _parts(self, tokens: list[int]) -> Iterator[str | int]:
        """Texts between special tokens, and the student's ids of those it has too."""
        vocab, content, first = self.aligner.teacher, b"", True
        for token in [*tokens, None]:
            special = token is not None and bool(vocab.flags[token] & SPECIAL)
            if token is not None and not special:
                content += vocab[token]
                continue
            if content:
                spaced = self._prefix == "every" or (self._prefix == "first" and first)
                # a character that a sequence's end cuts is left to the alignment
                yield content[spaced and content.startswith(b" ") :].decode(errors="ignore")
                content, first = b"", False
            if special and token in self._partners:
                yield self._partners[token]


def encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """Text to ids without special tokens, by a transformers tokenizer or a `tokenizers.Tokenizer`."""
    if isinstance(tokenizer, VocabBytes) or not hasattr(tokenizer, "encode"):
        raise TypeError(
            f"{type(tokenizer).__name__} cannot encode text; pass encode=, a function of a text that returns its ids"
        )

    def encode(text: str) -> list[int]:
        found = tokenizer.encode(text, add_special_tokens=False)
        return list(getattr(found, "ids", found))

    return encode
