"""`top_logprobs` in the form of OpenAI's API: completions with `echo`, and chat completions.

    POST /v1/completions {"prompt": [ids], "echo": true, "logprobs": k, "max_tokens": 1, ...}
    choices[0].logprobs = {"tokens": [text], "token_logprobs": [null, ...], "top_logprobs": [null, {text: log-prob}],
    ...}
    choices[0].logprobs = {"content": [{"token", "logprob", "bytes", "top_logprobs": [{"token", "logprob", "bytes"}]}]}

Tokens are named by their text, which is no id: `TokenStrings` maps it back by the tokenizer. A text that several ids
have (half a character shows as U+FFFD) makes its row invalid; it is counted, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .rows import AMBIGUOUS, MALFORMED, MISSING, UNKNOWN, Position, ServerRows, topk_rows
from .vllm import excerpt, numbers

PATH = "/v1/completions"
_TOKEN_ID = re.compile(r"token_id:(\d+)")
_MANY = -2


def openai_request(tokens: Sequence[int], *, k: int, model: str) -> dict[str, Any]:
    """The body of the request that `openai_answer` reads, for servers that take ids as a prompt and know `echo`."""
    return {
        "model": model,
        "prompt": [int(t) for t in tokens],
        "echo": True,
        "logprobs": k,
        "max_tokens": 1,
        "temperature": 1.0,
    }


class TokenStrings:
    """Token texts of a tokenizer -> ids, as a server may write them.

    Servers differ in what they call a token's text; the forms are tried in this order, and the first in which the
    server's own prompt reads like the tokens that were sent is taken: "decoded", what decode([id]) gives; "bytes", the
    token's bytes with U+FFFD for what is no UTF-8; "pieces", the vocabulary's own spelling. "token_id:<id>" is
    understood in any.
    """

    def __init__(self, forms: Mapping[str, Callable[[], list[str]]], size: int) -> None:
        self._forms, self.size = dict(forms), size
        self._made: dict[str, tuple[list[str], dict[str, int]]] = {}
        self._by_bytes: dict[bytes, int] | None = None
        self._bytes: Any = None

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, vocab_size: int | None = None) -> TokenStrings:
        """From a fast transformers tokenizer; ids from its length on, or from vocab_size on, have no text."""
        from potstill.xtok import VocabBytes

        size = min(len(tokenizer), vocab_size or len(tokenizer))
        bytes_of = VocabBytes.from_tokenizer(tokenizer)

        def decoded() -> list[str]:
            return list(tokenizer.batch_decode([[i] for i in range(size)], clean_up_tokenization_spaces=False))

        def by_bytes() -> list[str]:
            return [bytes_of[i].decode("utf-8", "replace") for i in range(size)]

        def pieces() -> list[str]:
            return [str(p) for p in tokenizer.convert_ids_to_tokens(list(range(size)))]

        made = cls({"decoded": decoded, "bytes": by_bytes, "pieces": pieces}, size)
        made._bytes = bytes_of
        return made

    def form(self, texts: Sequence[Any], tokens: Sequence[int]) -> str:
        """The form in which the tokens [L] read as texts [L]; ValueError, with the first place that differs, for
        none.
        """
        worst = 0
        for name in self._forms:
            names, _ = self._form(name)
            differ = (
                at for at, (text, t) in enumerate(zip(texts, tokens, strict=True)) if not self._is(names, text, int(t))
            )
            at = next(differ, None)
            if at is None:
                return name
            worst = max(worst, at)
        first, _ = self._form(next(iter(self._forms)))
        token = int(tokens[worst])
        own = first[token] if token < self.size else None
        raise ValueError(
            f"the server reads token {worst} as {texts[worst]!r}, the tokenizer has {own!r} (id {token}) there: "
            "it has another tokenizer, or names tokens in an unknown way"
        )

    def id(self, text: Any, form: str) -> int:
        """The id of a text; -1 for none and -2 for several."""
        if not isinstance(text, str):
            return -1
        if match := _TOKEN_ID.fullmatch(text):
            return int(match[1])
        return self._form(form)[1].get(text, -1)

    def id_of_bytes(self, content: Any) -> int:
        """The id whose bytes are these (a list of ints); -1 for none and -2 for several."""
        if self._by_bytes is None:
            self._by_bytes = {}
            for i in range(self.size if self._bytes is not None else 0):
                key = self._bytes[i]
                self._by_bytes[key] = _MANY if key in self._by_bytes else i
        try:
            return self._by_bytes.get(bytes(content), -1)
        except (TypeError, ValueError):
            return -1

    def _form(self, name: str) -> tuple[list[str], dict[str, int]]:
        if name not in self._made:
            names = self._forms[name]()
            ids: dict[str, int] = {}
            for i, text in enumerate(names):
                ids[text] = _MANY if text in ids else i
            self._made[name] = names, ids
        return self._made[name]

    def _is(self, names: list[str], text: Any, token: int) -> bool:
        return token < len(names) and (text == names[token] or text == f"token_id:{token}")


def openai_answer(answer: Any, tokens: Any, *, k: int, vocab_size: int, strings: TokenStrings) -> ServerRows:
    """The body of an answer to `openai_request` -> rows of tokens [L]."""
    try:
        logprobs = answer["choices"][0]["logprobs"]
    except (KeyError, IndexError, TypeError):
        logprobs = None
    if not isinstance(logprobs, Mapping):
        raise ValueError(f"not a completion with logprobs: {excerpt(answer)}")
    return openai_rows(logprobs, tokens, k=k, vocab_size=vocab_size, strings=strings)


def openai_rows(
    logprobs: Mapping[str, Any], tokens: Any, *, k: int, vocab_size: int, strings: TokenStrings
) -> ServerRows:
    """`logprobs` of a completion with echo over tokens [L] -> rows, of which row i predicts tokens[i + 1].

    The entry after the L-th, of the first generated token, gives the last row; without one that row is left out. Raises
    ValueError where the server did not echo the prompt, or reads it as other tokens.
    """
    tokens = np.asarray(tokens)
    own, own_lp, top = (logprobs.get(name) for name in ("tokens", "token_logprobs", "top_logprobs"))
    for name, value in (("tokens", own), ("token_logprobs", own_lp), ("top_logprobs", top)):
        if not isinstance(value, Sequence) or len(value) < len(tokens):
            have = f"{len(value)} entries" if isinstance(value, Sequence) else excerpt(value)
            raise ValueError(
                f"logprobs.{name} has {have} for {len(tokens)} tokens: the server must know echo together with logprobs"
            )
    assert own is not None and own_lp is not None and top is not None
    form = strings.form(own[: len(tokens)], tokens.tolist())
    if top[0] or own_lp[0] is not None:
        raise ValueError(
            "entry 0 of top_logprobs is not null: nothing comes before the first token, so these rows were shifted"
        )
    end = len(tokens)
    positions = [_position(t, lp, strings, form) for t, lp in zip(top[1:end], own_lp[1:end], strict=True)]
    positions.append(_position(top[end], None, strings, form) if len(top) > end else None)
    return topk_rows(positions, tokens, k=k, vocab_size=vocab_size)


def openai_chat_rows(
    content: Sequence[Any], tokens: Any, *, start: int, k: int, vocab_size: int, strings: TokenStrings
) -> ServerRows:
    """`logprobs.content` of a chat completion -> rows of tokens [L], prompt and completion.

    start: where the completion begins in tokens, at least 1. content[j] is the distribution of tokens[start + j],
    that is
    row start + j - 1; rows before it are left out. Tokens are found by their `bytes` where the server gives them,
    else by text. Raises ValueError where the completion is not what follows `start`.
    """
    tokens = np.asarray(tokens)
    if not 1 <= start <= len(tokens) or len(content) != len(tokens) - start:
        raise ValueError(
            f"{len(content)} entries of content for tokens {start} to {len(tokens)}: one for each token of the "
            "completion is needed, and a prompt of at least 1 token"
        )
    positions: list[Position] = [None] * len(tokens)
    for j, entry in enumerate(content):
        at, position = _chat_position(entry, strings)
        if at >= 0 and at != tokens[start + j]:
            raise ValueError(f"content[{j}] is token {at}, the sequence has {tokens[start + j]} at place {start + j}")
        positions[start + j - 1] = position
    return topk_rows(positions, tokens, k=k, vocab_size=vocab_size)


def _position(top: Any, realised: Any, strings: TokenStrings, form: str) -> Position:
    if not top:
        return MISSING
    if not isinstance(top, Mapping) or not numbers(list(top.values())) or not (realised is None or numbers([realised])):
        return MALFORMED
    ids = [strings.id(text, form) for text in top]
    if min(ids) < 0:
        return AMBIGUOUS if _MANY in ids else UNKNOWN
    return ids, list(top.values()), realised


def _chat_position(entry: Any, strings: TokenStrings) -> tuple[int, Position]:
    """(id of the token itself or below 0, its position)."""

    def found(one: Any) -> int:
        content = one.get("bytes")
        return strings.id_of_bytes(content) if content else strings.id(one.get("token"), "decoded")

    if not isinstance(entry, Mapping) or not isinstance(entry.get("top_logprobs"), Sequence):
        return -1, MALFORMED
    top = entry["top_logprobs"]
    if not all(isinstance(t, Mapping) for t in top):
        return -1, MALFORMED
    own, values = found(entry), [t.get("logprob") for t in top]
    if not numbers([*values, entry.get("logprob")]):
        return own, MALFORMED
    ids = [found(t) for t in top]
    if not ids:
        return own, MISSING
    if min(ids) < 0:
        return own, AMBIGUOUS if _MANY in ids else UNKNOWN
    return own, (ids, values, entry["logprob"])
