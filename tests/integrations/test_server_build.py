"""`potstill build --server` against a real HTTP server that serves a tiny model's rows, and fails in every usual
way.
"""

from __future__ import annotations

import email.utils
import random
import time

import numpy as np
import potstill as ps
import pytest
import torch
from click.testing import CliRunner
from potstill.capture.server import KINDS, RowServer, build_from_server
from potstill.cli import main
from potstill.integrations.servers import Client, Retry, ServerError, TokenStrings

from . import row_server
from .row_server import VOCAB

QUICK = Retry(attempts=6, first=0.0)
WORDS = "the potatoes are in a kettle of water that is hot and ready for tea or toast by noon".split()
# no two sequences have the same tokens
TEXTS = [" ".join(random.Random(n).choices(WORDS, k=16)) for n in range(6)]


@pytest.fixture(scope="module")
def model():
    return row_server.tiny_llama()


@pytest.fixture(scope="module")
def tokenizer():
    return row_server.ascii_tokenizer()


def asks(server, tokenizer, kind, retry=QUICK, timeout=60.0, cls=Client):
    strings = TokenStrings.from_tokenizer(tokenizer) if kind == "openai" else None
    return RowServer(cls(server.url, timeout=timeout, retry=retry), kind, "tiny", strings)


def build(server, tokenizer, out, kind="vllm", texts=TEXTS, retry=QUICK, timeout=60.0, **options):
    words = {"vocab_size": VOCAB, "k": 12, "length": 16, "pack": False, "values": "fp32", "concurrency": 3}
    return build_from_server(
        asks(server, tokenizer, kind, retry, timeout), tokenizer, texts, out, **{**words, **options}
    )


def loss(model, cache, shift=0):
    total = 0.0
    for key in cache.keys():
        tokens = torch.from_numpy(np.array(cache.tokens(key), dtype=np.int64))
        rows = cache.batch([key], tokens=[tokens])[0]
        with torch.no_grad():
            hidden = model.model(tokens[None]).last_hidden_state[0]
        rows = rows._map(lambda x: x.roll(shift, 0))
        total += ps.linear_distill_loss(hidden, ps.Head.from_model(model), rows, divergence="forward_kl").item()
    return total / len(cache)


@pytest.mark.parametrize("kind", [*KINDS, "vllm flat"])
def test_a_build_from_a_server_is_the_model(model, tokenizer, tmp_path, kind):
    with row_server.RowServer(model, tokenizer, flat=kind == "vllm flat") as server:
        report = build(server, tokenizer, tmp_path / "c", kind.split()[0])
    cache = ps.cache.open(tmp_path / "c")
    assert report.sequences == report.requests == len(cache) and not report.problems and not report.retries
    assert cache.verify().ok and cache.spec.vocab_size == VOCAB and cache.spec.extra["server"] == kind.split()[0]
    assert abs(loss(model, cache)) < 1e-6 and loss(model, cache, shift=1) > 0.05
    key = cache.keys()[0]
    tokens = np.array(cache.tokens(key))
    lp = row_server.log_probs(model, tokens)
    expected = lp[torch.arange(len(tokens) - 1), torch.from_numpy(tokens[1:].astype(np.int64))]
    torch.testing.assert_close(torch.as_tensor(cache[key].topk.token_log_probs)[:-1], expected, atol=1e-6, rtol=0)


def test_the_local_build_and_the_server_give_the_same_rows(model, tokenizer, tmp_path):
    from potstill.capture import build as build_locally  # the function, whatever was imported before

    words = {"k": 12, "length": 16, "pack": True, "values": "fp32"}
    with row_server.RowServer(model, tokenizer) as server:
        build(server, tokenizer, tmp_path / "s", "sglang", **words)
    build_locally(model, tokenizer, TEXTS, tmp_path / "l", **words)
    ours, theirs = ps.cache.open(tmp_path / "l"), ps.cache.open(tmp_path / "s")
    assert sorted(ours.keys()) == sorted(theirs.keys())
    for key in ours.keys():
        a, b = ours[key], theirs[key]
        assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.topk.ids, b.topk.ids)
        np.testing.assert_allclose(a.topk.log_probs, b.topk.log_probs, atol=1e-5)
        np.testing.assert_allclose(a.topk.log_rest, b.topk.log_rest, atol=5e-5)


FAULTS = [500, 503, "reset", "cut", "half", "html", 429, (429, "0"), 408, 502]


@pytest.mark.parametrize("kind", KINDS)
def test_failures_that_pass_change_nothing(model, tokenizer, tmp_path, kind):
    with row_server.RowServer(model, tokenizer) as server:
        clean = build(server, tokenizer, tmp_path / "clean", kind)
        server.faults += FAULTS
        hit = build(server, tokenizer, tmp_path / "hit", kind, concurrency=1, retry=Retry(attempts=11, first=0.0))
    assert hit.retries == len(FAULTS) and hit.requests == clean.requests + len(FAULTS)
    one, two = ps.cache.open(tmp_path / "clean"), ps.cache.open(tmp_path / "hit")
    assert one.keys() == two.keys() and abs(loss(model, two)) < 1e-6


def test_a_silent_server_is_asked_again(model, tokenizer, tmp_path):
    with row_server.RowServer(model, tokenizer) as server:
        server.faults += ["silent"]
        retry = Retry(attempts=100, first=0.0)
        report = build(server, tokenizer, tmp_path / "c", texts=TEXTS[:2], retry=retry, timeout=0.5, concurrency=1)
    assert report.retries >= 1 and abs(loss(model, ps.cache.open(tmp_path / "c"))) < 1e-6


class Waits(Client):
    def _wait(self, seconds):
        self.waits = [*getattr(self, "waits", []), seconds]


@pytest.mark.parametrize(
    "after, least, most",
    [("7", 7, 7), ("in 590 seconds", 1, 590), ("soon", 0, 0), (None, 0, 0)],
)
def test_retry_after_is_kept(model, tokenizer, after, least, most):
    if after == "in 590 seconds":
        after = email.utils.formatdate(time.time() + 590, usegmt=True)
    with row_server.RowServer(model, tokenizer) as server:
        asked = asks(server, tokenizer, "vllm", cls=Waits)
        server.faults += [(429, after)]
        assert asked.rows([1, 2, 3], k=4, vocab_size=VOCAB).valid.all()
        assert len(asked.client.waits) == 1 and least <= asked.client.waits[0] <= most
        server.faults += [(503, "86400")]
        with pytest.raises(ServerError, match="asks to wait 86,400 s"):
            asked.rows([1, 2, 3], k=4, vocab_size=VOCAB)


def test_waits_double_up_to_the_longest():
    retry = Retry(first=1.0, longest=8.0)
    delays = [retry.delay(n) for n in range(1, 8)]
    for n, delay in enumerate(delays):
        assert min(8.0, 2.0**n) / 2 <= delay <= min(8.0, 2.0**n)


def test_errors_are_one_line(model, tokenizer, tmp_path):
    for faults, sentence in [
        ([400], "/v1/completions answered 400 Bad Request: status 400 as planned"),
        ([401], "401 Unauthorized"),
        ([500] * 3, "failed 3 times, the last with: 500 Internal Server Error"),
    ]:
        with row_server.RowServer(model, tokenizer) as server:
            server.faults += faults
            with pytest.raises(ServerError) as caught:
                build(server, tokenizer, tmp_path / "c", retry=Retry(attempts=3, first=0.0), concurrency=1)
            assert sentence in str(caught.value) and "\n" not in str(caught.value)
    gone = server.url
    with pytest.raises(ServerError, match=r"failed 2 times, the last with: .*refused"):
        Client(gone, retry=Retry(attempts=2, first=0.0)).post("/generate", {})
    with pytest.raises(ValueError, match="http://HOST:PORT"):
        Client("localhost:8000")


def test_committed_work_is_not_asked_again(model, tokenizer, tmp_path):
    """The server dies after some answers; what was written is kept, and the next run asks for the rest alone."""
    out = tmp_path / "c"
    with row_server.RowServer(model, tokenizer) as server:
        whole = build(server, tokenizer, tmp_path / "whole")
        everything = set(server.asked)
    assert len(everything) == whole.sequences
    with row_server.RowServer(model, tokenizer) as server:
        server.faults += [None] * 5 + [400]
        with pytest.raises(ServerError):
            build(server, tokenizer, out, concurrency=1)
    begun = ps.cache.open(out)
    kept = {tuple(begun.tokens(key).tolist()) for key in begun.keys()}
    assert 0 < len(kept) <= 5
    with row_server.RowServer(model, tokenizer) as server:
        report = build(server, tokenizer, out)
        assert not kept & set(server.asked) and kept | set(server.asked) == everything
        assert len(server.asked) == report.new_sequences == whole.sequences - len(kept)
        server.asked.clear()
        again = build(server, tokenizer, out)
        assert not server.asked and again.requests == 0 and again.new_sequences == 0
    assert abs(loss(model, ps.cache.open(out))) < 1e-6


def test_an_interrupt_keeps_what_is_there(model, tokenizer, tmp_path, monkeypatch):
    from potstill import cache as ps_cache

    added = ps_cache.Writer.add
    count = 0

    def interrupted(*args):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return added(*args)

    with row_server.RowServer(model, tokenizer) as server:
        monkeypatch.setattr(ps_cache.Writer, "add", interrupted)
        report = build(server, tokenizer, tmp_path / "c")
        assert not report.finished and len(ps.cache.open(tmp_path / "c")) == 3
        monkeypatch.setattr(ps_cache.Writer, "add", added)
        assert build(server, tokenizer, tmp_path / "c").finished
    assert abs(loss(model, ps.cache.open(tmp_path / "c"))) < 1e-6


def test_processes_share_the_asking(model, tokenizer, tmp_path):
    with row_server.RowServer(model, tokenizer) as server:
        whole = build(server, tokenizer, tmp_path / "whole")
        everything = sorted(server.asked)
        server.asked.clear()
        parts = [build(server, tokenizer, tmp_path / "c", shard=(i, 3)) for i in range(3)]
        assert sorted(server.asked) == everything and sum(p.new_sequences for p in parts) == whole.sequences
    one, two = ps.cache.open(tmp_path / "whole"), ps.cache.open(tmp_path / "c")
    assert sorted(one.keys()) == sorted(two.keys())
    for key in one.keys():
        for a, b in zip(one.numpy(key), two.numpy(key), strict=True):
            assert np.array_equal(a, b)


def spoil(at, value):
    """A change of vLLM's answers: entry `at` of the prompt gets a log-probability that cannot be."""

    def change(body):
        entry = body["choices"][0]["prompt_logprobs"][at]
        entry[list(entry)[-1]]["logprob"] = value
        return body

    return change


def test_unusable_rows_are_counted_by_reason_and_left_out(model, tokenizer, tmp_path):
    long = ["the potatoes in the kettle"]
    bad = {len(tokenizer(long[0])["input_ids"])}

    def change(body):
        return spoil(3, 0.5)(body) if len(body["choices"][0]["prompt_logprobs"]) in bad else body

    with row_server.RowServer(model, tokenizer, change=change) as server:
        report = build(server, tokenizer, tmp_path / "c", texts=[*long, "hot water"], length=64)
        assert report.left_out == 1 and report.sequences == 1
        assert report.problems == {"a log-probability that is no number or above 0": 1}
        kept = build(server, tokenizer, tmp_path / "c", texts=[*long, "hot water"], length=64, max_invalid=0.2)
        assert kept.left_out == 0 and kept.sequences == 2 and kept.new_sequences == 1
    rows = ps.cache.open(tmp_path / "c")["text-0#0"].topk
    assert (rows.ids[2] == -1).all() and rows.log_rest[2] == 0 and (rows.ids[[0, 1, 3]] >= 0).all()


def test_a_server_whose_answers_are_all_unusable_is_asked_no_more(model, tokenizer, tmp_path):
    texts = [f"text {n} of many" for n in range(40)]
    with row_server.RowServer(model, tokenizer, change=spoil(2, 0.5)) as server:
        with pytest.raises(
            ValueError, match="first 8 sequences all have unusable rows: rows: 8 with a log-probability"
        ):
            build(server, tokenizer, tmp_path / "c", texts=texts, length=64, concurrency=2)
        assert len(server.asked) < 20


# ---- the command ----


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


def call(*words, env=None):
    return CliRunner().invoke(main, ["build", *map(str, words)], env=env)


def test_the_command_asks_a_server(model, tokenizer, tokenizer_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(TEXTS))
    words = ("tiny", text, tmp_path / "c", "--tokenizer", tokenizer_folder, "--k", 8, "--length", 32, "--quiet")
    with row_server.RowServer(model, tokenizer) as server:
        ask = ("--server", server.url + "/v1", "--server-kind")
        done = call(*words, *ask, "vllm", "--vocab-size", VOCAB, env={"ROW_KEY": "abc", "OPENAI_API_KEY": ""})
        assert done.exit_code == 0, done.output
        assert "bytes a token" in done.output and "requests" in done.output
        before = server.seen
        assert call(*words, *ask, "vllm", "--vocab-size", VOCAB).exit_code == 0 and server.seen == before
        assert "Authorization" not in server.headers[0]
        keyed = call(
            *words[:2], tmp_path / "d", *words[3:], *ask, "openai", "--api-key-env", "ROW_KEY", env={"ROW_KEY": "abc"}
        )
        assert keyed.exit_code == 0, keyed.output
        assert server.headers[-1]["Authorization"] == "Bearer abc"
        assert ps.cache.open(tmp_path / "d").spec.vocab_size == VOCAB
        server.faults += [404]
        for more, sentence in [
            ((*ask, "vllm"), "status 404 as planned"),
            ((*ask, "vllm", "--temperature", 2), "--temperature"),
            ((*ask, "openai", "--api-key-env", "NOT_SET"), "NOT_SET"),
            (("--server-kind", "vllm"), "--server"),
            (("--server", "nowhere:80", "--server-kind", "vllm"), "http://HOST:PORT"),
        ]:
            failed = call(*words[:2], tmp_path / "e", *words[3:], *more)
            assert failed.exit_code == 1 and sentence in failed.output, failed.output
            assert len(failed.output.strip().splitlines()) == 1 and failed.output.startswith("Error: ")
