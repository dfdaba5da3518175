"""Documents -> token sequences with keys, packed into full rows or split document by document."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from .text import Document

MAX_KEY_BYTES = 512


@dataclass(frozen=True)
class TokenSequence:
    """`tokens` int32 [L], the input ids of one sequence; `key` names it in the cache.

    `consumed` is the running total of `Document.size` up to the document in which the sequence ends.
    """

    key: str
    tokens: np.ndarray
    consumed: int


def make_key(name: str, offset: int) -> str:
    """`name#offset`: the document in which the sequence starts and the token offset at which it starts there.

    A name too long for a key keeps its end and gains a hash of the whole, so it stays unique.
    """
    key = f"{name}#{offset}"
    if len(key.encode()) <= MAX_KEY_BYTES:
        return key
    digest = hashlib.blake2b(name.encode(), digest_size=12).hexdigest()
    end = name.encode()[-(MAX_KEY_BYTES - 64) :].decode(errors="ignore")
    return f"{digest}~{end}#{offset}"


def token_sequences(
    documents: Iterable[Document],
    tokenizer: Any,
    *,
    length: int,
    pack: bool = True,
    max_tokens: int | None = None,
    add_special_tokens: bool = True,
    document_batch: int = 64,
) -> Iterator[TokenSequence]:
    """Tokenises documents and yields sequences of at most `length` tokens; no token is lost or repeated.

    pack: rows of exactly `length` tokens across documents, an end-of-text token after each document when the
    tokenizer has one; the last row may be shorter. Attention is not cut at document borders. Otherwise each
    document is cut into pieces of `length`, the last of them shorter. `max_tokens` ends the stream before the
    first sequence that would exceed it, so a later run with a larger limit continues with the same sequences.

    Raises ValueError for a length under 1 or two documents of one name.
    """
    if length < 1:
        raise ValueError(f"length is {length}: a sequence needs at least 1 token")
    pieces = _packed if pack else _split
    total = 0
    for sequence in pieces(_tokenised(documents, tokenizer, pack, add_special_tokens, document_batch), length):
        total += len(sequence.tokens)
        if max_tokens is not None and total > max_tokens:
            return
        yield sequence


def _tokenised(
    documents: Iterable[Document], tokenizer: Any, pack: bool, add_special_tokens: bool, document_batch: int
) -> Iterator[tuple[str, np.ndarray, int]]:
    seen: set[str] = set()
    eos = tokenizer.eos_token_id if pack else None
    consumed = 0
    stream = iter(documents)
    while batch := list(islice(stream, document_batch)):
        encoded = tokenizer(
            [d.text for d in batch],
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        for document, ids in zip(batch, encoded, strict=True):
            if document.name in seen:
                raise ValueError(f"two documents are named {document.name!r}: a name must identify one text")
            seen.add(document.name)
            consumed += document.size
            tokens = np.asarray(ids, dtype=np.int32)
            if not document.text or not len(tokens):
                continue
            if eos is not None and tokens[-1] != eos:
                tokens = np.append(tokens, np.int32(eos))
            yield document.name, tokens, consumed


def _split(documents: Iterator[tuple[str, np.ndarray, int]], length: int) -> Iterator[TokenSequence]:
    for name, tokens, consumed in documents:
        for start in range(0, len(tokens), length):
            yield TokenSequence(make_key(name, start), tokens[start : start + length], consumed)


def _packed(documents: Iterator[tuple[str, np.ndarray, int]], length: int) -> Iterator[TokenSequence]:
    held: list[np.ndarray] = []
    key, room, consumed = "", length, 0
    for name, tokens, consumed in documents:
        start = 0
        while start < len(tokens):
            if not held:
                key = make_key(name, start)
            piece = tokens[start : start + room]
            held.append(piece)
            start += len(piece)
            room -= len(piece)
            if room == 0:
                yield TokenSequence(key, np.concatenate(held), consumed)
                held, room = [], length
    if held:
        yield TokenSequence(key, np.concatenate(held), consumed)
