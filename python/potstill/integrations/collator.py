"""Batches of a cache: tokens, labels and teacher rows, checked against each other and padded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from potstill import cache as ps_cache

TEACHER_COLUMNS = ("teacher_ids", "teacher_log_probs", "teacher_log_rest")
AT = "teacher_log_rest_at_"  # and a temperature: the rest there, where the cache has it
IGNORED = -100


def next_token_labels(labels: Tensor) -> Tensor:
    """labels [B, L] of the tokens themselves -> [B, L] of the token after each: `labels[:, 1:]` with -100 at
    the end.
    """
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


class CacheCollator:
    """Examples with a `key` -> a batch with the teacher's rows of a cache.

    cache: what `ps.cache.open` returns, or its path. tokenizer_or_pad_id: an id, or a tokenizer (its pad,
    else its end-of-text token, and its padding side). An example is a mapping with `key` and, if it likes,
    `input_ids` (equal to the cached tokens or the beginning of them, otherwise `cache.TokenMismatch`),
    `labels` (-100 where nothing is to be learnt; default: the tokens) and `attention_mask` (all ones;
    anything else is refused, as the teacher saw every token).

    The batch, with L the longest sequence: input_ids, attention_mask, labels int64 [B, L]; teacher_ids int32
    [B, L, K], teacher_log_probs float32 [B, L, K], teacher_log_rest float32 [B, L], and a
    teacher_log_rest_at_T for each other temperature T of the cache; position_ids [B, L] when padding on the left.
    labels[b, i] belongs to token i and is shifted by the trainer. It is -100 in padding and at the first token of
    each sequence, which no row predicts, so that a count of labels is a count of rows with a target however it is
    taken.

    packed: the sequences of a batch lie one behind the other in a single row [1, N] instead, without padding and
    without attention_mask; position_ids begin again with each, and cu_seq_lens_q, cu_seq_lens_k [B + 1],
    max_length_q, max_length_k give the boundaries to attention kernels that take them.

    Raises ValueError naming the key for an example without teacher rows, TypeError for an example without
    `key`.
    """

    def __init__(
        self,
        cache: Any,
        tokenizer_or_pad_id: Any,
        *,
        padding_side: str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int = 1,
        key: str = "key",
        packed: bool = False,
    ) -> None:
        self.cache = ps_cache.open(cache) if isinstance(cache, (str, os.PathLike)) else cache
        tokenizer = None if isinstance(tokenizer_or_pad_id, int) else tokenizer_or_pad_id
        self.tokenizer = tokenizer
        self.pad_id = tokenizer_or_pad_id if tokenizer is None else _pad_id(tokenizer)
        self.padding_side = padding_side or getattr(tokenizer, "padding_side", None) or "right"
        if self.padding_side not in ("left", "right"):
            raise ValueError(f"padding_side is {self.padding_side!r}: it must be 'left' or 'right'")
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length is {max_length}: a row needs a token after it, so at least 2")
        if packed and pad_to_multiple_of != 1:
            raise ValueError(f"pad_to_multiple_of is {pad_to_multiple_of}: packed rows have no padding, give 1")
        self.max_length, self.multiple, self.key, self.packed = max_length, pad_to_multiple_of, key, packed

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        keys = [self._key(example, at) for at, example in enumerate(examples)]
        tokens = [self._tokens(example, key) for example, key in zip(examples, keys, strict=True)]
        if self.packed:
            return self._packed(examples, keys, tokens)
        rows: Any = self.cache.batch(keys, tokens=tokens)  # [B, longest, K]; compares the tokens
        longest = max(len(t) for t in tokens)
        length = -(-longest // self.multiple) * self.multiple
        size, k = len(keys), rows.ids.shape[-1]

        batch = {
            "input_ids": torch.full((size, length), self.pad_id, dtype=torch.int64),
            "attention_mask": torch.zeros((size, length), dtype=torch.int64),
            "labels": torch.full((size, length), IGNORED, dtype=torch.int64),
            "teacher_ids": torch.full((size, length, k), -1, dtype=torch.int32),
            "teacher_log_probs": torch.full((size, length, k), float("-inf")),
            "teacher_log_rest": torch.zeros((size, length)),
        } | {f"{AT}{t}": torch.zeros((size, length)) for t in rows.log_rest_at}
        for b, (example, ids) in enumerate(zip(examples, tokens, strict=True)):
            n = len(ids)
            at = slice(length - n, length) if self.padding_side == "left" else slice(0, n)
            batch["input_ids"][b, at] = torch.from_numpy(ids.astype(np.int64))
            batch["attention_mask"][b, at] = 1
            batch["labels"][b, at] = self._labels(example, ids, keys[b])
            batch["teacher_ids"][b, at] = rows.ids[b, :n]
            batch["teacher_log_probs"][b, at] = rows.log_probs[b, :n]
            batch["teacher_log_rest"][b, at] = rows.log_rest[b, :n]
            for t, rest in rows.log_rest_at.items():
                batch[f"{AT}{t}"][b, at] = rest[b, :n]
        if self.padding_side == "left":
            batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return batch

    def _packed(
        self, examples: Sequence[Mapping[str, Any]], keys: list[str], tokens: list[np.ndarray]
    ) -> dict[str, Any]:
        rows: Any
        rows, bounds = self.cache.packed(keys, tokens=tokens)  # TopK [N, K]; int32 [B + 1]
        starts, longest = torch.from_numpy(bounds), int(np.diff(bounds).max())
        labels = [self._labels(x, ids, key) for x, ids, key in zip(examples, tokens, keys, strict=True)]
        return {
            "input_ids": torch.from_numpy(np.concatenate(tokens).astype(np.int64))[None],
            "position_ids": torch.cat([torch.arange(len(ids)) for ids in tokens])[None],
            "labels": torch.cat(labels)[None],
            "cu_seq_lens_q": starts,
            "cu_seq_lens_k": starts,
            "max_length_q": longest,
            "max_length_k": longest,
            "teacher_ids": rows.ids[None],
            "teacher_log_probs": rows.log_probs[None],
            "teacher_log_rest": rows.log_rest[None],
        } | {f"{AT}{t}": rest[None] for t, rest in rows.log_rest_at.items()}

    def _key(self, example: Mapping[str, Any], at: int) -> str:
        key = example.get(self.key)
        if not isinstance(key, str):
            have = ", ".join(map(repr, example)) or "nothing"
            raise TypeError(
                f"example {at} of the batch has no {self.key!r} (it has {have}): every example names its "
                "sequence in the cache; "
                "in a Trainer other than DistillTrainer set remove_unused_columns=False"
            )
        if key not in self.cache:
            raise ValueError(
                f"the cache has no teacher rows for {key!r} (it holds {len(self.cache)} sequences): build "
                "them, or leave it out"
            )
        return key

    def _tokens(self, example: Mapping[str, Any], key: str) -> np.ndarray:
        given = example.get("input_ids")
        tokens = self.cache.tokens(key) if given is None else np.asarray(given)
        if tokens.ndim != 1 or not len(tokens):
            raise ValueError(f"{key!r}: input_ids has shape {tokens.shape}, one sequence of at least 1 token is needed")
        mask = example.get("attention_mask")
        if mask is not None and (len(mask) != len(tokens) or not np.asarray(mask).all()):
            raise ValueError(
                f"{key!r}: its attention_mask is not all ones over its {len(tokens)} tokens; the teacher "
                "saw every token: leave padding to the collator"
            )
        return np.asarray(tokens[: self.max_length], dtype=np.int32)

    def _labels(self, example: Mapping[str, Any], ids: np.ndarray, key: str) -> Tensor:
        """[L] int64, -100 at the first token."""
        given = example.get("labels")
        labels = torch.as_tensor(np.array(ids if given is None else given), dtype=torch.int64)[: self.max_length]
        if labels.shape != (len(ids),):
            raise ValueError(
                f"{key!r}: {tuple(labels.shape)} labels for {len(ids)} tokens; there is one a token, -100 "
                "where none is to be learnt"
            )
        labels[0] = IGNORED
        return labels


def _pad_id(tokenizer: Any) -> int:
    for name in ("pad_token_id", "eos_token_id"):
        if (found := getattr(tokenizer, name, None)) is not None:
            return int(found)
    raise ValueError("the tokenizer has neither a pad nor an end-of-text token: give CacheCollator an id to pad with")
