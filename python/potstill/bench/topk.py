"""Top-k with log-sum-exp on CPU, one thread: beside torch, numpy and one read of the rows, on kind and hostile rows."""

from __future__ import annotations

import math
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch

from potstill.bench.measure import Variant, in_turns, timing
from potstill.extraction import linear_topk, topk
from potstill.extraction_chunks import linear_chunks
from potstill.kernels.cpp_topk import log_sum_exp
from potstill.rows import Side

VOCAB = 151_936
CASES = [  # dtype, k, kind
    (torch.float32, 64, "gaussian"),
    (torch.bfloat16, 64, "gaussian"),
    (torch.float32, 512, "gaussian"),
    (torch.bfloat16, 512, "gaussian"),
    (torch.float32, 64, "ascending"),
    (torch.float32, 64, "all equal"),
    (torch.float32, 64, "one third -inf"),
    (torch.bfloat16, 64, "ascending"),
    (torch.bfloat16, 64, "all equal"),
    (torch.bfloat16, 64, "one third -inf"),
]


def rows(kind: str, n: int, vocab: int, dtype: torch.dtype) -> torch.Tensor:
    """Logits [n, vocab]."""
    if kind == "ascending":
        return (torch.arange(vocab) / vocab * 20).expand(n, vocab).to(dtype).contiguous()
    if kind == "all equal":
        return torch.ones(n, vocab, dtype=dtype)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, vocab, generator=g) * 3
    if kind == "one third -inf":
        x.masked_fill_(torch.rand(n, vocab, generator=g) < 1 / 3, -math.inf)
    return x.to(dtype)


def read(x: torch.Tensor) -> Variant:
    """One read of the rows."""
    words = x.view(torch.int64)
    return lambda: words.sum()


def from_memory(calls: dict[str, Variant], repeats: int) -> dict[str, list[float]]:
    """A turn is one call, on rows that no cache holds: a read that repeats finds them there and is no floor."""
    other = torch.zeros(1 << 23, dtype=torch.int64)  # 64 MiB
    return in_turns(calls, repeats, least=0.0, before=other.sum)


def _torch_lse(x: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(x.float(), -1)


def variants(x: torch.Tensor, k: int, every: bool) -> dict[str, Variant]:
    """name -> call; torch's log-sum-exp gets the fp32 copy of 16-bit logits that it needs to be right."""
    lse = partial(_torch_lse, x)
    calls: dict[str, Variant] = {
        "potstill": lambda: topk(x, k),
        "torch": lambda: (torch.topk(x, k), lse()),
        "read": read(x),
    }
    if every and x.dtype == torch.float32:  # numpy has no bf16
        calls["torch, unsorted"] = lambda: (torch.topk(x, k, sorted=False), lse())
        calls["numpy argpartition"] = lambda: (np.argpartition(x.numpy(), -k, axis=-1)[:, -k:], lse())
    return calls


def figures(*, smoke: bool, repeats: int) -> list[dict[str, Any]]:
    """One row a case and variant: seconds, spread, ratios to a read, to torch and to the Gaussian rows."""
    n = 4 if smoke else 64
    found = []
    for dtype, k, kind in CASES:
        x, plain = rows(kind, n, VOCAB, dtype), rows("gaussian", n, VOCAB, dtype)
        check(x[:4], k)
        calls = variants(x, k, (dtype, k, kind) == CASES[0])
        if kind != "gaussian":
            calls["gaussian"] = partial(topk, plain, k)
        about = dict(kernel="topk", rows=n, vocab=VOCAB, k=k, dtype=str(dtype)[6:], kind=kind)
        found += _figures(f"{str(dtype)[6:]}, k={k}, V={VOCAB:,}, {kind}", from_memory(calls, repeats), about)
    for dtype in (torch.float32, torch.bfloat16):
        x = rows("gaussian", n, VOCAB, dtype)
        calls = {
            "potstill": partial(log_sum_exp, x, Side(VOCAB)),
            "torch": partial(_torch_lse, x),
            "read": read(x),
        }
        about = dict(kernel="log_sum_exp", rows=n, vocab=VOCAB, dtype=str(dtype)[6:], kind="gaussian")
        found += _figures(f"{str(dtype)[6:]}, V={VOCAB:,}, log-sum-exp alone", from_memory(calls, repeats), about)
    return found + linear_figures(8 if smoke else 128, repeats)


def cost(*, smoke: bool, repeats: int) -> list[dict[str, Any]]:
    """Time against the vocabulary (k = 64) and against k (V = 151,936); Gaussian fp32 rows, 4 M entries a call."""
    found = []
    shapes = [("vocab", v, 64) for v in (4_096, 16_384, 49_152, 128_256, VOCAB, 262_144)]
    shapes += [("k", VOCAB, k) for k in (1, 8, 64, 256, 512, 1024)]
    for x_axis, vocab, k in shapes[:: 5 if smoke else 1]:
        n = max(1, (40_000 if smoke else 4_000_000) // vocab)
        x = rows("gaussian", n, vocab, torch.float32)
        check(x[:4], k)
        about = dict(kernel="topk", x=x_axis, rows=n, vocab=vocab, k=k, dtype="float32", kind="gaussian")
        found += _figures(f"float32, k={k}, V={vocab:,}", from_memory(variants(x, k, False), repeats), about)
    return found


def linear_figures(n: int, repeats: int) -> list[dict[str, Any]]:
    """linear_topk over the same chunks' matrix products alone ("read" is these, in its rows)."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, 1024, generator=g), torch.randn(VOCAB, 1024, generator=g) / 10
    chunk = max(1, n // 2)

    def each(work: Any) -> None:
        for _, logits in linear_chunks(hidden, weight, None, chunk, False):
            work(logits)

    calls: dict[str, Variant] = {
        "potstill": lambda: linear_topk(hidden, weight, 64, chunk_rows=chunk),
        "torch": lambda: each(lambda logits: (torch.topk(logits, 64), torch.logsumexp(logits, -1))),
        "read": lambda: each(lambda logits: None),
    }
    about = dict(kernel="linear_topk", rows=n, vocab=VOCAB, k=64, dtype="float32", kind="gaussian")
    rows = _figures(f"float32, k=64, linear_topk of {n} rows, D=1024", in_turns(calls, repeats), about)
    return [{**row, "over_gemm": row.pop("over_read"), "over_read": None} for row in rows]


def _figures(case: str, seconds: dict[str, list[float]], about: dict[str, Any]) -> list[dict[str, Any]]:
    taken = {name: median(x) for name, x in seconds.items()}
    return [
        {
            "case": case, "variant": name, **timing(seconds[name]),
            "over_read": taken[name] / taken["read"], "speed_up": taken["torch"] / taken[name],
            "over_gaussian": taken[name] / taken["gaussian"] if "gaussian" in taken and name == "potstill" else None,
            "over_gemm": None, **about,
        }
        for name in taken
        if name != "gaussian"
    ]  # fmt: skip


def check(x: torch.Tensor, k: int) -> None:
    """Values and log-sum-exps agree with torch's before anything is timed."""
    ours = topk(x, k)
    lse = torch.logsumexp(x.double(), -1)
    values = torch.topk(x.double(), k).values - lse[:, None]
    alone = log_sum_exp(x, Side(x.shape[1]))
    if (ours.log_probs - values).abs().max() >= 1e-5 or (alone - lse).abs().max() >= 1e-5:
        raise AssertionError("top-k or the log-sum-exp differs from torch's; nothing was timed")
