"""`potstill score`: a cache's sums are the model's log-probabilities; selection over two caches is a global sort."""

from __future__ import annotations

import re

import numpy as np
import potstill as ps
import pytest
import torch
from click.testing import CliRunner
from potstill.capture import Document, build
from potstill.cli import main
from potstill.methods import preference, scoring

from ..capture.conftest import byte_tokenizer
from ..tiny_model import tiny_llama


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models with one tokenizer, a text, and its scores under both by the command line."""
    root = tmp_path_factory.mktemp("score")
    (root / "text").mkdir()
    for i in range(9):
        (root / "text" / f"{i}.txt").write_text(f"text {i} " * (i + 1) + "été")
    (root / "text" / "one.txt").write_text("x")
    models = {name: tiny_llama(seed, initializer_range=0.4) for name, seed in (("teacher", 1), ("reference", 2))}
    said = {}
    for name, model in models.items():
        model.save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
        words = ["score", name, "text", f"{name}-scores", "--length", "24", "--split", "--quiet", "--batch-size", "3"]
        words[1:4] = [str(root / w) for w in words[1:4]]
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 0, done.output
        said[name] = done.output
    return root, models, said


def expected_scores(model, cache):
    scores = []
    for key in cache.keys():
        ids = torch.from_numpy(cache.tokens(key).astype(np.int64))
        with torch.no_grad():
            lp = model(ids[None]).logits[0].double().log_softmax(-1)
        scores.append(lp[:-1].gather(1, ids[1:, None])[:, 0])
    return scores


def test_scores_are_the_models_log_probabilities(folders):
    root, models, said = folders
    for name, model in models.items():
        cache = ps.cache.open(root / f"{name}-scores")
        assert cache.spec.token_log_probs and cache.spec.k == 0 and cache.verify().ok
        expected = expected_scores(model, cache)
        np.testing.assert_allclose(scoring.sequence_scores(cache), [float(s.sum()) for s in expected], rtol=2e-5)
        means = [float(s.mean()) if len(s) else 0.0 for s in expected]
        np.testing.assert_allclose(scoring.sequence_scores(cache, reduction="mean"), means, rtol=2e-5)
        short = [key for key in cache.keys() if cache.length(key) == 1]
        assert short and scoring.sequence_scores(cache, short).tolist() == [0.0] * len(short)
        total = torch.cat(expected)
        printed = re.search(r"(-[\d.]+) nats each, perplexity ([\d.,]+)", said[name]).groups()
        nats, perplexity = (float(number.replace(",", "")) for number in printed)
        assert nats == pytest.approx(float(total.mean()), abs=1e-3)
        assert perplexity == pytest.approx(float((-total.mean()).exp()), rel=1e-3)
        key = max(cache.keys(), key=cache.length)
        ids = torch.from_numpy(cache.tokens(key).astype(np.int64))
        hidden = model.model(ids[None]).last_hidden_state[:, :-1]
        live = preference.sequence_logprobs(hidden, ps.Head.from_model(model), ids[None, 1:])
        assert live.item() == pytest.approx(scoring.sequence_scores(cache, [key])[0], rel=1e-5)


def test_kept_keys_are_those_of_a_global_sort(folders, monkeypatch):
    monkeypatch.setattr(scoring, "BLOCK", 4)
    root, models, _ = folders
    teacher, reference = (ps.cache.open(root / f"{name}-scores") for name in ("teacher", "reference"))
    difference = scoring.ScoreDifference(teacher, reference)
    by_key = dict(zip(reference.keys(), expected_scores(models["reference"], reference), strict=True))
    expected = []
    for key, t in zip(teacher.keys(), expected_scores(models["teacher"], teacher), strict=True):
        expected.append(float((t - by_key[key]).mean()) if len(t) else 0.0)
    blocks = list(difference.blocks())
    assert len(blocks) == -(-len(teacher) // 4)
    np.testing.assert_allclose(np.concatenate(blocks), expected, rtol=1e-4, atol=1e-6)
    best = np.argsort(-np.concatenate(blocks), kind="stable")[: -(-len(teacher) // 2)]
    assert list(difference.kept(0.5)) == [key for i, key in enumerate(teacher.keys()) if i in best]


def test_refusals(folders, tmp_path):
    root, models, _ = folders
    build(models["teacher"], byte_tokenizer(), [Document("a", "some text")], tmp_path / "plain", k=2)
    plain = ps.cache.open(tmp_path / "plain")
    with pytest.raises(ValueError, match="potstill score"):
        scoring.sequence_scores(plain)
    with pytest.raises(ValueError, match="has no sequence"):
        scoring.ScoreDifference(ps.cache.open(root / "teacher-scores"), plain)
