"""A cache of token log-probabilities for a student of another tokenizer: the command, the collator, training."""

import math

import potstill as ps
import pytest
import torch
from click.testing import CliRunner
from potstill.cli import main
from potstill.demo import xtok as demo
from potstill.xtok import ChunkCollator, VocabBytes, linear_alm_loss

from ..capture.conftest import byte_tokenizer
from ..tiny_model import tiny_llama

TEXTS = [f"text {n} été, the {n}th of them. " * 3 for n in range(6)] + ["the end " * 20]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """(cache that the command wrote, tokenizer, model)"""
    root = tmp_path_factory.mktemp("xtok")
    model, tokenizer = tiny_llama(initializer_range=0.4), byte_tokenizer()
    model.save_pretrained(root / "teacher")
    tokenizer.save_pretrained(root / "teacher")
    (root / "text").mkdir()
    for n, text in enumerate(TEXTS):
        (root / "text" / f"{n}.txt").write_text(text)
    words = ["build", str(root / "teacher"), str(root / "text"), str(root / "cache"), "--xtok", "--length", "50"]
    done = CliRunner().invoke(main, [*words, "--quiet"])
    assert done.exit_code == 0, done.output
    return ps.cache.open(root / "cache"), tokenizer, model


WORDS = [bytes([n]) for n in range(256)] + [b"<s>", b"the ", b"text ", b"end "]


def encode(text):
    """The longest of WORDS from the left."""
    raw, out = text.encode(), []
    while raw:
        n = max((n for n in range(257, 260) if raw.startswith(WORDS[n])), default=raw[0])
        out.append(n)
        raw = raw[len(WORDS[n]) :]
    return out


@pytest.fixture(scope="module")
def student():
    return VocabBytes.from_callback(len(WORDS), WORDS.__getitem__, specials=[256]).with_roles(eos=256)


def test_batches_are_aligned_as_they_are_loaded(teacher, student):
    cache, tokenizer, model = teacher
    assert cache.spec.k == 0 and cache.spec.token_log_probs and cache.verify().ok
    collator = ChunkCollator(cache, tokenizer, student, encode=encode, bos_id=256, pad_id=1)
    keys = cache.keys()
    batch = collator([{"key": key} for key in keys])
    alignment = batch.alignment
    assert alignment.num_rows == len(keys) and alignment.mismatches.max() <= 1  # characters that a row's end cuts
    assert (batch.input_ids[:, 0] == 256).all() and (batch.input_ids[~batch.mask] == 1).all()
    ids = batch.input_ids[batch.mask]
    assert len(ids) == len(alignment.student_chunk)
    teachers = torch.cat([torch.from_numpy(cache.tokens(key)) for key in keys])
    vocab = collator.aligner.teacher
    for c, ((s0, s1), (t0, t1)) in enumerate(zip(*(side.tolist() for side in alignment.token_ranges()), strict=True)):
        if alignment.valid[c]:
            spelt = b"".join(WORDS[n] for n in ids[s0:s1].tolist())
            assert spelt == b"".join(vocab[n] for n in teachers[t0:t1].tolist())
    assert alignment.valid.sum() > 0.5 * len(teachers) / 4
    # an end of text stands where it stood
    assert (ids == 256).sum() == len(keys) + (teachers == tokenizer.eos_token_id).sum()
    exact, ends = [], []
    for key in keys:
        own = torch.from_numpy(cache.tokens(key)).long()
        with torch.no_grad():
            table = model(own[None]).logits[0].log_softmax(-1)
            table = torch.nn.functional.pad(table, (0, max(0, len(vocab) - table.shape[1])), value=-torch.inf)
        exact.append(torch.cat([torch.zeros(1), table[:-1].gather(1, own[1:, None])[:, 0]]))
        starts = torch.from_numpy(vocab.word_starts())
        ends.append(table[:, : len(starts)][:, starts].logsumexp(-1))
    torch.testing.assert_close(batch.teacher_log_probs, torch.cat(exact), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(batch.teacher_boundary, torch.cat(ends), rtol=2e-3, atol=2e-3)


def test_a_teacher_of_the_same_model_is_matched(teacher):
    """Taught by itself over its own tokenizer a model has nothing to learn; taught by a shifted one it has."""
    cache, tokenizer, model = teacher
    collator = ChunkCollator(cache, tokenizer, tokenizer)
    batch = collator(cache.keys()[:3])
    with torch.no_grad():
        hidden = model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    parts = hidden[batch.mask], ps.Head.from_model(model), batch.input_ids[batch.mask]
    same = linear_alm_loss(*parts, batch.teacher_log_probs, batch.alignment, tau=1.0)
    moved = linear_alm_loss(*parts, batch.teacher_log_probs.roll(1), batch.alignment, tau=1.0)
    assert same < 1e-5 < 1e-2 < moved


def test_training_brings_a_student_of_bytes_to_the_teachers_bits(teacher):
    """Chunk likelihoods teach what the teacher says of the text, well or badly: this one's weights are random."""
    cache, tokenizer, _ = teacher
    torch.manual_seed(0)
    settings = demo.Settings(hidden=48, layers=1, epochs=6, batch=4, learning_rate=1e-2)
    collator = ChunkCollator(
        cache, tokenizer, demo.byte_vocabulary(), encode=lambda text: list(text.encode()), bos_id=demo.END
    )
    log_probs = collator(cache.keys()).teacher_log_probs
    teachers = -log_probs.sum().item() / math.log(2) / len(log_probs)  # its tokens are bytes
    said = []
    held = demo.byte_rows([TEXTS[0], TEXTS[-1]])
    losses, bits = demo.train(demo.byte_student(settings), collator, settings, held, said.append)
    steps = -(-len(cache.keys()) // 4)
    assert len(bits) == 7 and len(losses) == 6 * steps and "bits a byte" in said[-1]
    first, last = (sum(p["loss"] for p in part) for part in (losses[:steps], losses[-steps:]))
    assert last < 0.5 * first
    before, after = (abs(bits[n]["bits_per_byte"] - teachers) for n in (0, -1))
    assert 7 < bits[0]["bits_per_byte"] < 9 and after < before


def test_refusals(teacher, student, tmp_path):
    cache, tokenizer, _ = teacher
    words = [
        "build",
        "m",
        str(tmp_path),
        str(tmp_path / "o"),
        "--xtok",
        "--server",
        "http://x",
        "--server-kind",
        "vllm",
    ]
    failed = CliRunner().invoke(main, words)
    assert failed.exit_code == 1 and "--xtok needs the model itself" in failed.output
    with pytest.raises(TypeError, match="VocabBytes cannot encode text; pass encode="):
        ChunkCollator(cache, tokenizer, student)
    with ps.cache.Writer(tmp_path / "c", ps.cache.Spec(vocab_size=300, k=2)) as writer:
        writer.add("a", [1, 2], ps.topk(torch.randn(2, 300), 2))
    with pytest.raises(ValueError, match="no log-probabilities of its tokens; build it with --xtok"):
        ChunkCollator(ps.cache.open(tmp_path / "c"), tokenizer, student, encode=encode)


def test_the_picture_and_the_summary(tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    from potstill.demo.xtok_plot import draw

    report = {
        "teacher": "a teacher", "teacher_vocabulary": 49_152, "teacher_bits_per_byte": 0.9, "teacher_tokens": 16_384,
        "student_parameters": 1_800_000, "student_vocabulary": 257, "cache_bytes_per_token": 9.5,
        "held_out_bytes": 25_000, "bits_per_byte_before": 8.02, "bits_per_byte_after": 3.21, "total_seconds": 100.0,
        "loss_curve": [{"step": n, "loss": 1.0 / n} for n in range(1, 50)],
        "bits_curve": [{"step": 0, "bits_per_byte": 8.02}, {"step": 49, "bits_per_byte": 3.21}],
    }  # fmt: skip
    draw(report, tmp_path / "report.png")
    import matplotlib.image

    pixels = matplotlib.image.imread(tmp_path / "report.png")
    assert pixels.shape[1] > 1200 and len({tuple(p) for p in pixels[::7, ::7, :3].reshape(-1, 3).round(2)}) > 10
    said = demo.summary(report, tmp_path)
    for figure in ("8.020 -> 3.210", "16,384 tokens, 9.5 bytes", "1.8 M parameters", "0.900 bits"):
        assert figure in said
