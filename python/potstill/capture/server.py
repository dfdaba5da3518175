"""Asks a server for a teacher's top-k rows over token sequences and writes them into a cache."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from .. import cache as ps_cache
from ..integrations.servers import openai, sglang, vllm
from ..integrations.servers.http import Client, ServerError, Stopped
from ..integrations.servers.rows import ServerRows
from .builder import BuildReport, _Committed, _Progress
from .models import tokenizer_hash
from .plan import Shard, rank_and_world
from .sequences import TokenSequence, groups_of, token_sequences
from .server_command import KINDS
from .text import Document, TextSource

# A server whose first answers are all unusable is asked no more.
_PATIENCE = 8
T = TypeVar("T")


@dataclass
class RowServer:
    """A teacher behind HTTP: `rows(tokens)` asks for the rows of one sequence.

    kind: "vllm", "sglang" or "openai"; model: the name under which the server knows it (SGLang needs none).
    strings: the tokenizer's `TokenStrings`, for "openai" alone.
    """

    client: Client
    kind: str
    model: str = ""
    strings: openai.TokenStrings | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"the server's kind is {self.kind!r}: one of {', '.join(KINDS)} is accepted")
        if self.kind == "openai" and self.strings is None:
            raise ValueError("an openai server names tokens by text: give TokenStrings.from_tokenizer(tokenizer)")

    def rows(self, tokens: Any, *, k: int, vocab_size: int) -> ServerRows:
        """The rows of tokens [L]; ServerError where the server fails, ValueError where it answers of something else."""
        if self.kind == "vllm":
            path, body, read = vllm.PATH, vllm.vllm_request(tokens, k=k, model=self.model), vllm.vllm_answer
        elif self.kind == "sglang":
            path, body, read = sglang.PATH, sglang.sglang_request(tokens, k=k), sglang.sglang_answer
        else:
            path, body, read = openai.PATH, openai.openai_request(tokens, k=k, model=self.model), self._openai
        return read(self.client.post(path, body), tokens, k=k, vocab_size=vocab_size)

    def _openai(self, answer: Any, tokens: Any, *, k: int, vocab_size: int) -> ServerRows:
        assert self.strings is not None
        return openai.openai_answer(answer, tokens, k=k, vocab_size=vocab_size, strings=self.strings)


@dataclass(frozen=True)
class ServerReport(BuildReport):
    """A build's report, and what the server's rows were like in this run.

    problems: reason -> unusable rows; left_out: sequences not written because of them; short: rows of fewer than k
    entries; requests and retries: what was sent, and how often once more.
    """

    problems: Counter[str] = field(default_factory=Counter)
    left_out: int = 0
    short: int = 0
    requests: int = 0
    retries: int = 0


def build_from_server(
    server: RowServer,
    tokenizer: Any,
    texts: TextSource | Iterable[Document | str],
    out: str | os.PathLike[str],
    *,
    vocab_size: int,
    k: int = 64,
    length: int = 1024,
    pack: bool = True,
    values: str = "1/16",
    token_log_probs: bool = True,
    min_mass: float = 1.0,
    max_invalid: float = 0.0,
    concurrency: int = 16,
    max_tokens: int | None = None,
    add_special_tokens: bool = True,
    shard_bytes: int = 64 << 20,
    commit_seconds: float = 300.0,
    shard: str | tuple[int, int] | Shard | None = None,
    teacher: str | None = None,
    teacher_revision: str = "",
    progress: bool = False,
) -> ServerReport:
    """`build`, with the rows of a server: writes (or continues) the cache `out`.

    vocab_size: columns of the teacher's head; ids from it on are refused. `concurrency` requests are open at a time,
    one sequence each; rows are written in the order of the text. Sequences that are committed are compared with the
    text and not asked for again. token_log_probs: store the realised token's log-probability too.

    max_invalid: share of a sequence's rows that may be unusable; they are stored empty (loss 0 with tail="bucket").
    A sequence with more is left out, and asked again by the next run.
    shard: as `build` takes it; a sequence has one owner, by its key.

    An error of the server, like KeyboardInterrupt, ends the run with everything whole committed. Raises ServerError,
    and ValueError for what `build` does, for answers about other tokens, and where the first sequences are all
    unusable.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency is {concurrency}: at least 1 request at a time is needed")
    if not 0 <= max_invalid < 1:
        raise ValueError(f"max_invalid is {max_invalid}: a share of the rows from 0 to below 1 is accepted")
    if not 1 <= k <= vocab_size:
        raise ValueError(f"k is {k}: it must be between 1 and the teacher's vocabulary of {vocab_size}")
    spec = ps_cache.Spec(
        vocab_size=vocab_size,
        k=k,
        teacher=server.model if teacher is None else teacher,
        teacher_revision=teacher_revision,
        tokenizer=tokenizer_hash(tokenizer),
        values=values,
        token_log_probs=token_log_probs,
        min_mass=min_mass,
        extra={"length": length, "pack": pack, "server": server.kind},
    )
    mine = Shard() if shard is None else rank_and_world(shard, {})
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
    run = _Run(max_invalid)
    present = _Committed(Path(out))
    finished, seen = True, 0
    with (
        ps_cache.Writer(out, spec, resume=True, shard_bytes=shard_bytes) as writer,
        _Progress(progress, getattr(texts, "size", None), max_tokens, mine.world, Path(out)) as bar,
        _Threads(concurrency, server.client.stop) as threads,
    ):

        def asked() -> Iterator[tuple[TokenSequence, Callable[[], ServerRows] | None]]:
            nonlocal seen
            for sequence in sequences:
                seen += 1
                if not groups.within.owns(sequence.key):
                    continue
                if sequence.key in writer:
                    present.check([sequence])
                    yield sequence, None
                else:
                    yield sequence, partial(server.rows, sequence.tokens, k=k, vocab_size=vocab_size)

        committed_at = time.monotonic()
        try:
            for sequence, answer in threads.in_order(asked()):
                if answer is not None and run.accepts(sequence, answer):
                    writer.add(sequence.key, sequence.tokens, answer().topk)
                bar.update([sequence], [answer is not None])
                if time.monotonic() - committed_at > commit_seconds:
                    writer.flush()
                    committed_at = time.monotonic()
        except KeyboardInterrupt:
            finished = False
    if seen == 0 and finished and groups.teams == 1:
        raise ValueError("no text found: every document is empty, or the first sequence is longer than max_tokens")
    written = ps_cache.open(out)
    return ServerReport(
        os.fspath(out),
        len(written),
        written.num_tokens,
        written.num_bytes,
        run.sequences,
        run.tokens,
        time.monotonic() - started,
        finished,
        run.problems,
        run.left_out,
        run.short,
        server.client.requests,
        server.client.retries,
    )


class _Run:
    """Counts of one run, and the decision which sequences are written."""

    def __init__(self, max_invalid: float) -> None:
        self.max_invalid = max_invalid
        self.problems: Counter[str] = Counter()
        self.sequences = self.tokens = self.left_out = self.short = 0

    def accepts(self, sequence: TokenSequence, answer: Callable[[], ServerRows]) -> bool:
        try:
            rows = answer()
        except ServerError:
            raise
        except ValueError as e:
            raise ValueError(f"sequence {sequence.key!r}: {e}") from None
        self.problems.update(rows.problems)
        if sum(rows.problems.values()) > self.max_invalid * len(sequence.tokens):
            self.left_out += 1
            if self.left_out == _PATIENCE and not self.sequences:
                raise ValueError(f"the first {_PATIENCE} sequences all have unusable rows: {describe(self.problems)}")
            return False
        self.short += rows.short
        self.sequences += 1
        self.tokens += len(sequence.tokens)
        return True


def describe(problems: Counter[str]) -> str:
    """`1,203 rows with a mass above 1, 4 with no entries`, the most frequent first."""
    found = [f"{count:,} with {reason}" for reason, count in problems.most_common()]
    return "rows: " + ", ".join(found) if found else "none"


class _Threads:
    """Daemon threads for calls that wait: an interrupt need not wait for the open ones.

    At the end of the with-block `stop` is set, so that a call between two attempts ends.
    """

    def __init__(self, count: int, stop: threading.Event) -> None:
        self.count, self.stop = count, stop
        self.calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()

    def __enter__(self) -> _Threads:
        self.stop.clear()
        for _ in range(self.count):
            threading.Thread(target=self._work, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        for _ in range(self.count):
            self.calls.put(None)

    def in_order(
        self, calls: Iterable[tuple[TokenSequence, Callable[[], T] | None]]
    ) -> Iterator[tuple[TokenSequence, Callable[[], T] | None]]:
        """(name, result as a function that waits) in the order of `calls`, at most 2 * count of them ahead."""
        ahead: deque[tuple[TokenSequence, Callable[[], T] | None]] = deque()
        for name, call in calls:
            ahead.append((name, None if call is None else self._start(call).result))
            if len(ahead) >= 2 * self.count:
                yield ahead.popleft()
        yield from ahead

    def _start(self, call: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self.calls.put((future, call))
        return future

    def _work(self) -> None:
        while (item := self.calls.get()) is not None:
            future, call = item
            if self.stop.is_set():
                future.set_exception(Stopped())
                continue
            try:
                future.set_result(call())
            except BaseException as e:  # handed to the one who waits
                future.set_exception(e)
