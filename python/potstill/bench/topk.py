"""Top-k with log-sum-exp on CPU, one thread: beside torch.topk + torch.logsumexp and one read of the rows."""

from __future__ import annotations

import torch

from potstill.bench.measure import Variant
from potstill.extraction import topk

CASES = [  # dtype, rows, vocabulary, k, kind
    (torch.float32, 64, 151_936, 64, "gaussian"),
    (torch.bfloat16, 64, 151_936, 64, "gaussian"),
    (torch.float32, 64, 151_936, 512, "gaussian"),
    (torch.float32, 64, 151_936, 64, "ascending"),
]


def rows(kind: str, n: int, vocab: int, dtype: torch.dtype) -> torch.Tensor:
    if kind == "ascending":
        return (torch.arange(vocab) / vocab * 20).expand(n, vocab).to(dtype).contiguous()
    return (torch.randn(n, vocab, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)


def variants(x: torch.Tensor, k: int) -> dict[str, Variant]:
    """name -> call; torch's log-sum-exp gets the fp32 copy of 16-bit logits that it needs to be right."""
    words = x.view(torch.int64)
    return {
        "potstill": lambda: topk(x, k),
        "torch": lambda: (torch.topk(x, k), torch.logsumexp(x.float(), -1)),
        "read": lambda: words.max(),
    }


def check(x: torch.Tensor, k: int) -> None:
    """Values and log-sum-exp agree with torch's before anything is timed."""
    ours = topk(x, k)
    lse = torch.logsumexp(x.double(), -1)
    values = torch.topk(x.double(), k).values - lse[:, None]
    assert (ours.log_probs - values).abs().max() < 1e-5, "top-k differs from torch's"
