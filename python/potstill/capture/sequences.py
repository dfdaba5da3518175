"""Documents -> token sequences with keys, packed into full rows or split document by document."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .plan import Groups, Shard
from .text import Document, Entry, TextSource, entries_of

MAX_KEY_BYTES = 512


# Rows are packed within groups of neighbouring documents, which are closed at this size: a promise, as the rows of a
# cache depend on it. One row in a group is shorter than the others, of about 500 at a length of 4096.
GROUP_BYTES = 8 << 20


@dataclass(frozen=True)
class TokenSequence:
    """`tokens` int32 [L], the input ids of one sequence; `key` names it in the cache.

    `consumed` is the running total of `Document.size` up to the document in which the sequence ends; `group` the
    number of its group of documents.
    """

    key: str
    tokens: np.ndarray
    consumed: int
    group: int = 0


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
    documents: TextSource | Iterable[Document | str],
    tokenizer: Any,
    *,
    length: int,
    pack: bool = True,
    max_tokens: int | None = None,
    add_special_tokens: bool = True,
    document_batch: int = 64,
    owns: Callable[[int], bool] | None = None,
) -> Iterator[TokenSequence]:
    """Tokenises documents and yields sequences of at most `length` tokens; no token is lost or repeated.

    documents: what `open_text` returns, documents, or strings (named by their position).
    pack: rows of exactly `length` tokens across documents, an end-of-text token after each document when the
    tokenizer has one; the last row of every GROUP_BYTES of text may be shorter. Attention is not cut at document
    borders. Otherwise each document is cut into pieces of `length`, the last of them shorter. `max_tokens` ends the
    stream before the first sequence that would exceed it, so a later run with a larger limit continues with the same
    sequences.
    owns: is asked for each group of documents, with its bytes; those for which it says False are not read
    (`plan.Groups.owns_next`). Not to be had with `max_tokens`.

    Raises ValueError for a length under 1 or two documents of one name.
    """
    if length < 1:
        raise ValueError(f"length is {length}: a sequence needs at least 1 token")
    if owns is not None and max_tokens is not None:
        raise ValueError("owns and max_tokens are both given: how many tokens there are is known to who tokenises all")
    pieces = _packed if pack else _split
    total = consumed = 0
    for number, group in enumerate(document_groups(entries_of(documents))):
        before, consumed = consumed, consumed + sum(entry.size for entry in group)
        if owns is not None and not owns(sum(entry.num_bytes for entry in group)):
            continue
        tokenised = _tokenised(group, tokenizer, pack, add_special_tokens, document_batch)
        for key, tokens, so_far in pieces(tokenised, length):
            total += len(tokens)
            if max_tokens is not None and total > max_tokens:
                return
            yield TokenSequence(key, tokens, before + so_far, number)


def groups_of(documents: Any, shard: Shard, max_tokens: int | None) -> Groups:
    """How processes share out a text. All of it is everybody's where its size is not known, and with `max_tokens`, as
    only who tokenises everything knows where they are reached.
    """
    size = documents.num_bytes if isinstance(documents, TextSource) and max_tokens is None else 0
    return Groups(shard, size / GROUP_BYTES)


def document_groups(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
    """Neighbours in lists of GROUP_BYTES together or a little more, the last smaller."""
    group: list[Entry] = []
    size = 0
    for entry in entries:
        group.append(entry)
        size += entry.num_bytes
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _tokenised(
    group: list[Entry], tokenizer: Any, pack: bool, add_special_tokens: bool, document_batch: int
) -> Iterator[tuple[str, np.ndarray, int]]:
    """(name, tokens [L], sizes of the group's documents so far) of each document that has any."""
    eos = tokenizer.eos_token_id if pack else None
    consumed = 0
    for start in range(0, len(group), document_batch):
        batch = group[start : start + document_batch]
        texts = [entry.read() for entry in batch]
        encoded = iter(
            tokenizer(
                [text for text in texts if text],
                add_special_tokens=add_special_tokens,
                return_attention_mask=False,
                verbose=False,
            )["input_ids"]
            if any(texts)
            else ()
        )
        for entry, text in zip(batch, texts, strict=True):
            consumed += entry.size
            tokens = np.asarray(next(encoded) if text else (), dtype=np.int32)
            if not len(tokens):
                continue
            if eos is not None and tokens[-1] != eos:
                tokens = np.append(tokens, np.int32(eos))
            yield entry.name, tokens, consumed


def _split(documents: Iterator[tuple[str, np.ndarray, int]], length: int) -> Iterator[tuple[str, np.ndarray, int]]:
    for name, tokens, consumed in documents:
        for start in range(0, len(tokens), length):
            yield make_key(name, start), tokens[start : start + length], consumed


def _packed(documents: Iterator[tuple[str, np.ndarray, int]], length: int) -> Iterator[tuple[str, np.ndarray, int]]:
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
                yield key, np.concatenate(held), consumed
                held, room = [], length
    if held:
        yield key, np.concatenate(held), consumed
