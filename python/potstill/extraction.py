"""Top-k extraction with the log-sum-exp, and random sampling: logits, or hidden states through a head, to TopK."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from potstill import ops  # noqa: F401  registers torch.ops.potstill
from potstill.arguments import check_ids, check_temperature, promote, rows_or_budget
from potstill.rows import Side
from potstill.teachers import Head, TopK, describe

MAX_K = 1024
MAX_DRAWS = 1 << 16
NO_TOKEN = -100


def topk(
    logits: Tensor, k: int, *, vocab_size: int | None = None, ids: Tensor | None = None,
    temperatures: Sequence[float] = (), out: TopK | None = None, backend: str = "auto",
) -> TopK:  # fmt: skip
    """The k most probable entries of each row, with the truth about the rest, in one read of the logits.

    logits: [..., V] fp64, fp32, bf16 or fp16; columns from `vocab_size` on are padding.  k: 1..min(V, 1024).
    ids: [...] integers, the realised token of each row, or -100 for none: also return its log-probability and its rank,
        the number of entries above it, as `token_log_probs` and int32 `token_ranks` (-inf and -1 where there is none).
    temperatures: for each T also return the log of the mass outside the k under softmax(logits / T), `log_rest_at[T]`.
    out: a TopK whose tensors the results are written to, and which is returned; refused, before anything is written,
        unless each has the shape, dtype and device of the result.

    Returns TopK(ids int32 [..., k], log_probs [..., k], log_rest [...], lse [...]), fp32 (fp64 for fp64 logits):
    `ids` as `torch.sort(logits.float(), stable=True, descending=True)` gives them (ties to the lowest id; NaN sorts
    first and makes its row's log_probs, log_rest and lse NaN; -inf last), `log_probs = logits[ids] - lse`,
    `lse = logits.float().logsumexp(-1)` and log_rest = log-sum-exp of the other entries - lse, summed directly.
    No gradient. Raises TypeError or ValueError naming the argument and what is accepted.
    """
    x, side = _flat_logits(logits, vocab_size)
    wanted = _Wanted(logits.shape[:-1], k, side, x, ids, temperatures, out)
    found = torch.ops.potstill.topk(x, k, _numbers(side), wanted.tokens, wanted.temperatures, backend)
    return wanted.shaped(found)


def linear_topk(
    hidden: Tensor, head: Head | Tensor, k: int, *, ids: Tensor | None = None, temperatures: Sequence[float] = (),
    out: TopK | None = None, chunk_rows: int | None = None, precise: bool = False, backend: str = "auto",
) -> TopK:  # fmt: skip
    """topk(hidden @ weight.T, k) through a Head, holding at most `chunk_rows` rows of logits.

    hidden: [..., D].  head: Head (bias, scale, softcap and padding apply), or its weight [V, D].  Other arguments and
    the result as in `topk` and `linear_distill_loss`.
    """
    side, operands = _linear(hidden, head)
    wanted = _Wanted(hidden.shape[:-1], k, side, operands[0], ids, temperatures, out)
    found = torch.ops.potstill.linear_topk(
        *operands, k, _numbers(side), wanted.tokens, wanted.temperatures, rows_or_budget(chunk_rows), precise, backend
    )
    return wanted.shaped(found)


def sample(
    logits: Tensor, n: int, *, seed: int, temperature: float = 1.0, vocab_size: int | None = None, row_offset: int = 0,
    backend: str = "auto",
) -> TopK:  # fmt: skip
    """n draws a row with replacement from softmax(logits / temperature), as unique ids with counts.

    logits: [..., V] fp64, fp32, bf16 or fp16; columns from `vocab_size` on are padding.  n: 1..65,536.
    seed: 0..2^63-1. Draw i of row r is a function of (seed, row_offset + r, i) and the row alone, so that threads,
        chunks and shards agree; rows are numbered in order of the flattened leading dimensions.

    Returns TopK(ids int32 [..., n] in descending count, then ascending id, log_probs [..., n] at T = 1 over the full
    vocabulary, lse [...], counts int32 [..., n], sample_temperature=temperature), padded with -1, -inf and 0; log_rest
    is None. A row whose log-sum-exp is not finite has nothing to draw from and is padding only. With
    `w = counts / n`, `sum(w * f(ids))` is an unbiased estimate of the mean of f under the proposal; divided by
    softmax(logits / temperature) and multiplied by exp(log_probs) it is one under the model (random sampling knowledge
    distillation, Anshumann et al. 2025). In law as `torch.multinomial(softmax(logits / temperature), n, True)`.
    No gradient. Raises TypeError or ValueError naming the argument and what is accepted.
    """
    x, side = _flat_logits(logits, vocab_size)
    settings = _draws(n, side, temperature, seed, row_offset)
    return _drawn(torch.ops.potstill.sample(x, *settings, backend), logits.shape[:-1], temperature)


def linear_sample(
    hidden: Tensor, head: Head | Tensor, n: int, *, seed: int, temperature: float = 1.0, row_offset: int = 0,
    chunk_rows: int | None = None, precise: bool = False, backend: str = "auto",
) -> TopK:  # fmt: skip
    """sample(hidden @ weight.T, n) through a Head, holding at most `chunk_rows` rows of logits.

    hidden: [..., D].  head: Head, or its weight [V, D].  Other arguments and the result as in `sample`.
    """
    side, operands = _linear(hidden, head)
    settings = _draws(n, side, temperature, seed, row_offset)
    found = torch.ops.potstill.linear_sample(*operands, *settings, rows_or_budget(chunk_rows), precise, backend)
    return _drawn(found, hidden.shape[:-1], temperature)


class _Wanted:
    """What one call of top-k is asked for, checked; and its results as a TopK."""

    def __init__(self, lead: torch.Size, k: int, side: Side, x: Tensor, ids: Tensor | None,
                 temperatures: Sequence[float], out: TopK | None):  # fmt: skip
        most = min(MAX_K, side.vocab_size)
        if not isinstance(k, int) or not 1 <= k <= most:
            raise ValueError(f"k={k!r} is not a whole number in 1..{most} (the vocabulary has {side.vocab_size})")
        self.lead, self.k, self.out = lead, k, out
        self.asked = list(dict.fromkeys(check_temperature(t) for t in temperatures))
        self.temperatures = [t for t in self.asked if t != 1]
        self.tokens = None if ids is None else flat_tokens("ids", ids, lead, x.device, side.vocab_size)
        if out is not None:
            self._check_out(out, x)

    def _check_out(self, out: TopK, x: Tensor) -> None:
        if not isinstance(out, TopK):
            raise TypeError(f"out must be a TopK of tensors to write to, not {describe(out)}")
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        rows, entries = self.lead, (*self.lead, self.k)
        expected = [
            ("ids", entries, torch.int32),
            ("log_probs", entries, dtype),
            ("log_rest", rows, dtype),
            ("lse", rows, dtype),
        ]
        if self.tokens is not None:
            expected += [("token_log_probs", rows, dtype), ("token_ranks", rows, torch.int32)]
        buffers = {name: getattr(out, name) for name, *_ in expected}
        for t in self.asked:
            expected.append((f"log_rest_at[{t}]", rows, dtype))
            buffers[f"log_rest_at[{t}]"] = out.log_rest_at.get(t)
        for name, shape, kind in expected:
            b = buffers[name]
            if b is None or tuple(b.shape) != tuple(shape) or b.dtype != kind or b.device != x.device:
                raise ValueError(
                    f"out.{name} is {'missing' if b is None else f'{describe(b)} on {b.device}'}; it must be a {kind} "
                    f"tensor of shape {list(shape)} on {x.device}. Nothing was written"
                )

    def shaped(self, found: tuple[Tensor, ...]) -> TopK:
        ids, log_probs, log_rest, lse, token_log_probs, ranks, at = found
        given = self.tokens is not None
        rows = {t: at[:, i].reshape(self.lead) for i, t in enumerate(self.temperatures)}
        log_rest = log_rest.reshape(self.lead)
        made = TopK(
            ids.reshape(*self.lead, self.k), log_probs.reshape(*self.lead, self.k), log_rest, lse.reshape(self.lead),
            token_log_probs=token_log_probs.reshape(self.lead) if given else None,
            token_ranks=ranks.reshape(self.lead) if given else None,
            log_rest_at={t: rows[t] if t in rows else log_rest.clone() for t in self.asked},
        )  # fmt: skip
        if self.out is None:
            return made
        for name in ("ids", "log_probs", "log_rest", "lse", "token_log_probs", "token_ranks"):
            if (value := getattr(made, name)) is not None:
                getattr(self.out, name).copy_(value)
        for t, value in made.log_rest_at.items():
            self.out.log_rest_at[t].copy_(value)
        return self.out


def flat_tokens(name: str, tokens: Tensor, lead: torch.Size, device: torch.device, vocab_size: int) -> Tensor:
    """tokens [...] as int64 [N]: 0..vocab_size-1, or -100 for none."""
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be an int64 or int32 tensor, not {describe(tokens)}")
    if tokens.shape != lead:
        raise ValueError(f"{name} has shape {list(tokens.shape)}; the rows have {list(lead)}")
    if tokens.device != device:
        raise ValueError(f"{name} is on {tokens.device}; the rows are on {device}: move it with .to()")
    flat = tokens.reshape(-1).long()
    check_ids(name, flat, vocab_size, NO_TOKEN)
    return flat


def _flat_logits(logits: Tensor, vocab_size: int | None) -> tuple[Tensor, Side]:
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() < 1:
        raise TypeError(f"logits must be a floating-point tensor [..., V], not {describe(logits)}")
    columns = logits.shape[-1]
    if columns == 0:
        raise ValueError(f"logits has shape {list(logits.shape)}: a row needs at least one entry")
    if vocab_size is not None and not 1 <= vocab_size <= columns:
        raise ValueError(f"vocab_size={vocab_size} is outside 1..{columns}, the columns of logits")
    return logits.detach().reshape(-1, columns), Side(columns if vocab_size is None else vocab_size)


def _linear(hidden: Tensor, head: Head | Tensor) -> tuple[Side, tuple[Tensor, Tensor, Tensor | None]]:
    """The head's side, and hidden [N, D], weight and bias without gradients."""
    head = head if isinstance(head, Head) else Head(head)
    x, weight, bias = promote(hidden, head)
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden has shape {list(x.shape)}; its last size must be the head's D = {weight.shape[1]}")
    return head.side, (
        x.detach().reshape(-1, x.shape[-1]), weight.detach(), None if bias is None else bias.detach(),
    )  # fmt: skip


def _numbers(side: Side) -> list[float]:
    return [float(side.vocab_size), side.scale, side.softcap]


def _draws(
    n: int, side: Side, temperature: float, seed: int, row_offset: int
) -> tuple[int, list[float], float, int, int]:
    for name, value, low, high in (
        ("n", n, 1, MAX_DRAWS), ("seed", seed, 0, (1 << 63) - 1), ("row_offset", row_offset, 0, (1 << 62) - 1),
    ):  # fmt: skip
        if not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"{name}={value!r} is outside {low}..{high}")
    return n, _numbers(side), check_temperature(temperature), seed, row_offset


def _drawn(found: tuple[Tensor, ...], lead: torch.Size, temperature: float) -> TopK:
    ids, counts, log_probs = (x.reshape(*lead, x.shape[-1]) for x in found[:3])
    return TopK(ids, log_probs, lse=found[3].reshape(lead), counts=counts, sample_temperature=float(temperature))
