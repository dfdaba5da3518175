"""Runs a teacher over token sequences and writes its top-k rows into a cache."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import cache as ps_cache
from .hidden import teacher_hidden
from .models import tokenizer_hash
from .plan import Shard, rank_and_world
from .sequences import TokenSequence, groups_of, token_sequences
from .text import Document, TextSource

if TYPE_CHECKING:
    from ..teachers import Head, TopK

# What an alignment with other tokenizers needs of a cache: `potstill build --xtok`.
XTOK: dict[str, Any] = {"k": 0, "values": "fp32", "token_log_probs": True, "word_ends": True}
WORD_END = "word_end"  # the column of word_ends

# Batches of similar length are formed inside windows of this many batches.
_WINDOW = 8


@dataclass(frozen=True)
class BuildReport:
    """What a build did. `sequences`, `tokens`, `bytes` are the cache's, `new_*` and `seconds` this run's.

    `finished` is False when the run was interrupted; everything counted is committed either way.
    """

    path: str
    sequences: int
    tokens: int
    bytes: int
    new_sequences: int
    new_tokens: int
    seconds: float
    finished: bool

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens if self.tokens else 0.0


def cache_spec(
    model: Any,
    tokenizer: Any,
    *,
    k: int,
    length: int,
    pack: bool,
    teacher: str = "",
    teacher_revision: str = "",
    head: Head | None = None,
    values: str = "1/16",
    temperatures: Sequence[float] = (1.0,),
    token_log_probs: bool = False,
    word_ends: bool = False,
    min_mass: float = 1.0,
) -> ps_cache.Spec:
    """The `Spec` a build writes: vocabulary, k, teacher, the tokenizer's content hash and how values are stored;
    length and packing in `extra`.
    """
    return ps_cache.Spec(
        vocab_size=_vocab_size(_head_of(model) if head is None else head),
        k=k,
        teacher=teacher,
        teacher_revision=teacher_revision,
        tokenizer=tokenizer_hash(tokenizer),
        values=values,
        temperatures=tuple(temperatures),
        token_log_probs=token_log_probs,
        columns=(ps_cache.Column(WORD_END),) if word_ends else (),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        min_mass=min_mass,
        extra={"length": length, "pack": pack},
    )


def build(
    model: Any,
    tokenizer: Any,
    texts: TextSource | Iterable[Document | str],
    out: str | os.PathLike[str],
    *,
    k: int = 64,
    length: int = 1024,
    pack: bool = True,
    values: str = "1/16",
    temperatures: Sequence[float] = (1.0,),
    token_log_probs: bool = False,
    word_ends: bool = False,
    min_mass: float = 1.0,
    batch_size: int = 8,
    max_tokens: int | None = None,
    add_special_tokens: bool = True,
    shard_bytes: int = 64 << 20,
    commit_seconds: float = 300.0,
    shard: str | tuple[int, int] | Shard | None = None,
    teacher: str | None = None,
    teacher_revision: str = "",
    progress: bool = False,
) -> BuildReport:
    """Writes (or continues) the cache `out` of `model`'s `k` most probable next tokens over `texts`.

    model: a Hugging Face causal LM, on its device and in its dtype; texts: what `open_text` returns,
    documents, or plain strings (named by their position). A sequence of L input ids becomes L rows: row i is
    the teacher's distribution of the token after tokens[0..i], over the full vocabulary. Only [rows of a
    chunk, V] logits exist at a time.

    values, temperatures, min_mass: how log-probabilities are stored, at which temperatures the rest is, and how much
    of a row is kept (`cache.Spec`).
    token_log_probs: keep the log-probability of each next token of the text as well (-inf in a sequence's last row,
    which has none): the text scored by the model, see `methods.scoring`. k=0 keeps nothing else.
    word_ends: keep, in the fp16 column "word_end", the log-probability that a word ends behind each token: the mass of
    the ids that begin one (`xtok.VocabBytes.word_starts`).

    An existing `out` of an equal spec is continued: sequences already committed are compared with the text
    and left alone. Batches are formed before that choice, so an interrupted and continued build holds what an
    uninterrupted one does. A shard is committed at `shard_bytes` or after `commit_seconds`. KeyboardInterrupt
    ends the run early with everything whole committed (`finished=False`).

    shard: (i, n) or "i/n" when this is process i of n that fill `out` together (`plan.rank_and_world` asks the
    launcher); None builds everything. All are given the same texts and options. Of texts from `open_text` that are long
    enough each process reads and tokenises its own groups of documents (`plan.Groups`), of others everything, and does
    the batches whose first key is its own (`plan.shard_of`). The folder holds the same rows whatever the number of
    processes, also when another number continues.

    Raises ValueError for k over the vocabulary, no text, or text that changed under a committed key; what the
    writer raises for an existing folder of another spec.
    """
    head = _head_of(model)
    vocab_size = _vocab_size(head)
    if not (0 if token_log_probs else 1) <= k <= vocab_size:
        raise ValueError(
            f"k is {k}: it must be between 1 and the teacher's vocabulary of {vocab_size}, or 0 with token_log_probs"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: at least 1 sequence a batch is needed")
    mine = Shard() if shard is None else rank_and_world(shard, {})
    name = teacher if teacher is not None else Path(str(getattr(model.config, "_name_or_path", ""))).name
    spec = cache_spec(
        model,
        tokenizer,
        k=k,
        length=length,
        pack=pack,
        teacher=name,
        teacher_revision=teacher_revision,
        head=head,
        values=values,
        temperatures=temperatures,
        token_log_probs=token_log_probs,
        word_ends=word_ends,
        min_mass=min_mass,
    )
    starts = _word_starts(tokenizer, vocab_size) if word_ends else None
    groups = groups_of(texts, mine, max_tokens)
    sequences = token_sequences(
        texts,
        tokenizer,
        length=length,
        pack=pack,
        max_tokens=max_tokens,
        add_special_tokens=add_special_tokens,
        owns=groups.owns_next if groups.teams > 1 else None,
    )
    started = time.monotonic()
    finished, new_sequences, new_tokens, seen = True, 0, 0, 0
    present = _Committed(Path(out))
    with (
        ps_cache.Writer(out, spec, resume=True, shard_bytes=shard_bytes) as writer,
        _Progress(progress, getattr(texts, "size", None), max_tokens, mine.world, Path(out)) as bar,
    ):
        committed_at = time.monotonic()
        try:
            for batch in _batches(sequences, batch_size):
                seen += len(batch)
                if not groups.within.owns(batch[0].key):
                    continue
                missing = [s.key not in writer for s in batch]
                present.check([s for s, m in zip(batch, missing, strict=True) if not m])
                if any(missing):
                    rows = _teacher_rows(model, head, batch, k, temperatures, token_log_probs, starts)
                    for sequence, (row, columns), wanted in zip(batch, rows, missing, strict=True):
                        if wanted:
                            writer.add(sequence.key, sequence.tokens, row, columns=columns)
                            new_sequences += 1
                            new_tokens += len(sequence.tokens)
                bar.update(batch, missing)
                if time.monotonic() - committed_at > commit_seconds:
                    writer.flush()
                    committed_at = time.monotonic()
        except KeyboardInterrupt:
            finished = False
    if seen == 0 and finished and groups.teams == 1:
        raise ValueError("no text found: every document is empty, or the first sequence is longer than max_tokens")
    written = ps_cache.open(out)
    return BuildReport(
        os.fspath(out),
        len(written),
        written.num_tokens,
        written.num_bytes,
        new_sequences,
        new_tokens,
        time.monotonic() - started,
        finished,
    )


def _head_of(model: Any) -> Head:
    from ..teachers import Head

    return Head.from_model(model, hidden="head_input")


def _vocab_size(head: Head) -> int:
    return int(head.vocab_size if head.vocab_size is not None else head.weight.shape[0])


def _batches(sequences: Iterator[TokenSequence], batch_size: int) -> Iterator[list[TokenSequence]]:
    """Batches of neighbours in length, formed inside a fixed window of a group of documents, so that they depend
    neither on what is committed nor on which groups a process does.
    """
    for _, group in groupby(sequences, key=lambda s: s.group):
        while window := list(islice(group, _WINDOW * batch_size)):
            window.sort(key=lambda s: -len(s.tokens))
            for start in range(0, len(window), batch_size):
                yield window[start : start + batch_size]


def _teacher_rows(
    model: Any,
    head: Head,
    batch: list[TokenSequence],
    k: int,
    temperatures: Sequence[float],
    token_log_probs: bool,
    word_starts: torch.Tensor | None,
) -> list[tuple[TopK, dict[str, torch.Tensor]]]:
    """Each sequence's rows: ids and log_probs [L, K], log_rest [L], the rest at the other temperatures, and on request
    token_log_probs [L], -inf in the last row; beside them further columns, the log mass [L] of word_starts [V]."""
    device = next(model.parameters()).device
    longest = max(len(s.tokens) for s in batch)
    ids = np.zeros((len(batch), longest), dtype=np.int64)
    mask = np.zeros((len(batch), longest), dtype=np.int64)
    following = np.full((len(batch), longest), -100, dtype=np.int64)
    for row, sequence in enumerate(batch):
        ids[row, : len(sequence.tokens)] = sequence.tokens
        mask[row, : len(sequence.tokens)] = 1
        following[row, : len(sequence.tokens) - 1] = sequence.tokens[1:]
    full = bool(mask.all())
    valid = torch.from_numpy(mask).to(device).bool()
    with torch.no_grad():
        hidden = teacher_hidden(model, torch.from_numpy(ids).to(device), None if full else valid.long())
        # [rows, D] -> [rows, K], no row spent on padding
        tokens = torch.from_numpy(following).to(device)[valid] if token_log_probs else None
        top, columns = _rows(hidden[valid], head, k, tokens, temperatures, word_starts)
    found, start = [], 0
    for sequence in batch:
        part = slice(start, start + len(sequence.tokens))
        found.append((top[part], {name: column[part] for name, column in columns.items()}))
        start = part.stop
    return found


def _rows(
    hidden: torch.Tensor,
    head: Head,
    k: int,
    tokens: torch.Tensor | None,
    temperatures: Sequence[float],
    word_starts: torch.Tensor | None,
) -> tuple[TopK, dict[str, torch.Tensor]]:
    """Rows [N, K] of states [N, D] and their columns; tokens [N], -100 for none."""
    from ..extraction import linear_topk
    from ..teachers import TopK
    from ..tokens import TokenLogprobs, token_logprobs

    columns, mass = {}, None
    if word_starts is not None or k == 0:
        asked = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        asked = asked if tokens is None else tokens.clamp(min=0)  # a row without a token has word ends too
        mass = token_logprobs(hidden, head, asked, subset=None if word_starts is None else word_starts.to(asked.device))
    if isinstance(mass, TokenLogprobs):
        assert mass.log_mass is not None
        columns[WORD_END] = mass.log_mass.cpu().clamp(min=-6e4, max=0)  # finite in fp16
    if k > 0:
        other = [t for t in temperatures if t != 1]
        return linear_topk(hidden, head, k, ids=tokens, temperatures=other).to("cpu"), columns
    assert mass is not None and tokens is not None
    found = mass.log_probs if isinstance(mass, TokenLogprobs) else mass
    found = torch.where(tokens < 0, -torch.inf, found).cpu()
    none = torch.empty(len(found), 0)
    return TopK(none.int(), none, log_rest=torch.zeros(len(found)), token_log_probs=found), columns


def _word_starts(tokenizer: Any, vocab_size: int) -> torch.Tensor:
    """bool [V]: the ids that begin a word; those that the tokenizer does not know begin none."""
    from ..xtok import VocabBytes

    known = torch.from_numpy(VocabBytes.from_tokenizer(tokenizer).word_starts())[:vocab_size]
    return torch.nn.functional.pad(known, (0, vocab_size - len(known)))


class _Committed:
    """Compares sequences that an earlier run committed with the text of this one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cache: Any = None
        if path.is_dir() and any(path.iterdir()):
            try:
                self.cache = ps_cache.open(path)
            except (ValueError, OSError):
                self.cache = None  # nothing committed yet, or not a cache: the writer says which

    def check(self, sequences: list[TokenSequence]) -> None:
        if self.cache is None:
            return
        for sequence in sequences:
            if sequence.key in self.cache and not np.array_equal(self.cache.tokens(sequence.key), sequence.tokens):
                raise ValueError(
                    f"{self.path} holds other tokens for {sequence.key!r} than the text has now: the text "
                    "or how it is tokenised "
                    "changed since the cache was begun; restore it, or build into a new folder"
                )


class _Progress:
    """A tqdm bar over tokens; the total is estimated from the share of the text already tokenised."""

    def __init__(self, shown: bool, size: int | None, max_tokens: int | None, world: int, out: Path) -> None:
        self.shown, self.size, self.world, self.out = shown, size, world, out
        self.max_tokens = max_tokens // world if max_tokens else None
        self.tokens = self.new = 0
        self.sized_again = 0.0

    def __enter__(self) -> _Progress:
        from tqdm import tqdm

        self.bar: Any = tqdm(total=self.max_tokens, unit="tok", unit_scale=True, disable=not self.shown, smoothing=0.1)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def update(self, batch: list[TokenSequence], missing: list[bool]) -> None:
        count = sum(len(s.tokens) for s in batch)
        fresh = sum(len(s.tokens) for s, m in zip(batch, missing, strict=True) if m)
        self.tokens += count
        self.new += fresh
        if not self.shown:
            return
        consumed = max(s.consumed for s in batch)
        if self.size and consumed:
            total = max(self.tokens, round(self.tokens * self.size / consumed))
            self.bar.total = min(total, self.max_tokens) if self.max_tokens else total
        if fresh:
            self.bar.update(count)
        else:  # already committed: no work, so no part of the rate
            self.bar.n += count
            self.bar.initial += count
            self.bar.refresh()
        if time.monotonic() < self.sized_again:  # a large cache has thousands of files
            return
        self.sized_again = time.monotonic() + 10
        if written := sum(f.stat().st_size for f in self.out.rglob("*") if f.is_file()):
            self.bar.set_postfix_str(f"{written / max(1, self.tokens * self.world):.0f} B/tok")
