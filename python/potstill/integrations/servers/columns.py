"""Teacher rows that stand in a data set's columns: axolotl's, and what TRL's vLLM client returns.

axolotl: target_token_ids, target_logprobs, target_mask, each [L, k] beside input_ids [L]. Which token row i speaks of
differs between its own writers, and the log-probabilities are usually renormalised over the k; neither can be read from
the numbers with certainty, so both are said by the caller and held against what can be checked.

TRL: `get_sequence_logprobs` gives logprobs, logprob_token_ids [completion, k] and actual_logprobs [completion, 1];
row t is the distribution of token t of the completion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .rows import MALFORMED, Position, ServerRows, topk_rows
from .vllm import numbers

PREDICTS = ("next", "this")
MASS = ("full", "renormalised")


def axolotl_rows(
    example: Mapping[str, Any], *, predicts: str, mass: str, k: int | None = None, vocab_size: int
) -> ServerRows:
    """The columns of one example -> rows, of which row i predicts input_ids[i + 1].

    predicts: "next" where row i of the columns speaks of input_ids[i + 1], "this" where it speaks of input_ids[i] (the
        columns of a data set written beside the labels).
    mass: "full" for log-probabilities over the whole vocabulary, "renormalised" for those scaled to a mass of 1 over
        the k: of these nothing is known outside the k, log_rest is -inf, and tail="renormalize" is what fits them.
    k: entries to keep; None keeps all columns have.

    Rows whose mask is 0 throughout are left out. The realised token's log-probability is known where it is one of the k
    and -inf elsewhere. Raises ValueError for columns that miss or differ in length, and for a mass that all rows belie.
    """
    if predicts not in PREDICTS or mass not in MASS:
        raise ValueError(
            f"predicts={predicts!r}, mass={mass!r}: predicts is one of {', '.join(PREDICTS)}; mass is one of "
            f"{', '.join(MASS)}"
        )
    names = ("input_ids", "target_token_ids", "target_logprobs")
    if missing := [name for name in names if name not in example]:
        raise ValueError(f"the example has no column {missing[0]!r} (it has {', '.join(map(repr, example))})")
    tokens, ids, log_probs = (example[name] for name in names)
    masks = example.get("target_mask")
    masks = [[1]] * len(tokens) if masks is None else masks
    if not len(tokens) == len(ids) == len(log_probs) == len(masks):
        raise ValueError(
            f"input_ids has {len(tokens)} entries, target_token_ids {len(ids)}, target_logprobs {len(log_probs)}, "
            f"target_mask {len(masks)}: each has one a token"
        )
    positions = [_position(*row) for row in zip(ids, log_probs, masks, strict=True)]
    if predicts == "this":
        positions = [*positions[1:], None]
    _check_mass(positions, mass, vocab_size)
    width = max((len(p[0]) for p in positions if isinstance(p, tuple)), default=1)
    return _rows(positions, np.asarray(tokens), min(k or width, vocab_size), vocab_size, mass == "renormalised")


def trl_rows(result: Mapping[str, Any], tokens: Any, *, prompt_length: int, k: int, vocab_size: int) -> ServerRows:
    """One sequence of what TRL's `VLLMClient.get_sequence_logprobs` returned -> rows of its tokens [L].

    result: logprobs and logprob_token_ids [L - prompt_length, k], padded with -inf, and actual_logprobs
    [L - prompt_length, 1] (-inf where the token was outside the k), asked at temperature 1. Row i predicts
    tokens[i + 1]; rows before prompt_length - 1, and the last, are left out. Raises ValueError for lengths that do
    not fit.
    """
    tokens = np.asarray(tokens)
    ids, log_probs, own = (result.get(n) for n in ("logprob_token_ids", "logprobs", "actual_logprobs"))
    size = len(tokens) - prompt_length
    given = [len(x) if isinstance(x, Sequence) else None for x in (ids, log_probs, own)]
    if not 1 <= prompt_length <= len(tokens) or given != [size] * 3:
        raise ValueError(
            f"logprob_token_ids, logprobs and actual_logprobs have {given} entries; a completion of {size} tokens "
            f"after a prompt of {prompt_length} (at least 1) needs {size} each"
        )
    assert ids is not None and log_probs is not None and own is not None
    positions: list[Position] = [None] * len(tokens)
    for t in range(size):
        position = _position(ids[t], log_probs[t], [1])
        if isinstance(position, tuple) and own[t] and own[t][0] > -np.inf:
            position = position[0], position[1], own[t][0]
        positions[prompt_length + t - 1] = position
    return _rows(positions, tokens, k, vocab_size, False)


def _rows(positions: list[Position], tokens: Any, k: int, vocab_size: int, renormalised: bool) -> ServerRows:
    """Columns keep no realised token beyond the k, so a row without it is as good as another."""
    known = []
    for position, token in zip(positions, [*tokens[1:].tolist(), -1], strict=True):
        if isinstance(position, tuple) and position[2] is None and token not in position[0]:
            position = position[0], position[1], -np.inf
        known.append(position)
    return topk_rows(known, tokens, k=k, vocab_size=vocab_size, renormalised=renormalised)


def _position(ids: Any, log_probs: Any, mask: Any) -> Position:
    mask = mask if isinstance(mask, Sequence) else [mask]
    if not any(mask):
        return None
    if not isinstance(ids, Sequence) or not isinstance(log_probs, Sequence) or len(ids) != len(log_probs):
        return MALFORMED
    if not numbers(list(log_probs)) or not all(type(i) is int for i in ids):
        return MALFORMED
    kept = [(i, lp) for i, lp in zip(ids, log_probs, strict=True) if lp != -np.inf]  # -inf pads a short row
    return [i for i, _ in kept], [lp for _, lp in kept], None


def _check_mass(positions: list[Position], mass: str, vocab_size: int) -> None:
    rows = [p for p in positions if isinstance(p, tuple) and 1 < len(p[0]) < vocab_size]
    ones = [abs(float(np.exp(p[1]).sum()) - 1) < 1e-5 for p in rows]
    if mass == "full" and len(ones) > 1 and all(ones):
        raise ValueError(
            "the mass of every row is 1 over its entries: these were renormalised, give mass='renormalised' "
            "(their rest is "
            "not known)"
        )
    if mass == "renormalised" and ones and not all(ones):
        at = float(np.exp(rows[ones.index(False)][1]).sum())
        raise ValueError(
            f"a row has a mass of {at:.6g} over its entries, not 1: these were not renormalised, give mass='full'"
        )
