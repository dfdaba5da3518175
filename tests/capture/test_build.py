from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import potstill as ps
import pytest
import torch
from potstill.capture import Document, build, open_text, token_sequences
from potstill.cli import main

from ..forks import exit_code, fork
from .stalling import commits, stall_after_commit


def rows(cache, key):
    return [np.asarray(a) for a in cache.numpy(key)]


def test_a_build_records_the_rest_at_other_temperatures(model, tokenizer, corpus, tmp_path):
    out = tmp_path / "c"
    build(
        model, tokenizer, open_text(corpus), out, k=8, length=48, values="fp32", temperatures=(1.0, 2.0), batch_size=4
    )
    cache = ps.cache.open(out)
    sequence = cache[cache.keys()[0]]
    tokens = np.array(sequence.tokens)
    with torch.no_grad():
        z = model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0] / 2
    inside = torch.zeros_like(z, dtype=torch.bool).scatter_(1, torch.as_tensor(sequence.topk.ids).long(), True)
    expected = z.log_softmax(-1).masked_fill(inside, -float("inf")).logsumexp(-1)
    torch.testing.assert_close(torch.as_tensor(sequence.topk.log_rest_at[2.0]), expected, atol=1e-4, rtol=1e-4)


def assert_same_content(a, b):
    """Equal rows under equal keys; entries of equal log-probability may stand in another order."""
    assert sorted(a.keys()) == sorted(b.keys())
    for key in a.keys():
        for x, y in zip(in_order(*rows(a, key)), in_order(*rows(b, key)), strict=True):
            np.testing.assert_array_equal(x, y)


def in_order(tokens, ids, log_probs, log_rest):
    order = np.lexsort((ids, -log_probs), axis=-1)
    return tokens, np.take_along_axis(ids, order, -1), log_probs, log_rest


@pytest.mark.parametrize("pack", [True, False])
def test_rows_are_the_teachers_next_token_distributions(model, tokenizer, corpus, tmp_path, pack):
    report = build(
        model, tokenizer, open_text(corpus), tmp_path / "c", k=300, length=48, pack=pack, batch_size=4, values="fp16"
    )
    cache = ps.cache.open(tmp_path / "c")
    want = {s.key: s.tokens for s in token_sequences(open_text(corpus), tokenizer, length=48, pack=pack)}
    assert sorted(cache.keys()) == sorted(want) and cache.verify().ok
    assert report.tokens == report.new_tokens == cache.num_tokens == sum(map(len, want.values()))
    for key, tokens in want.items():
        got, ids, log_probs, log_rest = rows(cache, key)
        np.testing.assert_array_equal(got, tokens)
        with torch.no_grad():
            exact = model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].log_softmax(-1)
        dense = torch.zeros_like(exact).scatter(-1, torch.from_numpy(ids).long(), torch.from_numpy(log_probs))
        torch.testing.assert_close(dense, exact, atol=2e-2, rtol=2e-3)
        assert (log_rest < -5).all(), "at k = V nothing is outside"


def test_the_spec_says_what_was_built(model, tokenizer, corpus, tmp_path):
    build(model, tokenizer, open_text(corpus), tmp_path / "c", k=8, length=32, teacher="t", teacher_revision="r")
    spec = ps.cache.open(tmp_path / "c").spec
    assert (spec.vocab_size, spec.k, spec.teacher, spec.teacher_revision) == (300, 8, "t", "r")
    assert spec.tokenizer.startswith("blake2b:")
    assert dict(spec.extra) == {"length": 32, "pack": True} and spec.dtype == "float32"


def test_stopped_anywhere_and_continued_is_the_same_cache(model, tokenizer, corpus, tmp_path, monkeypatch):
    """Ctrl-C after each number of forward passes; the batches after it must not be formed anew."""
    from potstill.capture import build as module

    options = {"k": 8, "length": 32, "pack": False, "batch_size": 3}
    build(model, tokenizer, open_text(corpus), tmp_path / "whole", **options)
    whole = ps.cache.open(tmp_path / "whole")
    forward = sys.modules[module.__module__]._teacher_rows
    for stop in (0, 1, 4):
        calls = 0

        def interrupted(*args, stop=stop):
            nonlocal calls
            if calls == stop:
                raise KeyboardInterrupt
            calls += 1
            return forward(*args)

        out = tmp_path / f"stopped-{stop}"
        monkeypatch.setattr(sys.modules[module.__module__], "_teacher_rows", interrupted)
        first = build(model, tokenizer, open_text(corpus), out, **options)
        monkeypatch.setattr(sys.modules[module.__module__], "_teacher_rows", forward)
        assert not first.finished and first.sequences == first.new_sequences == 3 * stop
        second = build(model, tokenizer, open_text(corpus), out, **options)
        assert second.finished and first.new_sequences + second.new_sequences == len(whole)
        assert_same_content(ps.cache.open(out), whole)
        third = build(model, tokenizer, open_text(corpus), out, **options)
        assert third.new_sequences == 0 and third.tokens == whole.num_tokens


def test_more_tokens_later_only_adds(model, tokenizer, corpus, tmp_path):
    options = {"k": 4, "length": 32, "batch_size": 2}
    build(model, tokenizer, open_text(corpus), tmp_path / "c", max_tokens=100, **options)
    assert ps.cache.open(tmp_path / "c").num_tokens == 96
    build(model, tokenizer, open_text(corpus), tmp_path / "c", **options)
    build(model, tokenizer, open_text(corpus), tmp_path / "whole", **options)
    assert_same_content(ps.cache.open(tmp_path / "c"), ps.cache.open(tmp_path / "whole"))


def test_text_that_changed_under_a_key_is_refused(model, tokenizer, tmp_path):
    build(model, tokenizer, [Document("a", "one text")], tmp_path / "c", k=4)
    with pytest.raises(ValueError, match="other tokens for 'a#0'"):
        build(model, tokenizer, [Document("a", "another text")], tmp_path / "c", k=4)


def test_another_spec_is_refused(model, tokenizer, tmp_path):
    build(model, tokenizer, ["some text"], tmp_path / "c", k=4)
    with pytest.raises(ValueError, match="k"):
        build(model, tokenizer, ["some text"], tmp_path / "c", k=5)
    with pytest.raises(ValueError, match="length|extra"):
        build(model, tokenizer, ["some text"], tmp_path / "c", k=4, length=7)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"k": 301}, "k is 301: it must be between 1 and the teacher's vocabulary of 300"),
        ({"k": 0}, "k is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_refused_options(model, tokenizer, tmp_path, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(model, tokenizer, ["text"], tmp_path / "c", **options)
    assert not (tmp_path / "c").exists()


def test_no_text_is_an_error(model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="no text found"):
        build(model, tokenizer, ["", ""], tmp_path / "c", k=4)
    with pytest.raises(TypeError, match="one string"):
        build(model, tokenizer, "text", tmp_path / "c", k=4)


# ---- the command ----


def test_the_command_prints_a_summary_and_one_line_errors(model_folder, corpus, tmp_path):
    from click.testing import CliRunner

    def call(*words):
        return CliRunner().invoke(main, ["build", *map(str, words)])

    done = call(model_folder, corpus, tmp_path / "c", "--k", 8, "--length", 32, "--device", "cpu", "--quiet")
    assert done.exit_code == 0, done.output
    assert "bytes a token" in done.output and "tokens/s" in done.output
    cut = ["--k", 8, "--length", 32, "--device", "cpu", "--min-mass", 0.05, "--max-tokens", 64, "--quiet"]
    assert call(model_folder, corpus, tmp_path / "cut", *cut).exit_code == 0
    store = ps.cache.open(tmp_path / "cut")
    counts = [(store.numpy(key)[1] >= 0).sum(-1) for key in store.keys()]
    assert store.spec.min_mass == 0.05 and min(map(min, counts)) < 8
    for words, sentence in [
        ((model_folder, tmp_path / "no", tmp_path / "d"), "does not exist"),
        ((tmp_path / "no-model", corpus, tmp_path / "d"), "does not exist"),
        ((model_folder, corpus, tmp_path / "d", "--k", 1000), "k is 1000"),
        ((model_folder, corpus, tmp_path / "d", "--suffix", ".zig"), "no text found"),
        ((model_folder, corpus, tmp_path / "c", "--k", 9, "--length", 32), "k"),
    ]:
        failed = call(*words, "--quiet")
        assert failed.exit_code == 1 and sentence in failed.output and "Traceback" not in failed.output


def test_help_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from potstill.capture.command import build; import potstill.capture\n"
        "try: build(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


OPTIONS = ["--k", "16", "--length", "64", "--batch-size", "2", "--commit-seconds", "0.02", "--device", "cpu"]


@pytest.fixture(scope="module")
def uninterrupted(model_folder, tmp_path_factory):
    """(words of a build, the cache that it gives when nothing interrupts it)."""
    root = tmp_path_factory.mktemp("killed")
    data = root / "data"
    data.mkdir()
    for number in range(10):
        (data / f"{number:02d}.txt").write_text("".join(f"sentence {i} of {number}. " for i in range(60 + number)))
    words = [*OPTIONS, "--quiet", str(model_folder), str(data)]
    assert exit_code(in_a_fork(words, root / "whole")) == 0
    return words, ps.cache.open(root / "whole")


def in_a_fork(words, out, said=os.devnull, stall=False) -> int:
    """Starts a build in a forked child, its stderr in a file; the child's id."""

    def body():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stderr = open(said, "w", buffering=1)  # noqa: SIM115
        if stall:
            stall_after_commit(out)
        main(["build", *words, str(out)])

    return fork(body)


def in_a_process(words, out, said, stall) -> int:
    """The same in a new interpreter."""
    program = [sys.executable, "-m", "tests.capture.stalling", *words, str(out)]
    with said.open("w") as stderr:
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        root = Path(__file__).parents[2]
        return subprocess.Popen(program, cwd=root, env=environ, stdout=subprocess.DEVNULL, stderr=stderr).pid


def stopped(start, words, out, how):
    """Runs a build, stops it with a signal once it has committed something new; (exit code, stderr)."""
    before, said = commits(out), out.with_name(f"{out.name}.stderr")
    pid, deadline = start(words, out, said, stall=True), time.monotonic() + 120
    while commits(out) <= before and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(pid, how)
    return exit_code(pid), said.read_text()


def test_killed_twice_and_continued_nothing_is_lost_or_repeated(uninterrupted, tmp_path):
    words, whole = uninterrupted
    out, held = tmp_path / "killed", 0
    for _ in range(2):
        code, said = stopped(in_a_fork, words, out, signal.SIGKILL)
        assert code == -signal.SIGKILL, said
        kept = ps.cache.open(out)
        assert kept.verify().ok and held < len(kept) < len(whole)
        held = len(kept)
    assert exit_code(in_a_fork(words, out)) == 0
    continued = ps.cache.open(out)
    assert continued.verify().ok and len(continued.keys()) == len(set(continued.keys()))
    assert_same_content(continued, whole)


@pytest.mark.parametrize(
    "start, how",
    [
        (in_a_fork, signal.SIGINT),
        (in_a_fork, signal.SIGTERM),
        pytest.param(in_a_process, signal.SIGTERM, marks=pytest.mark.nightly),
    ],
)
def test_a_polite_stop_commits_and_says_how_to_go_on(uninterrupted, tmp_path, start, how):
    words, whole = uninterrupted
    code, said = stopped(start, words, tmp_path / "c", how)
    assert code == 130 and "run the same command again" in said and "Traceback" not in said
    kept = ps.cache.open(tmp_path / "c")
    assert kept.verify().ok and 0 < len(kept) < len(whole)
    for key in kept.keys():
        for x, y in zip(in_order(*rows(kept, key)), in_order(*rows(whole, key)), strict=True):
            np.testing.assert_array_equal(x, y)
