"""Sequence scores from caches of realised tokens (`potstill score`), and the sequences that they select."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from potstill.arguments import check_choice
from potstill.methods.samplers import Best, top_ratio

if TYPE_CHECKING:
    from potstill.cache import Cache

Floats = NDArray[np.float64]
BLOCK = 1024  # sequences decoded at a time


def token_scores(cache: Cache, keys: Sequence[str]) -> list[NDArray[np.float32]]:
    """For each sequence of L tokens the log-probabilities [L - 1] of its second to last token, given those before each.

    cache: one that holds token_log_probs. Raises ValueError where it does not.
    """
    if not cache.spec.token_log_probs:
        raise ValueError(
            f"{cache.path} holds no log-probabilities of its own tokens: build it with `potstill score`, or with "
            "Spec(token_log_probs=True)"
        )
    rows, starts = cache.packed(keys)
    assert rows.token_log_probs is not None
    found = rows.token_log_probs.numpy()
    # the last row of a sequence predicts a token that is not in it
    return [found[a : max(a, b - 1)] for a, b in zip(starts[:-1], starts[1:], strict=True)]


def sequence_scores(cache: Cache, keys: Sequence[str] | None = None, *, reduction: str = "sum") -> Floats:
    """Log-probability [n] of each sequence under the cache's model, fp64; keys: all, in commit order, where None.

    reduction: "sum", or "mean" over the L - 1 predicted tokens (-mean is the negative log-likelihood a token).
    A sequence of one token scores 0. Equals `preference.sequence_logprobs` of the model on the same tokens.
    """
    check_choice("reduction", reduction, ("sum", "mean"))
    wanted = cache.keys() if keys is None else list(keys)
    out = np.zeros(len(wanted))
    for start in range(0, len(wanted), BLOCK):
        for i, scores in enumerate(token_scores(cache, wanted[start : start + BLOCK])):
            total = scores.sum(dtype=np.float64)
            out[start + i] = total / max(1, len(scores)) if reduction == "mean" else total
    return out


class ScoreDifference:
    """log p_teacher(x) - log p_reference(x) of each sequence, block by block: the score by which MiniPLM keeps data.

    teacher, reference: caches of the same sequences under both models; the teacher's order of keys is the order here.
    reduction: "mean" a token (the authors' code) or "sum". Iterate `blocks()` for arrays [<= 1024] of fp64.
    arXiv:2410.17215, read in the authors' code; its README prints a ratio of logs, code and text have the log-ratio.
    """

    def __init__(self, teacher: Cache, reference: Cache, *, reduction: str = "mean") -> None:
        check_choice("reduction", reduction, ("sum", "mean"))
        self.teacher, self.reference, self.reduction = teacher, reference, reduction
        self.keys = teacher.keys()
        for key in self.keys:
            if key not in reference or teacher.token_hash(key) != reference.token_hash(key):
                what = "has no sequence" if key not in reference else "has other tokens for"
                raise ValueError(f"{reference.path} {what} {key!r} of {teacher.path}: score one text with both models")

    def blocks(self) -> Iterator[Floats]:
        for start in range(0, len(self.keys), BLOCK):
            keys = self.keys[start : start + BLOCK]
            scores = [sequence_scores(c, keys, reduction=self.reduction) for c in (self.teacher, self.reference)]
            yield scores[0] - scores[1]

    def best(self, ratio: float) -> Best:
        """The selection of the best `ratio` (`samplers.top_ratio`), equal to a stable global sort."""
        return top_ratio(self.blocks, ratio)

    def kept(self, ratio: float) -> Iterator[str]:
        """Keys of the best `ratio`, in the cache's order; memory is one block's."""
        masks = self.best(ratio).masks(self.blocks())
        for start, mask in zip(range(0, len(self.keys), BLOCK), masks, strict=True):
            yield from (key for key, keep in zip(self.keys[start : start + BLOCK], mask, strict=True) if keep)
