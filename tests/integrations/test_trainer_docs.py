"""The snippets of docs/trainers.md run as they stand, in one process, with what the page says is at hand."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from .. import tiny_model
from .conftest import VOCAB, needs_packing, tiny_llama

PACKING_REFUSED = needs_packing.args[0]
PAGE = (Path(__file__).parents[2] / "docs" / "trainers.md").read_text()
TITLED = re.compile(r"^## (.*?)\n(.*?)(?=^## |\Z)", re.M | re.S)
SNIPPETS = [
    (title, code) for title, text in TITLED.findall(PAGE) for code in re.findall(r"```python\n(.*?)```", text, re.S)
]


@pytest.mark.parametrize("title, source", SNIPPETS, ids=[title for title, _ in SNIPPETS])
def test_a_recipe_runs(title, source, cache, sequences, tokenizer, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    if "Flattening" in source and PACKING_REFUSED:
        pytest.skip("packed rows are refused before transformers 4.53")
    if "trl" in source:
        gkd = pytest.importorskip("trl.experimental.gkd")
        from trl.trainer import distillation_trainer

        # the page replaces these for good
        monkeypatch.setattr(gkd.GKDTrainer, "generalized_jsd_loss", gkd.GKDTrainer.__dict__["generalized_jsd_loss"])
        monkeypatch.setattr(
            distillation_trainer, "_chunked_divergence_loss", distillation_trainer._chunked_divergence_loss
        )
    shutil.copytree(cache.path, tmp_path / "teacher-cache")
    monkeypatch.chdir(tmp_path)
    rows = [t.tolist() for t in sequences.values()]
    given = {
        "student": tiny_llama(5), "tokenizer": tokenizer,
        "teacher": tiny_model.tiny_llama(7, vocab_size=VOCAB + 20, hidden_size=48),
        "dataset": datasets.Dataset.from_dict({"input_ids": rows, "labels": rows}),
    }  # fmt: skip
    exec(compile(source, f"docs/trainers.md: {title}", "exec"), given)


def test_every_recipe_is_short():
    assert len(SNIPPETS) == 6
    for title, source in SNIPPETS:
        statements = re.findall(r"^(?!import |from |class |    |\)|#)\S", source, re.M)
        assert len(statements) <= 6, f"{title} takes {len(statements)} statements"
