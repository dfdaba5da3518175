"""The demo across tokenizers: SmolLM2 -> a cache of its tokens' log-probabilities -> a small model of bytes."""

from __future__ import annotations

import json
import math
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from potstill import __version__
from potstill import cache as ps_cache
from potstill.capture.builder import XTOK, BuildReport, build
from potstill.capture.hidden import teacher_hidden
from potstill.capture.models import load_model
from potstill.capture.text import Document
from potstill.demo.corpus import standard_library
from potstill.demo.run import PACKAGE, stage
from potstill.teachers import Head
from potstill.xtok import VocabBytes, linear_alm_loss, next_token_log_probs
from potstill.xtok.cached import ChunkBatch, ChunkCollator

END = 256  # the id behind the 256 bytes: begins and ends a text


@dataclass(frozen=True)
class Settings:
    """Sizes of a run; `length` in the teacher's tokens."""

    tokens: int = 16_384
    length: int = 128
    batch: int = 4
    epochs: int = 4
    learning_rate: float = 3e-3
    tau: float = 100.0
    hidden: int = 192
    layers: int = 4
    held_out_documents: int = 16
    seed: int = 0


FAST = Settings(tokens=4_096, epochs=2, held_out_documents=8)


def run(out: Path, settings: Settings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs every stage, writes `report.json` and `report.png` into `out` and returns the report.

    The cache lies in `out/cache` and is built anew. Raises FileNotFoundError without the teacher's package.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(settings.seed)
    out.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    with stage("load", seconds, say, f"loading the teacher from the Python package {PACKAGE}"):
        loaded = load_model(f"package:{PACKAGE}", dtype="float32", device="cpu")
    training, others = standard_library()
    texts = [document.text for document in others[: settings.held_out_documents]]
    with stage("cache", seconds, say, f"caching the log-probabilities of {settings.tokens:,} teacher tokens"):
        built = build_cache(out / "cache", loaded, training, settings)
        cache = ps_cache.open(out / "cache")
        if not cache.verify().ok:
            raise RuntimeError("the cache just written does not verify")
    say(f"  {built.tokens:,} tokens, {built.bytes_per_token:.1f} bytes a token")
    with stage("teacher", seconds, say, "the teacher's bits a byte on held-out text"):
        teacher_bits = token_bits(loaded.model, loaded.tokenizer, texts)
    say(f"  {teacher_bits:.3f} bits a byte")

    collator = ChunkCollator(
        cache, loaded.tokenizer, byte_vocabulary(), encode=lambda text: list(text.encode()), bos_id=END
    )
    student = byte_student(settings)
    held = byte_rows(texts)
    with stage("train", seconds, say, f"training a model of bytes from the cache, passes: {settings.epochs}"):
        losses, bits = train(student, collator, settings, held, say)
    report = {
        "teacher": cache.spec.teacher,
        "teacher_bits_per_byte": teacher_bits,
        "student_parameters": sum(p.numel() for p in student.parameters()),
        "student_vocabulary": END + 1,
        "teacher_vocabulary": cache.spec.vocab_size,
        "teacher_tokens": cache.num_tokens,
        "cache_bytes_per_token": cache.num_bytes / cache.num_tokens,
        "held_out_bytes": sum(len(text.encode()) for text in texts),
        "bits_per_byte_before": bits[0]["bits_per_byte"],
        "bits_per_byte_after": bits[-1]["bits_per_byte"],
        "loss_curve": losses,
        "bits_curve": bits,
        "stage_seconds": {name: round(value, 2) for name, value in seconds.items()},
        "total_seconds": round(sum(seconds.values()), 2),
        "settings": asdict(settings),
        "versions": {"potstill": __version__, "torch": torch.__version__, "python": platform.python_version(),
                     "threads": torch.get_num_threads()},
    }  # fmt: skip
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    from potstill.demo.xtok_plot import draw

    draw(report, out / "report.png")
    return report


def build_cache(out: Path, loaded: Any, documents: Sequence[Document], settings: Settings) -> BuildReport:
    """What `potstill build --xtok --split` writes."""
    shutil.rmtree(out, ignore_errors=True)
    built = build(
        loaded.model, loaded.tokenizer, documents, out, **XTOK, length=settings.length, pack=False, batch_size=8,
        max_tokens=settings.tokens, teacher=loaded.name, teacher_revision=loaded.revision,
        progress=sys.stderr.isatty(),
    )  # fmt: skip
    if not built.finished:
        raise KeyboardInterrupt
    return built


def byte_vocabulary() -> VocabBytes:
    """256 bytes, and END."""
    vocab = VocabBytes.from_callback(END + 1, lambda n: bytes([n]) if n < END else b"<end>", specials=[END])
    return vocab.with_roles(eos=END)


def byte_student(settings: Settings) -> Any:
    """A small Llama over bytes with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=END + 1, hidden_size=settings.hidden, intermediate_size=8 * settings.hidden // 3,
        num_hidden_layers=settings.layers, num_attention_heads=max(1, settings.hidden // 48),
        max_position_embeddings=4096, bos_token_id=END, eos_token_id=END, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def chunk_loss(student: Any, batch: ChunkBatch, word_starts: Tensor, tau: float) -> Tensor:
    """ALM of a batch, the chunks' ends debiased on both sides."""
    hidden = student.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    return linear_alm_loss(
        hidden[batch.mask], Head(student.lm_head.weight), batch.input_ids[batch.mask], batch.teacher_log_probs,
        batch.alignment, tau=tau, word_starts=word_starts, teacher_boundary=batch.teacher_boundary,
    )  # fmt: skip


def train(
    student: Any, collator: ChunkCollator, settings: Settings, held: list[Tensor], say: Callable[[str], None]
) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Trains in place; [{"step", "loss"}] of each step, [{"step", "bits_per_byte"}] of held-out text beside it."""
    generator = torch.Generator().manual_seed(settings.seed)
    keys = collator.cache.keys()
    total = settings.epochs * -(-len(keys) // settings.batch)
    word_starts = torch.from_numpy(collator.aligner.student.word_starts())
    optimiser = torch.optim.AdamW(student.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95))
    warm = max(1, total // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda n: min((n + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * n / total))
    )
    losses: list[dict[str, float]] = []
    bits = [{"step": 0, "bits_per_byte": bits_per_byte(student, held)}]
    say(f"  step   0 of {total}   {bits[0]['bits_per_byte']:.3f} bits a byte")
    for _ in range(settings.epochs):
        order = torch.randperm(len(keys), generator=generator).tolist()
        for start in range(0, len(order), settings.batch):
            batch = collator([keys[n] for n in order[start : start + settings.batch]])
            loss = chunk_loss(student, batch, word_starts, settings.tau)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            losses.append({"step": len(losses) + 1, "loss": float(loss.detach())})
        bits.append({"step": len(losses), "bits_per_byte": bits_per_byte(student, held)})
        say(f"  step {len(losses):3d} of {total}   {bits[-1]['bits_per_byte']:.3f} bits a byte")
    return losses, bits


def byte_rows(texts: Sequence[str]) -> list[Tensor]:
    """END and the bytes of each text, int64 [1, L]."""
    return [torch.tensor([[END, *text.encode()]]) for text in texts]


@torch.no_grad()
def bits_per_byte(student: Any, rows: Sequence[Tensor]) -> float:
    """Mean bits that the student needs for a byte of the texts."""
    total, count = 0.0, 0
    for ids in rows:
        hidden = student.model(input_ids=ids).last_hidden_state
        found = next_token_log_probs(hidden, Head(student.lm_head.weight), ids)
        assert isinstance(found, Tensor)
        total -= float(found.sum()) / math.log(2)
        count += ids.shape[1] - 1
    return total / max(1, count)


@torch.no_grad()
def token_bits(teacher: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """Mean bits that the teacher needs for a byte of the texts, each behind an end of text."""
    head, total, count = Head.from_model(teacher, hidden="head_input"), 0.0, 0
    for text in texts:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(text, add_special_tokens=False)]])
        found = next_token_log_probs(teacher_hidden(teacher, ids), head, ids)
        assert isinstance(found, Tensor)
        total -= float(found.sum()) / math.log(2)
        count += len(text.encode())
    return total / max(1, count)


def summary(report: dict[str, Any], out: Path) -> str:
    """The report in a few lines."""
    r = report
    rows = [
        ("teacher", f"{r['teacher']}, vocabulary {r['teacher_vocabulary']:,}, "
                    f"{r['teacher_bits_per_byte']:.3f} bits a byte on held-out text"),
        ("student", f"{r['student_parameters'] / 1e6:.1f} M parameters over {r['student_vocabulary']} ids: bytes"),
        ("cache", f"{r['teacher_tokens']:,} tokens, {r['cache_bytes_per_token']:.1f} bytes each"),
        ("held-out", f"{r['bits_per_byte_before']:.3f} -> {r['bits_per_byte_after']:.3f} bits a byte "
                     f"({r['held_out_bytes']:,} bytes)"),
        ("time", f"{r['total_seconds']:.0f} s"),
        ("written", f"{out / 'report.json'}, {out / 'report.png'}"),
    ]  # fmt: skip
    return "\n".join(f"{name:9s}{text}" for name, text in rows)
