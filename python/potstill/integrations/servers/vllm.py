"""vLLM's `prompt_logprobs`: the dict form of every version and the flat form of newer ones.

    POST /v1/completions {"prompt": [ids], "max_tokens": 1, "prompt_logprobs": k, "logprobs": k, ...}
    choices[0].prompt_logprobs = [null, {"<id>": {"logprob": ..., "rank": ..., "decoded_token": ...}, ...}, ...]

Entry i is the distribution of token i given those before it, so entry i + 1 is row i. The prompt's own token stands
first and makes k + 1 entries where it is not among the k most probable; the order of a dict is no order of
probability, and ranks count ties, so neither is used. Log-probabilities are those of T = 1 (`--logprobs-mode
raw_logprobs`, the default). The row after the last token comes from the one token that is generated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .rows import MALFORMED, MISSING, Position, ServerRows, topk_rows

PATH = "/v1/completions"
_FLAT = ("start_indices", "end_indices", "token_ids", "logprobs")
_TOKEN_ID = re.compile(r"token_id:(\d+)")


def vllm_request(tokens: Sequence[int], *, k: int, model: str) -> dict[str, Any]:
    """The body of the request that `vllm_answer` reads; the server's --max-logprobs must be at least k."""
    return {
        "model": model,
        "prompt": [int(t) for t in tokens],
        "max_tokens": 1,
        "temperature": 1.0,
        "prompt_logprobs": k,
        "logprobs": k,
        "return_tokens_as_token_ids": True,
    }


def vllm_answer(answer: Any, tokens: Any, *, k: int, vocab_size: int) -> ServerRows:
    """The body of an answer to `vllm_request` -> rows of tokens [L]."""
    try:
        choice = answer["choices"][0]
        prompt = choice["prompt_logprobs"]
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"not a completion of vLLM with prompt_logprobs: {excerpt(answer)}") from None
    return vllm_rows(prompt, tokens, k=k, vocab_size=vocab_size, generated=choice.get("logprobs"))


def vllm_rows(prompt_logprobs: Any, tokens: Any, *, k: int, vocab_size: int, generated: Any = None) -> ServerRows:
    """`prompt_logprobs` of tokens [L], as JSON or as vLLM's own objects -> rows, of which row i predicts tokens[i + 1].

    prompt_logprobs: a list of None (entry 0) and {id: entry}, an entry being a mapping or an object with `logprob`; or
    the flat form, a mapping or an object with start_indices, end_indices, token_ids and logprobs. k: what
    prompt_logprobs was set to. generated: the `logprobs` of the completion, whose first token gives the last row;
    that row is left out where they are None, or name tokens otherwise than as "token_id:<id>".

    Raises ValueError where the whole is not about these tokens: another length, or an entry 0 that is not None.
    """
    tokens = np.asarray(tokens)
    flat = _flat(prompt_logprobs)
    entries = _from_flat(*flat) if flat else prompt_logprobs
    if not isinstance(entries, Sequence) or isinstance(entries, (str, bytes)):
        raise ValueError(f"prompt_logprobs is {excerpt(prompt_logprobs)}: a list with an entry a token is needed")
    if len(entries) != len(tokens):
        raise ValueError(
            f"prompt_logprobs has {len(entries)} entries for {len(tokens)} tokens: the server saw another "
            "prompt (was it cut, or were special tokens added?)"
        )
    if entries[0]:
        raise ValueError(
            "entry 0 of prompt_logprobs is not None: nothing comes before the first token, so these rows were shifted"
        )
    positions = [_position(entry) for entry in entries[1:]]
    positions.append(completion_position(generated))
    return topk_rows(positions, tokens, k=k, vocab_size=vocab_size)


def _position(entry: Any) -> Position:
    if not entry:
        return MISSING
    if isinstance(entry, tuple):
        return entry
    if not isinstance(entry, Mapping):
        return MALFORMED
    try:
        ids = [int(i) for i in entry]
        values = [e["logprob"] if isinstance(e, Mapping) else e.logprob for e in entry.values()]
    except (KeyError, ValueError, TypeError, AttributeError):
        return MALFORMED
    return (ids, values, None) if numbers(values) else MALFORMED


def _flat(value: Any) -> tuple[Any, ...] | None:
    """start_indices, end_indices, token_ids, logprobs of the flat form, or None for another."""
    if isinstance(value, Mapping):
        return tuple(value[name] for name in _FLAT) if all(name in value for name in _FLAT) else None
    return tuple(getattr(value, name) for name in _FLAT) if all(hasattr(value, name) for name in _FLAT) else None


def _from_flat(starts: Any, ends: Any, ids: Any, log_probs: Any) -> list[Any]:
    ids, log_probs = list(ids), list(log_probs)
    if len(ids) != len(log_probs) or len(starts) != len(ends):
        raise ValueError(
            f"flat prompt_logprobs of {len(ids)} token_ids and {len(log_probs)} logprobs, {len(starts)} "
            f"start_indices and {len(ends)} end_indices: each pair must be of one length"
        )
    entries: list[Any] = []
    for start, end in zip(starts, ends, strict=True):
        if not 0 <= start <= end <= len(ids):
            raise ValueError(f"flat prompt_logprobs: entries {start} to {end} of {len(ids)}: indices must rise and fit")
        one, values = ids[start:end], log_probs[start:end]
        good = all(type(i) is int for i in one) and numbers(values)
        # the prompt's token stands first, and once more where it is among the k
        entries.append(((one, values, None) if good else MALFORMED) if end > start else None)
    return entries


def completion_position(generated: Any) -> Position:
    """The position of the first generated token in a completion's `logprobs`, or None where it cannot be read by
    ids.
    """
    top = (generated or {}).get("top_logprobs") if isinstance(generated, Mapping) else None
    if not isinstance(top, Sequence) or not top or not isinstance(top[0], Mapping):
        return None
    named = [(_TOKEN_ID.fullmatch(name), value) for name, value in top[0].items()]
    if not named or not all(match for match, _ in named) or not numbers([v for _, v in named]):
        return None
    return [int(match[1]) for match, _ in named if match], [value for _, value in named], None


def numbers(values: list[Any]) -> bool:
    """True where every value is an int or a float, and none a bool."""
    return set(map(type, values)) <= {float, int}


def excerpt(value: Any, length: int = 200) -> str:
    """A value as an error message shows it, on one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= length else text[:length] + "..."
