"""SGLang's `input_top_logprobs` and `input_token_logprobs`.

    POST /generate {"input_ids": [ids], "return_logprob": true, "logprob_start_len": 0, "top_logprobs_num": k, ...}
    meta_info.input_token_logprobs = [[null, id, text], [log-prob, id, text], ...]
    meta_info.input_top_logprobs   = [null, [[log-prob, id, text], ... k of them], ...]

Entry i is the distribution of token i given those before it, so entry i + 1 is row i. Entries are [log-prob, id, text]
in this order, text null unless asked for. The row after the last token comes from the one token that is generated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .rows import MALFORMED, MISSING, Position, ServerRows, topk_rows
from .vllm import excerpt, numbers

PATH = "/generate"


def sglang_request(tokens: Sequence[int], *, k: int, model: str = "") -> dict[str, Any]:
    """The body of the request that `sglang_answer` reads; a server has one model, so `model` is not sent."""
    return {
        "input_ids": [int(t) for t in tokens],
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": k,
        "return_text_in_logprobs": False,
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
    }


def sglang_answer(answer: Any, tokens: Any, *, k: int, vocab_size: int) -> ServerRows:
    """The body of an answer to `sglang_request` -> rows of tokens [L]."""
    answer = answer[0] if isinstance(answer, list) and len(answer) == 1 else answer
    meta = answer.get("meta_info") if isinstance(answer, Mapping) else None
    if not isinstance(meta, Mapping) or "input_top_logprobs" not in meta:
        raise ValueError(f"not a generation of SGLang with input_top_logprobs: {excerpt(answer)}")
    return sglang_rows(meta, tokens, k=k, vocab_size=vocab_size)


def sglang_rows(meta_info: Mapping[str, Any], tokens: Any, *, k: int, vocab_size: int) -> ServerRows:
    """`meta_info` of a request over tokens [L] from logprob_start_len 0 -> rows, of which row i predicts tokens[i + 1].

    k: what top_logprobs_num was set to. Raises ValueError where the whole is not about these tokens: another length,
    other ids in input_token_logprobs, or a first entry with a log-probability.
    """
    tokens = np.asarray(tokens)
    top, own = meta_info.get("input_top_logprobs"), meta_info.get("input_token_logprobs")
    for name, value in (("input_top_logprobs", top), ("input_token_logprobs", own)):
        if not isinstance(value, Sequence) or len(value) != len(tokens):
            have = f"{len(value)} entries" if isinstance(value, Sequence) else excerpt(value)
            raise ValueError(
                f"{name} has {have} for {len(tokens)} tokens: ask with return_logprob, logprob_start_len=0 and "
                "top_logprobs_num"
            )
    assert top is not None and own is not None
    seen = [entry[1] if _is_entry(entry, first=at == 0) else None for at, entry in enumerate(own)]
    if seen != tokens.tolist():
        at = next(i for i, (a, b) in enumerate(zip(seen, tokens.tolist(), strict=True)) if a != b)
        raise ValueError(
            f"input_token_logprobs names token {seen[at]} at place {at}, the sequence has {tokens[at]} there"
        )
    if top[0] or own[0][0] is not None:
        raise ValueError(
            "entry 0 of input_top_logprobs is not None: nothing comes before the first token, so these rows "
            "were shifted"
        )
    positions: list[Position] = [_position(t, o[0]) for t, o in zip(top[1:], own[1:], strict=True)]
    generated = meta_info.get("output_top_logprobs")
    positions.append(_position(generated[0], None) if isinstance(generated, Sequence) and generated else None)
    return topk_rows(positions, tokens, k=k, vocab_size=vocab_size)


def _position(entries: Any, realised: float | None) -> Position:
    if not entries:
        return MISSING
    if not isinstance(entries, Sequence) or not set(map(type, entries)) <= {list, tuple}:
        return MALFORMED
    if not set(map(len, entries)) <= {2, 3}:
        return MALFORMED
    values, ids = [e[0] for e in entries], [e[1] for e in entries]
    return (ids, values, realised) if numbers(values) and set(map(type, ids)) <= {int} else MALFORMED


def _is_entry(entry: Any, first: bool = False) -> bool:
    """[log-prob, id, text]; the very first token has no log-probability."""
    if (
        not isinstance(entry, Sequence)
        or isinstance(entry, str)
        or len(entry) not in (2, 3)
        or type(entry[1]) is not int
    ):
        return False
    return numbers([entry[0]]) or (first and entry[0] is None)
