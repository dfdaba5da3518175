"""Losses on the shapes of real models and by number of threads; the ceilings of the machine."""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import Any

import torch

from potstill.bench import losses
from potstill.bench.cases import Shape
from potstill.bench.measure import in_turns

Row = dict[str, Any]
MODELS = {  # student and teacher: hidden sizes and vocabulary of their published configurations
    "SmolLM2 135M of 1.7B": Shape("dense", 128, 576, 2048, 49_152),
    "Llama 3.2 1B of 3.1 8B": Shape("dense", 128, 2048, 4096, 128_256),
    "Qwen3 0.6B of 8B": Shape("dense", 128, 1024, 4096, 151_936),
    "Gemma 3 1B of 4B": Shape("dense", 128, 1152, 2560, 262_144),
}


def models(*, smoke: bool, repeats: int, limit: float, note: losses.Note) -> list[Row]:
    """One row a model and variant; 128 rows, so one chunk: time by shape, not memory."""
    found = []
    for name, shape in MODELS.items():
        if smoke:
            shape = replace(shape, rows=8, hidden=16, teacher_hidden=24, vocab=shape.vocab // 64)
        note(f"models: {name}")
        made = losses.rows(shape, repeats=repeats, compiled=False, limit=limit, peaks=False, note=note)
        found += [
            {**row, "case": f"{name}, V={shape.vocab:,}, {shape.rows} rows", "model": name, "x": "vocab"}
            for row in made
        ]
    return found


def threads(*, smoke: bool, repeats: int, limit: float, note: losses.Note) -> list[Row]:
    """The loss over a top-64 cache of SmolLM2's shape on 1, 2, 4, ... threads, up to those in use now."""
    most, found = torch.get_num_threads(), []
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n < most] + [most]
    shape = Shape("sparse", 16, 16, 0, 700) if smoke else Shape("sparse", 512, 576, 0, 49_152)
    for count in counts:
        note(f"threads: {count}")
        torch.set_num_threads(count)
        made = losses.rows(shape, repeats=repeats, compiled=False, limit=limit, peaks=False, note=note)
        in_use = f"{count} threads" if count > 1 else "one thread"
        found += [{**row, "case": f"{row['case']}, {in_use}", "x": "threads"} for row in made]
    torch.set_num_threads(most)
    return found


def ceilings(*, smoke: bool, repeats: int) -> list[Row]:
    """What the threads in use reach: fp32 matrix products in flop/s, a copy in bytes (read and written) a second."""
    n, size = (128, 1 << 18) if smoke else (2048, 1 << 26)
    a, b, x, y = torch.randn(n, n), torch.randn(n, n), torch.randn(size), torch.empty(size)
    taken = in_turns({"products": lambda: torch.mm(a, b), "copy": lambda: y.copy_(x)}, repeats)
    return [{
        "case": "ceilings", "variant": "machine", "threads": torch.get_num_threads(),
        "flops_per_second": 2 * n**3 / median(taken["products"]), "bytes_per_second": 8 * size / median(taken["copy"]),
    }]  # fmt: skip
