"""Sequences to distil on that a model writes itself: who writes, where it first errs, and who writes on from there.

    writers = {"student": model_source(student, eos_token_id=2, pad_token_id=0), "data": None}
    rollouts = Rollouts(writers, {"student": 0.5, "data": 0.5}, max_new_tokens=64, pad_token_id=0)
    rollout = rollouts(prompts, step=step, completions=written)    # tokens, mask, labels of the rows

A source is any callable `(prompts, max_new_tokens, seed) -> completions` over lists of ids. Sequences come back
padded on the right, and labels name the token after each row, as everywhere in this library.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
Ids = Sequence[int]
Source = Callable[[Sequence[Ids], int, int], Sequence[Ids]]
# (prompt, completion) of each sequence -> index in the completion of the first error, its length where there is none
FirstError = Callable[[Sequence[Ids], Sequence[Ids]], Sequence[int]]


@dataclass(frozen=True)
class Rollout:
    """B sequences of prompt and completion, padded on the right to L.

    tokens: int64 [B, L].  mask: bool [B, L], True for real tokens.  prompt_lengths: int64 [B].
    sources: who wrote each completion, by name; "+regenerated" is added where another wrote on from an error.
    first_error: int64 [B], index in the first writer's completion of its first error; its length where there was
        none, or where nothing looked.
    ends: int64 [B], length of what is learnt from, prompt included: all of it, or up to and with the first error
        where that was asked for.
    """

    tokens: Tensor
    mask: Tensor
    prompt_lengths: Tensor
    sources: list[str]
    first_error: Tensor
    ends: Tensor

    @property
    def labels(self) -> Tensor:
        """int64 [B, L]: the token after row i where that is one of the completion and before `ends`, else -100."""
        after = torch.arange(1, self.tokens.shape[1] + 1, device=self.tokens.device)
        wanted = (after >= self.prompt_lengths[:, None]) & (after < self.ends[:, None])
        following = torch.nn.functional.pad(self.tokens[:, 1:], (0, 1), value=IGNORED)
        return torch.where(wanted, following, IGNORED)

    def to(self, device: Any) -> Rollout:
        """The same on another device."""
        names = ("tokens", "mask", "prompt_lengths", "first_error", "ends")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


class Rollouts:
    """Draws a source for each prompt, lets it write, finds the first error and lets another write on from there.

    sources: name -> `Source`, or None for completions that are given with the prompts (GKD's fixed data set).
    probabilities: name -> chance, summing to 1; each sequence draws for itself (arXiv:2306.13649, lambda of GKD).
    first_error: a `FirstError`, for instance `outside_top_k(teacher, 25)`.
    regenerate: a `Source` that writes on behind what precedes the first error (arXiv:2410.11325's teacher); repairs are
        looked at again, `rounds` times at most. None leaves completions as they are.
    learn_past_error: False ends the labels with the first error that remains.
    seed: a call is reproducible by (seed, step), whatever else draws random numbers.
    """

    def __init__(
        self,
        sources: Mapping[str, Source | None],
        probabilities: Mapping[str, float],
        *,
        max_new_tokens: int,
        pad_token_id: int,
        first_error: FirstError | None = None,
        regenerate: Source | None = None,
        rounds: int = 1,
        learn_past_error: bool = True,
        seed: int = 0,
    ) -> None:
        if unknown := set(probabilities) - set(sources):
            raise ValueError(f"probabilities name {sorted(unknown)}, sources are {sorted(sources)}")
        total = sum(probabilities.values())
        if not probabilities or min(probabilities.values()) < 0 or abs(total - 1) > 1e-6:
            raise ValueError(f"probabilities are {dict(probabilities)}: none below 0 and a sum of 1 are needed")
        if max_new_tokens < 1 or rounds < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens}, rounds={rounds}: at least 1 each is needed")
        if (regenerate is not None or not learn_past_error) and first_error is None:
            raise ValueError("regenerate and learn_past_error=False need first_error, which says where the error is")
        self.sources, self.probabilities = dict(sources), dict(probabilities)
        self.max_new_tokens, self.pad_token_id, self.seed = max_new_tokens, pad_token_id, seed
        self.first_error, self.regenerate, self.rounds = first_error, regenerate, rounds
        self.learn_past_error = learn_past_error

    def __call__(self, prompts: Sequence[Ids], *, completions: Sequence[Ids] | None = None, step: int = 0) -> Rollout:
        """prompts: ids, at least one each. completions: what a source of None has written, one a prompt."""
        given = [[int(t) for t in p] for p in prompts]
        if not given or not all(given):
            raise ValueError("a rollout needs prompts of at least 1 token each (a begin-of-text token, for instance)")
        drawn = self.draw(len(given), step)
        written: list[list[int]] = [[] for _ in given]
        for name, source in self.sources.items():
            at = [i for i, chosen in enumerate(drawn) if chosen == name]
            if not at:
                continue
            if source is None:
                if completions is None or len(completions) != len(given):
                    raise ValueError(f"source {name!r} is None: give completions, one for each of {len(given)} prompts")
                found: Sequence[Ids] = [completions[i] for i in at]
            else:
                found = self._ask(source, [given[i] for i in at], self.max_new_tokens, f"{name}/{step}")
            for i, completion in zip(at, found, strict=True):
                written[i] = [int(t) for t in completion]
        first, remaining, mended = self._mend(given, written, step)
        sources = [f"{name}+regenerated" if m else name for name, m in zip(drawn, mended, strict=True)]
        return self._padded(given, written, sources, first, remaining)

    def draw(self, count: int, step: int) -> list[str]:
        """The source of each of `count` sequences of a step."""
        names = list(self.probabilities)
        g = torch.Generator().manual_seed(_seed(self.seed, f"draw/{step}"))
        weights = torch.tensor([self.probabilities[n] for n in names], dtype=torch.float64)
        return [names[i] for i in torch.multinomial(weights, count, replacement=True, generator=g).tolist()]

    def _ask(self, source: Source, prompts: list[list[int]], room: int, name: str) -> list[list[int]]:
        found = [[int(t) for t in c] for c in source(prompts, room, _seed(self.seed, name))]
        if len(found) != len(prompts) or max(map(len, found)) > room:
            raise ValueError(
                f"a source gave {len(found)} completions of at most {max(map(len, found), default=0)} tokens for "
                f"{len(prompts)} prompts and max_new_tokens={room}: one each, none longer, is needed"
            )
        return found

    def _mend(
        self, prompts: list[list[int]], written: list[list[int]], step: int
    ) -> tuple[list[int], list[int], list[bool]]:
        """(first error of what was written, first error that remains, whether it was repaired); `written` changes."""
        whole = [len(c) for c in written]
        if self.first_error is None:
            return whole, whole, [False] * len(prompts)
        first = remaining = self._errors(prompts, written)
        mended = [False] * len(prompts)
        for turn in range(self.rounds if self.regenerate is not None else 0):
            assert self.regenerate is not None
            at = [i for i, e in enumerate(remaining) if e < len(written[i]) and e < self.max_new_tokens]
            if not at:
                break
            # those with equal room go together, as a source writes the same number of tokens for all
            for room in sorted({self.max_new_tokens - remaining[i] for i in at}):
                group = [i for i in at if self.max_new_tokens - remaining[i] == room]
                starts = [prompts[i] + written[i][: remaining[i]] for i in group]
                found = self._ask(self.regenerate, starts, room, f"regenerate/{step}/{turn}/{room}")
                for i, completion in zip(group, found, strict=True):
                    written[i][remaining[i] :] = completion
                    mended[i] = True
            remaining = self._errors(prompts, written)
        return first, remaining, mended

    def _errors(self, prompts: list[list[int]], written: list[list[int]]) -> list[int]:
        assert self.first_error is not None
        found = [int(e) for e in self.first_error(prompts, written)]
        if len(found) != len(written) or any(not 0 <= e <= len(c) for e, c in zip(found, written, strict=False)):
            raise ValueError(
                f"first_error gave {found} for completions of {[len(c) for c in written]} tokens: an index "
                f"each, the length "
                "where there is no error, is needed"
            )
        return found

    def _padded(
        self,
        prompts: list[list[int]],
        written: list[list[int]],
        sources: list[str],
        first: list[int],
        remaining: list[int],
    ) -> Rollout:
        whole = [p + c for p, c in zip(prompts, written, strict=True)]
        tokens, mask = pad(whole, self.pad_token_id)
        lengths = torch.tensor([len(p) for p in prompts])
        ends = torch.tensor([len(w) for w in whole])
        if not self.learn_past_error:
            ends = torch.minimum(ends, lengths + torch.tensor(remaining) + 1)
        return Rollout(tokens, mask, lengths, sources, torch.tensor(first), ends)


def pad(sequences: Sequence[Ids], pad_token_id: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """tokens int64 [B, L] and mask bool [B, L] of ragged sequences, padded on the right or on the left."""
    longest = max(map(len, sequences))
    tokens = torch.full((len(sequences), longest), pad_token_id, dtype=torch.int64)
    mask = torch.zeros((len(sequences), longest), dtype=torch.bool)
    for row, ids in enumerate(sequences):
        at = slice(longest - len(ids), longest) if left else slice(0, len(ids))
        tokens[row, at], mask[row, at] = torch.tensor(list(ids), dtype=torch.int64), True
    return tokens, mask


def _seed(seed: int, name: str) -> int:
    """63 bits from a seed and what they are for."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
