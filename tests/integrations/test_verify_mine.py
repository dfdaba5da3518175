"""A cache from a stranger: one command says whether it is whole, whose it says it is, and whether it is mine."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from potstill import cache
from potstill.capture.models import tokenizer_hash
from potstill.cli import main

from .conftest import tiny_tokenizer


def rows(length):
    ids = np.tile(np.arange(4, dtype=np.int32), (length, 1))
    log_probs = np.log(np.tile(np.array([0.4, 0.3, 0.1, 0.05], np.float32), (length, 1)))
    return SimpleNamespace(ids=ids, log_probs=log_probs, log_rest=np.log(np.full(length, 0.15, np.float32)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """own and other: tokenizers; theirs: a cache over `own`; silent: one that says nothing."""
    root = tmp_path_factory.mktemp("mine")
    tiny_tokenizer().save_pretrained(root / "own")
    tiny_tokenizer(changed="other").save_pretrained(root / "other")
    theirs = cache.Spec(vocab_size=100, k=4, teacher="org/teacher", tokenizer=tokenizer_hash(tiny_tokenizer()))
    for name, spec in (("theirs", theirs), ("silent", cache.Spec(vocab_size=100, k=4))):
        with cache.Writer(root / name, spec) as writer:
            writer.add("a", np.arange(6), rows(6))
    return root


def verify(*arguments):
    return CliRunner().invoke(main, ["verify", "--deep", *map(str, arguments)])


def test_it_is_mine(folder):
    done = verify(folder / "theirs", "--tokenizer", folder / "own", "--teacher", "org/teacher")
    assert done.exit_code == 0, done.output
    assert "whole: 1 sequences" in done.output and "teacher: org/teacher" in done.output and "yours" in done.output


def test_it_is_whole_and_not_mine(folder):
    done = verify(folder / "theirs", "--tokenizer", folder / "other", "--teacher", "org/another")
    assert done.exit_code == 1
    assert "built with the tokenizer 'blake2b:" in done.output and "'org/another' is expected" in done.output
    assert "whole: 1 sequences" in done.output and "not yours" in done.output
    told = json.loads(verify(folder / "theirs", "--teacher", "org/another", "--json").output)
    assert told["ok"] is False and told["says"]["teacher"] == "org/teacher" and len(told["problems"]) == 1


def test_it_does_not_say_whose_it_is(folder):
    done = verify(folder / "silent", "--tokenizer", folder / "own")
    assert done.exit_code == 1 and "does not say which tokenizer" in done.output
    assert "tokenizer: not said" in verify(folder / "silent").output


def test_a_tokenizer_that_is_not_there_costs_only_its_own_answer(folder):
    done = verify(folder / "theirs", "--tokenizer", folder / "nowhere")
    assert done.exit_code == 1 and "whole: 1 sequences" in done.output and "does not exist: MODEL is" in done.output
