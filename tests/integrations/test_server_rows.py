"""What servers answer -> TopK: the recorded forms entry by entry, then a real model's rows through every parser."""

from __future__ import annotations

import copy
import json
import math
import random
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import potstill as ps
import pytest
import torch
from potstill.integrations.servers import (
    TokenStrings,
    axolotl_rows,
    openai_answer,
    openai_chat_rows,
    openai_rows,
    sglang_answer,
    topk_rows,
    trl_rows,
    vllm_answer,
    vllm_rows,
)
from potstill.integrations.servers import rows as reasons

from . import row_server
from .row_server import VOCAB

DATA = Path(__file__).parent / "data"
TOKENS = [5, 2, 7, 3]
# what the recorded answers say: {id: probability} of the three most probable, and the realised token's probability
KEPT = [{0: 0.4, 1: 0.2, 6: 0.15}, {3: 0.3, 0: 0.25, 7: 0.25}, {3: 1.0}, {6: 0.5, 1: 0.25, 4: 0.125}]
REALISED = [0.05, 0.25, 1.0, 0.0]
REST = [0.25, 0.2, 0.0, 0.125]
WORDS = ["the", " a", " cat", " sat", "\n", "The", " on", "\ufffd"]


def recorded(name):
    return json.loads((DATA / name).read_text())


def strings(words=WORDS):
    found = TokenStrings({"decoded": lambda: list(words)}, len(words))
    found._bytes = [w.encode() for w in words]
    return found


def assert_recorded(rows):
    for i, kept in enumerate(KEPT):
        got = {int(t): math.exp(lp) for t, lp in zip(rows.topk.ids[i], rows.topk.log_probs[i], strict=True) if t >= 0}
        assert got == pytest.approx(kept), i
    assert (rows.topk.log_probs.diff() <= 0)[rows.topk.ids[:, 1:] >= 0].all()
    assert rows.topk.token_log_probs.exp().tolist() == pytest.approx(REALISED)
    assert rows.topk.log_rest.exp().tolist() == pytest.approx(REST)
    assert rows.valid.all() and not rows.problems and rows.short == 0


ANSWERS = {
    "vllm_completion.json": vllm_answer,
    "vllm_completion_flat.json": vllm_answer,
    "sglang_generate.json": sglang_answer,
    "openai_completion.json": lambda *a, **w: openai_answer(*a, strings=strings(), **w),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_recorded_answers_entry_by_entry(name):
    assert_recorded(ANSWERS[name](recorded(name), TOKENS, k=3, vocab_size=8))


def test_vllm_objects_are_read_like_json():
    """What `LLM.generate` returns offline: Logprob objects under int keys, and FlatLogprobs."""
    choice = recorded("vllm_completion.json")["choices"][0]
    as_objects = [e and {int(i): SimpleNamespace(**v) for i, v in e.items()} for e in choice["prompt_logprobs"]]
    flat = SimpleNamespace(**recorded("vllm_completion_flat.json")["choices"][0]["prompt_logprobs"])
    for form in (as_objects, flat):
        assert_recorded(vllm_rows(form, TOKENS, k=3, vocab_size=8, generated=choice["logprobs"]))


def test_pitfall_27_rows_of_servers(model):
    """Entry 0 is None; the prompt's token comes first and may make k + 1; no cut by dict order; ranks inflate on ties;
    temperature is not applied; [log-prob, id, text]; token strings. Each breaks a reader that does not know it."""
    body = recorded("vllm_completion.json")
    choice = body["choices"][0]
    entries = choice["prompt_logprobs"]
    assert entries[0] is None and list(entries[1])[0] == "2" and len(entries[1]) == 4
    # the first three of the dict would drop id 6 and keep the improbable realised token
    kept = vllm_answer(body, TOKENS, k=3, vocab_size=8).topk.ids[0].tolist()
    assert kept == [0, 1, 6] and list(map(int, entries[1]))[:3] == [2, 1, 0]
    # in any order, with any ranks, the rows are the same
    for seed in range(5):
        shuffled = copy.deepcopy(body)
        for entry in shuffled["choices"][0]["prompt_logprobs"][1:]:
            items = list(entry.items())
            random.Random(seed).shuffle(items)
            entry.clear()
            entry.update({i: {**v, "rank": seed} for i, v in items})
        assert_recorded(vllm_answer(shuffled, TOKENS, k=3, vocab_size=8))
    # ties: the second and third of equals both have the last one's rank
    tokens = [1, 2, 3]
    lp = torch.log_softmax(torch.tensor([[3.0, 1, 1, 0, 0], [3, 2, 2, 2, 0], [1, 1, 1, 1, 1]]), -1)
    prompt = row_server.vllm_prompt(lp, tokens, 2)
    assert prompt[1]["2"]["rank"] == 3 and prompt[2]["3"]["rank"] == 4 and len(prompt[2]) == 3
    rows = vllm_rows(prompt, tokens, k=2, vocab_size=5)
    assert rows.topk.ids[1].tolist() == [0, 1] and rows.topk.token_log_probs[1] == lp[1, 3]
    # rows are those of T = 1, and so are the shifted answer's refusals
    tokens = torch.arange(1, 20).tolist()
    lp = row_server.log_probs(model, tokens)
    exact = ps.topk(lp, 8)
    for rows in (
        vllm_answer(row_server.vllm_body(lp, tokens, 8), tokens, k=8, vocab_size=VOCAB),
        vllm_answer(row_server.vllm_body(lp, tokens, 8, flat=True), tokens, k=8, vocab_size=VOCAB),
        sglang_answer(row_server.sglang_body(lp, tokens, 8), tokens, k=8, vocab_size=VOCAB),
    ):
        torch.testing.assert_close(rows.topk.log_probs, exact.log_probs, atol=1e-6, rtol=0)
        torch.testing.assert_close(rows.topk.log_rest, exact.log_rest, atol=1e-5, rtol=1e-5)
        assert (rows.topk.ids == exact.ids).all()
        expected = lp[torch.arange(18), tokens[1:]]
        assert torch.equal(rows.topk.token_log_probs[:-1], expected) and rows.topk.token_log_probs[-1] == -math.inf


@pytest.mark.parametrize(
    "answer, name, shift",
    [
        (vllm_answer, "vllm_completion.json", lambda b: b["choices"][0]["prompt_logprobs"]),
        (sglang_answer, "sglang_generate.json", lambda b: b["meta_info"]["input_top_logprobs"]),
        (ANSWERS["openai_completion.json"], "openai_completion.json", lambda b:
        b["choices"][0]["logprobs"]["top_logprobs"]),
    ],
)  # fmt: skip
def test_shifted_cut_and_foreign_answers_are_refused(answer, name, shift):
    words = {"k": 3, "vocab_size": 8}
    body = recorded(name)
    rows = shift(body)
    rows[:] = [*rows[1:], rows[-1]]
    with pytest.raises(ValueError, match="shifted"):
        answer(body, TOKENS, **words)
    body = recorded(name)
    del shift(body)[2:]
    with pytest.raises(ValueError, match="entries"):
        answer(body, TOKENS, **words)
    with pytest.raises(ValueError, match="not a"):
        answer({"error": "no"}, TOKENS, **words)
    other = [5, 2, 6, 3]
    if answer is vllm_answer:  # it names no tokens but among the entries
        assert answer(recorded(name), other, **words).problems == {reasons.REALISED: 1}
    else:
        with pytest.raises(ValueError, match=r"place 2|token 2"):
            answer(recorded(name), other, **words)


# one row's entries, and the reason for which it cannot be used
BAD = [
    ([0, 1], [math.log(0.5), math.nan], reasons.NAN),
    ([0, 1], [math.log(0.5), math.inf], reasons.NAN),
    ([0, 1], [0.1, -3.0], reasons.NAN),
    ([0, 8], [math.log(0.5), -2.0], reasons.OUTSIDE),
    ([0, -1], [math.log(0.5), -2.0], reasons.OUTSIDE),
    ([0, 0], [math.log(0.5), -2.0], reasons.TWICE),
    ([0, 1], [math.log(0.6), math.log(0.401)], reasons.MASS),
    ([2, 1], [math.log(0.6), math.log(0.1)], reasons.REALISED),
    ([], [], reasons.MISSING),
]


@pytest.mark.parametrize("ids, values, reason", BAD)
def test_rows_that_cannot_be_used_are_empty_and_counted(ids, values, reason):
    good = ([0, 1], [math.log(0.5), math.log(0.25)], None)
    rows = topk_rows([good, (ids, values, None), good, None], [3, 0, 0, 1], k=2, vocab_size=8)
    assert rows.problems == Counter({reason: 1}) and rows.valid.tolist() == [True, False, True, False]
    assert rows.topk.ids[1].tolist() == [-1, -1] and rows.topk.log_rest[1] == 0
    assert rows.topk.ids[2].tolist() == [0, 1] and rows.topk.log_rest[2].exp() == pytest.approx(0.25)
    # they cost nothing: the bucket tail gives an empty row loss 0 and no gradient
    hidden = torch.randn(4, 6, requires_grad=True)
    loss = ps.linear_distill_loss(hidden, torch.randn(8, 6), rows.topk, reduction="none")
    loss.sum().backward()
    assert loss[1] == loss[3] == 0 and not hidden.grad[[1, 3]].any() and hidden.grad[[0, 2]].any()


def test_a_realised_token_said_twice_must_agree():
    rows = topk_rows([([0, 1], [-0.7, -1.7], -1.2), ([0], [-0.1], None)], [4, 1], k=2, vocab_size=8)
    assert rows.problems == {reasons.TWICE: 1}


@pytest.mark.parametrize(
    "mass, expected",
    [
        (1.0 - 1e-9, 2.0**-24),  # below what float32 can say: its resolution, not -inf and not log of a negative
        (1.0 + 5e-5, 2.0**-24),
        (1.0 - 1e-3, 1e-3),
        (0.25, 0.75),
    ],
)
def test_log_rest_near_a_mass_of_one(mass, expected):
    values = [math.log(mass * 0.6), math.log(mass * 0.4)]
    rows = topk_rows([(([0, 1]), values, None), None], [5, 0], k=2, vocab_size=1000)
    assert rows.topk.log_rest[0].exp().item() == pytest.approx(expected, rel=1e-3)


def test_log_rest_keeps_to_what_is_known():
    tight = ([0, 1], [math.log(0.5), math.log(0.25)], None)
    # of 3 ids the third holds no more than the second
    rows = topk_rows([tight, tight, tight], [9, 0, 0], k=2, vocab_size=3)
    assert rows.topk.log_rest[0].exp() == pytest.approx(0.25)
    # all of the vocabulary is there: nothing is outside
    rows = topk_rows([tight, tight], [9, 0], k=2, vocab_size=2)
    assert rows.topk.log_rest[0] == -math.inf
    # a realised token outside holds at least its own
    near = ([0, 1, 5], [math.log(0.6), math.log(0.4), math.log(1e-5)], None)
    rows = topk_rows([near, tight], [0, 5], k=2, vocab_size=100)
    assert rows.topk.ids[0].tolist() == [0, 1] and rows.topk.log_rest[0].exp() == pytest.approx(1e-5)


def test_short_rows_keep_no_stray_realised_token():
    """A server that gives fewer than asked adds the realised token all the same, from any rank."""
    two = ([4, 0, 1], [math.log(0.001), math.log(0.5), math.log(0.25)], None)
    rows = topk_rows([two, ([0], [-0.5], None)], [0, 4], k=8, vocab_size=100)
    assert rows.short == 2 and rows.topk.ids[0].tolist() == [0, 1] + [-1] * 6
    assert rows.topk.token_log_probs[0].exp() == pytest.approx(0.001)
    assert rows.topk.log_rest[0].exp() == pytest.approx(0.25)


# ---- token strings ----


def test_ambiguous_and_unknown_strings_are_refused_by_row():
    twins = strings([*WORDS[:6], " sat", "\ufffd"])  # ids 3 and 6 read the same
    body = recorded("openai_completion.json")["choices"][0]["logprobs"]
    body["top_logprobs"][1] = {"the": -0.9, " sat": -1.6, " cat": math.log(0.05)}
    body["top_logprobs"][2] = {"the": -1.4, "strange": -1.6, "\ufffd": math.log(0.25)}
    rows = openai_rows(body, TOKENS, k=3, vocab_size=8, strings=twins)
    assert rows.problems == {reasons.AMBIGUOUS: 2, reasons.UNKNOWN: 2} and not rows.valid.any()


def test_chat_content_by_bytes():
    content = recorded("openai_chat.json")["choices"][0]["logprobs"]["content"]
    words = {"start": 2, "k": 3, "vocab_size": 8, "strings": strings()}
    rows = openai_chat_rows(content, [5, 4, 2, 3], **words)
    assert rows.valid.tolist() == [False, True, True, False] and not rows.problems
    assert rows.topk.ids[1].tolist() == [0, 1, 6] and rows.topk.token_log_probs[1].exp() == pytest.approx(0.05)
    with pytest.raises(ValueError, match="token 2, the sequence has 6"):
        openai_chat_rows(content, [5, 4, 6, 3], **words)
    with pytest.raises(ValueError, match="2 entries of content"):
        openai_chat_rows(content, [5, 4, 2], **words)


def test_the_form_of_the_strings_is_the_servers():
    """decode([id]), bytes and the vocabulary's spelling differ in SentencePiece's space and in partial characters."""
    tokenizer = row_server.ascii_tokenizer(extra=("Ã", "©"))
    found = TokenStrings.from_tokenizer(tokenizer, VOCAB)
    ids = tokenizer("tea and toast")["input_ids"]
    assert len(tokenizer) == VOCAB
    assert found.form([tokenizer.decode([i]) for i in ids], ids) == "decoded"
    assert found.form(tokenizer.convert_ids_to_tokens(ids), ids) == "pieces"
    assert found.form([f"token_id:{i}" for i in ids], ids) == "decoded"
    halves = tokenizer.convert_tokens_to_ids(["Ã", "©"])
    assert tokenizer.decode(halves) == "é"
    own = tokenizer.convert_tokens_to_ids("te")
    assert found.id("\ufffd", "decoded") == -2 and found.id("te", "decoded") == own == found.id_of_bytes([116, 101])
    with pytest.raises(ValueError, match="another tokenizer"):
        found.form(["tea"], ids[:1])


# ---- columns of data sets ----


def columns(lp, tokens, k, *, predicts, renormalised=False):
    values, ids = lp.topk(k)
    if renormalised:
        values = values.log_softmax(-1)
    mask = torch.ones(len(tokens), k, dtype=torch.int64)
    if predicts == "this":  # row 0 is about the first token, of which nothing is known
        values, ids = values.roll(1, 0), ids.roll(1, 0)
        values[0], mask[0] = -math.inf, 0
    parts = zip(("target_logprobs", "target_token_ids", "target_mask"), (values, ids, mask), strict=True)
    return {"input_ids": list(tokens), **{name: x.tolist() for name, x in parts}}


def test_columns_say_what_they_are(model):
    tokens = torch.arange(3, 15).tolist()
    lp = row_server.log_probs(model, tokens)
    exact = ps.topk(lp, 5)
    words = {"mass": "full", "vocab_size": VOCAB}
    this = axolotl_rows(columns(lp, tokens, 5, predicts="this"), predicts="this", **words)
    following = axolotl_rows(columns(lp, tokens, 5, predicts="next"), predicts="next", **words)
    assert this.valid.tolist() == [True] * 11 + [False] and following.valid.all()
    for rows in (this, following):
        assert (rows.topk.ids[:-1] == exact.ids[:-1]).all()
        torch.testing.assert_close(rows.topk.log_rest[:-1], exact.log_rest[:-1], atol=1e-5, rtol=1e-5)
    scaled = columns(lp, tokens, 5, predicts="next", renormalised=True)
    rows = axolotl_rows(scaled, predicts="next", mass="renormalised", vocab_size=VOCAB)
    assert (rows.topk.log_rest == -math.inf).all()
    with pytest.raises(ValueError, match="renormalised"):
        axolotl_rows(scaled, predicts="next", **words)
    with pytest.raises(ValueError, match="not renormalised"):
        axolotl_rows(columns(lp, tokens, 5, predicts="next"), predicts="next", mass="renormalised", vocab_size=VOCAB)
    with pytest.raises(ValueError, match="predicts is one of next, this"):
        axolotl_rows(scaled, predicts="labels", **words)
    with pytest.raises(ValueError, match="no column 'target_logprobs'"):
        axolotl_rows({"input_ids": tokens, "target_token_ids": []}, predicts="next", **words)


def trl_columns(lp, tokens, prompt, k):
    """As TRL's client formats a completion: sorted by rank, cut to k, the realised token only where it is inside."""
    out = {"logprobs": [], "logprob_token_ids": [], "actual_logprobs": [], "actual_token_ids": []}
    for row, token in zip(lp[prompt - 1 : -1], tokens[prompt:], strict=True):
        values, ids = row.topk(k)
        out["logprobs"].append(values.tolist())
        out["logprob_token_ids"].append(ids.tolist())
        out["actual_logprobs"].append([row[token].item()])
        out["actual_token_ids"].append([token])
    return out


# ---- self-distillation ----


@pytest.fixture(scope="module")
def model():
    return row_server.tiny_llama()


def adapters(lp, tokens, k):
    words = {"k": k, "vocab_size": VOCAB}
    yield "vllm", vllm_answer(row_server.vllm_body(lp, tokens, k), tokens, **words)
    yield "vllm flat", vllm_answer(row_server.vllm_body(lp, tokens, k, flat=True), tokens, **words)
    yield "sglang", sglang_answer(row_server.sglang_body(lp, tokens, k), tokens, **words)
    tokenizer = row_server.ascii_tokenizer()
    found = TokenStrings.from_tokenizer(tokenizer)
    yield "openai", openai_answer(row_server.openai_body(lp, tokens, k, tokenizer), tokens, strings=found, **words)
    for predicts in ("this", "next"):
        made = columns(lp, tokens, k, predicts=predicts)
        yield f"axolotl {predicts}", axolotl_rows(made, predicts=predicts, mass="full", vocab_size=VOCAB)
    yield "trl", trl_rows(trl_columns(lp, tokens, 4, k), tokens, prompt_length=4, **words)


@pytest.mark.parametrize("k", [16, VOCAB])
def test_self_distillation_is_zero_through_every_adapter(model, k):
    tokens = np.random.default_rng(1).integers(0, VOCAB, 40).tolist()
    lp = row_server.log_probs(model, tokens)
    with torch.no_grad():
        hidden = model.model(torch.tensor([tokens])).last_hidden_state[0]
    names = []
    for name, rows in adapters(lp, tokens, k):
        names.append(name)
        assert not rows.problems, (name, rows.problems)

        def loss(topk, at):
            return ps.linear_distill_loss(
                hidden[at], ps.Head.from_model(model), topk[at], divergence="forward_kl"
            ).item()

        at = rows.valid.clone()
        at[-1] = False
        assert abs(loss(rows.topk, at)) < 1e-6, name
        shifted = rows.topk._map(lambda x: x.roll(1, 0))
        assert loss(shifted, at & at.roll(1)) > 0.05, name
    assert len(names) == 7


def test_the_snippet_of_the_docs_runs(monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    (snippet,) = re.findall(r"```python\n(.*?)```", (root / "docs" / "servers.md").read_text(), re.S)
    exec(snippet, {})
