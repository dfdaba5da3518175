"""The scripts in examples/ run as they stand, on a tiny student and a tiny cache, and learn."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from .conftest import tiny_llama

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("student")
    tiny_llama(seed=5).save_pretrained(where)
    return where


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(script, cache, folder, monkeypatch, tmp_path):
    if script.stem == "lightning_module":
        pytest.importorskip("pytorch_lightning")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def last_loss(steps):
        monkeypatch.setattr(sys, "argv", [script.name, cache.path, str(folder), "--steps", str(steps)])
        return runpy.run_path(str(script), run_name="__main__")["last_loss"]

    assert last_loss(12) < 0.98 * last_loss(1)


def test_examples_are_short():
    assert len(EXAMPLES) == 3
    for script in EXAMPLES:
        assert len(script.read_text().splitlines()) < 60, script.name
