"""Which data to train on: mixtures of domains, the best by score, percentiles, quotas. Seeded and resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def ddk_weights(
    student: ArrayLike, teacher: ArrayLike, before: ArrayLike | None = None, *, alpha: float = 0.5
) -> Floats:
    """The share of each of N domains, [N], from both models' perplexities on it.

    student, teacher: [N] perplexities above 0, l_i = student_i / teacher_i.
    before: the shares until now, or None at the beginning:
        r_i = exp(l_i) / sum_j exp(l_j);  later psi_i = r_i exp(l_i), r_i <- alpha psi_i / sum psi + (1 - alpha) / N
    so that no domain falls below (1 - alpha) / N. Any ratio is safe: sums are in log space.
    DDK, arXiv:2407.16154 (read in the paper).
    """
    s, t = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    if s.shape != t.shape or s.ndim != 1 or not len(s):
        raise ValueError(f"perplexities have shapes {s.shape} and {t.shape}; one number a domain, [N], is needed")
    if not (np.isfinite(s).all() and np.isfinite(t).all() and (s > 0).all() and (t > 0).all()):
        raise ValueError(f"perplexities must be positive and finite: student {s.tolist()}, teacher {t.tolist()}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} must lie in [0, 1]")
    score = s / t
    if before is not None:
        r = np.asarray(before, np.float64)
        if r.shape != s.shape or (r < 0).any():
            raise ValueError(f"the shares until now are {r.tolist()}; {len(s)} numbers of at least 0 are needed")
        with np.errstate(divide="ignore"):
            score = score + np.log(r)
    share = np.exp(score - score.max())
    share /= share.sum()
    return share if before is None else alpha * share + (1 - alpha) / len(s)


class DomainMixture:
    """An endless stream of (domain, index): a domain by its share, then the next example of its own shuffled order.

    sizes: examples of each domain.  shares: [N], uniform where None; `update` takes DDK's, `set_shares` any.
    Within a domain every example comes once before any comes twice. `state_dict` resumes the stream exactly; a change
    of shares takes effect with the next draw.
    """

    def __init__(
        self, sizes: Sequence[int], *, shares: ArrayLike | None = None, alpha: float = 0.5, seed: int = 0
    ) -> None:
        self.sizes = [int(n) for n in sizes]
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"sizes={self.sizes}: every domain needs at least one example")
        self.alpha, self.seed = alpha, seed
        self.random = np.random.default_rng(seed)
        self.drawn = [0] * len(self.sizes)
        self.updated = False
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}
        self.set_shares(np.full(len(self.sizes), 1 / len(self.sizes)) if shares is None else shares)

    def set_shares(self, shares: ArrayLike) -> None:
        given = np.asarray(shares, np.float64)
        if given.shape != (len(self.sizes),) or not np.isfinite(given).all() or (given < 0).any() or given.sum() <= 0:
            raise ValueError(f"shares={given.tolist()}: {len(self.sizes)} numbers of at least 0 are needed, not all 0")
        self.shares: Floats = given / given.sum()

    def update(self, student: ArrayLike, teacher: ArrayLike) -> Floats:
        """New shares from the perplexities of now (`ddk_weights`); the first call starts the rule."""
        self.set_shares(ddk_weights(student, teacher, self.shares if self.updated else None, alpha=self.alpha))
        self.updated = True
        return self.shares

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return self

    def __next__(self) -> tuple[int, int]:
        cumulated = np.cumsum(self.shares)
        domain = int(np.searchsorted(cumulated, self.random.random() * cumulated[-1], side="right"))
        epoch, place = divmod(self.drawn[domain], self.sizes[domain])
        self.drawn[domain] += 1
        return domain, int(self._order(domain, epoch)[place])

    def batch(self, n: int) -> list[tuple[int, int]]:
        """The next n of the stream."""
        return [next(self) for _ in range(n)]

    def _order(self, domain: int, epoch: int) -> NDArray[np.int64]:
        held = self._orders.get(domain)
        if held is None or held[0] != epoch:
            order = np.random.default_rng([self.seed, domain, epoch]).permutation(self.sizes[domain])
            held = self._orders[domain] = (epoch, order)
        return held[1]

    def state_dict(self) -> dict[str, Any]:
        return {
            "sizes": self.sizes, "seed": self.seed, "random": self.random.bit_generator.state,
            "drawn": list(self.drawn), "shares": self.shares.tolist(), "updated": self.updated,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["sizes"] != self.sizes or state["seed"] != self.seed:
            raise ValueError(
                f"the state is of domains of {state['sizes']} examples and seed {state['seed']}, this mixture of "
                f"{self.sizes} and {self.seed}"
            )
        self.random.bit_generator.state = state["random"]
        self.drawn, self.updated = list(state["drawn"]), state["updated"]
        self.shares = np.asarray(state["shares"], np.float64)


def _ordered(scores: Floats) -> NDArray[np.uint64]:
    """Scores as integers of the same order, larger first at 0: NaN is refused, -0.0 is 0.0."""
    if np.isnan(scores).any():
        raise ValueError(f"score {int(np.isnan(scores).argmax())} of a block is NaN; leave such examples out first")
    bits = (scores + 0.0).view(np.uint64)
    rising = np.where(bits >> np.uint64(63), ~bits, bits | np.uint64(1 << 63))
    return ~rising


@dataclass(frozen=True)
class Best:
    """What `top_ratio` found: the examples above `threshold`, and the first `ties` of those equal to it, are kept."""

    threshold: float
    ties: int
    kept: int
    total: int
    largest: bool

    def masks(self, blocks: Iterable[ArrayLike]) -> Iterator[NDArray[np.bool_]]:
        """For each block of scores, in the order that `top_ratio` saw, which examples are kept."""
        left = self.ties
        sign = 1.0 if self.largest else -1.0
        for block in blocks:
            scores = sign * np.asarray(block, np.float64)
            above, equal = scores > sign * self.threshold, scores == sign * self.threshold
            first = equal & (np.cumsum(equal) <= left)
            left -= int(first.sum())
            yield above | first


def top_ratio(blocks: Callable[[], Iterable[ArrayLike]], ratio: float, *, largest: bool = True) -> Best:
    """The best `ratio` of all scores, as a stable global sort would keep them, in memory of one block.

    blocks: gives the scores anew, block by block (shard by shard) in the same order; it is called five times.
    ratio: in (0, 1]; ceil(ratio * total) are kept, at least one. Equal scores: the earlier one first.
    A radix select on the bits of the fp64 scores, sixteen at a time: the memory is 65,536 counts and one block.
    MiniPLM keeps the best half by log p_teacher - log p_reference (arXiv:2410.17215, read in the authors' code).
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio={ratio} must lie in (0, 1]")
    sign = 1.0 if largest else -1.0

    def keys() -> Iterator[NDArray[np.uint64]]:
        for block in blocks():
            yield _ordered(sign * np.asarray(block, np.float64).reshape(-1))

    total = sum(len(block) for block in keys())
    if not total:
        raise ValueError("no score was given; blocks() must give the same non-empty blocks each time")
    kept = max(1, int(np.ceil(round(ratio * total, 9))))
    prefix, left = 0, kept  # the leading bits of the last kept score; how many of those that share them are kept
    for shift in (48, 32, 16, 0):
        counts = np.zeros(1 << 16, np.int64)
        for block in keys():
            if shift < 48:
                block = block[block >> np.uint64(shift + 16) == np.uint64(prefix)]
            digits = (block >> np.uint64(shift)) & np.uint64(0xFFFF)
            counts += np.bincount(digits.astype(np.int64), minlength=1 << 16)
        cumulated = np.cumsum(counts)
        digit = int(np.searchsorted(cumulated, left))
        left -= int(cumulated[digit] - counts[digit])
        prefix = prefix << 16 | digit
    return Best(sign * _score(prefix), left, kept, total, largest)


def _score(key: int) -> float:
    """The score that `_ordered` turned into key."""
    rising = ~np.uint64(key)
    bits = rising ^ np.uint64(1 << 63) if rising >> np.uint64(63) else ~rising
    return float(np.array([bits], np.uint64).view(np.float64)[0])


def percentile_keep(*scores: ArrayLike, upper: float = 90.0, lower: float = 0.0) -> NDArray[np.bool_]:
    """bool [n]: the examples between two percentiles of the first score, of these those between the same of the next,
    ...

    scores: [n] each. A value equal to a bound is kept. LLMLingua-2 (arXiv:2403.12968, read in the authors' code) drops
    what lies above the 90th percentile of the variation rate, then above that of the alignment gap.
    """
    if not scores or not 0 <= lower < upper <= 100:
        raise ValueError(
            f"{len(scores)} scores, lower={lower}, upper={upper}: a score, and bounds in order, are needed"
        )
    keep = np.ones(len(np.asarray(scores[0])), np.bool_)
    for number, score in enumerate(scores):
        values = np.asarray(score, np.float64)
        if values.shape != keep.shape or np.isnan(values).any():
            raise ValueError(f"score {number} has shape {values.shape} or a NaN; {keep.shape} numbers are needed")
        if keep.any():
            low, high = np.percentile(values[keep], [lower, upper])
            keep &= (values >= low) & (values <= high)
    return keep


def quotas(shares: ArrayLike, n: int) -> NDArray[np.int64]:
    """Whole numbers that sum to n in the proportion of shares [N]; what is left goes to the largest remainders."""
    given = np.asarray(shares, np.float64)
    if given.ndim != 1 or not len(given) or (given < 0).any() or not given.sum() > 0 or n < 0:
        raise ValueError(f"shares={given.tolist()}, n={n}: numbers of at least 0, not all 0, are needed")
    exact = given / given.sum() * n
    counts = np.floor(exact + 1e-9).astype(np.int64)
    order = np.argsort(counts - exact, kind="stable")
    counts[order[: n - int(counts.sum())]] += 1
    return counts


def quota_sample(
    groups: ArrayLike, shares: dict[Any, float], n: int, *, weights: ArrayLike | None = None, seed: int = 0
) -> NDArray[np.int64]:
    """n indices of examples, in random order, with each group's quota met exactly.

    groups: [m], the group (task, domain, ...) of each example.  shares: group -> share of the n.
    weights: [m] of at least 0, the chance of an example within its group (its difficulty, say); None: all alike.
    A group is drawn without repetition; one smaller than its quota is taken whole as often as it fits, then drawn.
    Task-balanced resampling by difficulty, as TAPIR (arXiv:2405.13448; from memory, the release is data and weights).
    """
    names = np.asarray(groups)
    chance = np.ones(len(names)) if weights is None else np.asarray(weights, np.float64)
    if chance.shape != names.shape or (chance < 0).any() or not np.isfinite(chance).all():
        raise ValueError(f"weights have shape {chance.shape} or a negative value; {names.shape} numbers of at least 0")
    random = np.random.default_rng(seed)
    chosen: list[NDArray[np.int64]] = []
    for name, count in zip(shares, quotas(list(shares.values()), n), strict=True):
        members = np.flatnonzero((names == name) & (chance > 0))
        if count and not len(members):
            raise ValueError(f"group {name!r} has a quota of {count} and no example with a weight above 0")
        if not count:
            continue
        whole, rest = divmod(int(count), len(members))
        p = chance[members] / chance[members].sum()
        drawn = random.choice(members, rest, replace=False, p=p) if rest else members[:0]
        chosen += [members] * whole + [drawn]
    found = np.concatenate(chosen) if chosen else np.zeros(0, np.int64)
    return random.permutation(found)
