"""Rows 54 to 70, weighted cross-entropy, and the catalog: all 77 rows, their docs and their docstrings."""

from __future__ import annotations

import json
import re
from pathlib import Path

import potstill as ps
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from potstill.cli import main
from potstill.methods import papers
from potstill.methods.command import BEGIN, END, markdown
from potstill.methods.recipes import text

from . import test_rows_embeddings, test_rows_encoders, test_rows_layers, test_rows_preferences, test_rows_tokens
from .world import B, Case, H, World, ce, mean, row_tests

ROOT = Path(__file__).parents[2]
VOTES = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
RATIONALE = torch.tensor([True, False, False, True, True, False])


def traced(w):
    return w.t_hidden @ w.constant(w.t_hidden.shape[-1], H, name="traced")


def weighted(w, weights):
    rows = weights * ce(w.z, w.labels)
    return rows[w.keep].sum() / (weights * w.keep).sum()


CASES = {
    "54 to 68": Case(
        lambda w: text.weighted_text(w.hidden, w.weight, w.labels, VOTES.to(w.dtype)),
        lambda w: weighted(w, VOTES.to(w.dtype)[:, None]),
    ),
    "54 to 68, by token": Case(
        lambda w: text.weighted_text(w.hidden, w.weight, w.labels, w.constant(B, 8, name="weights").abs()),
        lambda w: weighted(w, w.constant(B, 8, name="weights").abs()),
    ),
    "69": Case(
        lambda w: text.labels_and_rationales(w.hidden, w.weight, w.labels, RATIONALE, alpha=0.3),
        lambda w: 0.3 * mean(ce(w.z, w.labels), w.keep & ~RATIONALE[:, None])
        + 0.7 * mean(ce(w.z, w.labels), w.keep & RATIONALE[:, None]),
    ),
    "70, text": Case(
        lambda w: text.traces(w.hidden, w.weight, w.labels), lambda w: mean(ce(w.z, w.labels), w.keep)
    ),
    "70, states": Case(
        lambda w: text.traces(w.hidden, w.weight, w.labels, traced_hidden=traced(w), hidden_weight=0.5),
        lambda w: mean(ce(w.z, w.labels), w.keep) + 0.5 * F.mse_loss(w.hidden[w.keep], traced(w)[w.keep]),
    ),
}  # fmt: skip


test_value_and_gradient, test_lower_precision, test_the_loss_falls = row_tests(CASES)


def test_an_example_of_weight_0_has_exactly_no_gradient():
    w = World(torch.float32, {})
    w.layers[-1] = w.layers[-1].detach().requires_grad_()
    (grad,) = torch.autograd.grad(text.weighted_text(w.hidden, w.weight, w.labels, VOTES), w.hidden)
    assert (grad[VOTES == 0] == 0).all() and (grad[VOTES == 1].abs().sum((1, 2)) > 0).all()


def test_69_learning_rationales_lowers_the_loss_of_labels():
    """Two prefixes, one model: steps on the rationale task alone, through the same tokens, move the labels."""
    w = World(torch.float32, {})

    def label_loss():
        w.refresh()
        return mean(ce(w.z, w.labels), w.keep & ~RATIONALE[:, None])

    w.tokens[RATIONALE] = w.tokens[~RATIONALE]  # the rationales lead through the same tokens
    w.labels[RATIONALE] = w.labels[~RATIONALE]
    before = label_loss().item()
    for _ in range(5):
        w.refresh()
        w.step(text.labels_and_rationales(w.hidden, w.weight, w.labels, RATIONALE, alpha=0.0))
    assert label_loss().item() < before


def test_the_catalog_has_77_rows_of_which_70_run():
    rows = ps.methods.catalog()
    assert [r.number for r in rows] == list(range(1, 78))
    assert papers.counts() == {
        "rows": 77, "runnable": 70, "whole": sum(r.status == "whole" for r in rows),
        "part": sum(r.status == "part" for r in rows), "out of scope": 7,
    }  # fmt: skip
    for r in rows:
        assert r.paper and r.source and r.formula and (r.calls or r.note), r
        assert r.status == "whole" or r.note, f"row {r.number} is in part or out of scope and does not say why"


def test_every_row_names_its_paper_by_a_number_of_its_own():
    sources = [r.source for r in ps.methods.catalog()]
    assert all(re.fullmatch(r"arXiv:\d{4}\.\d{5}", source) for source in sources), sources
    assert len(set(sources)) == 77


def test_every_runnable_row_has_a_test():
    """A case, or a test of its own, by the row's number."""
    modules = (test_rows_tokens, test_rows_layers, test_rows_encoders, test_rows_embeddings, test_rows_preferences)
    tested = set(range(54, 71))
    for module in modules:
        tested |= {int(re.match(r"\d+", name)[0]) for name in module.CASES}
        tested |= {int(m[1]) for name in vars(module) if (m := re.match(r"test_(\d\d)_", name))}
    assert {r.number for r in ps.methods.catalog() if r.runnable} <= tested


def test_docstrings_say_how_well_a_formula_is_known():
    for r in ps.methods.catalog():
        for call in r.calls:
            assert r.paper in call.__doc__ and f"Formula: {r.knowledge}." in " ".join(call.__doc__.split()), r.number


def test_calls_are_public_names():
    for r in ps.methods.catalog():
        for name, call in zip(r.names, r.calls, strict=True):
            found = ps.methods
            for part in name.split("."):
                found = getattr(found, part)
            assert found is call, name


def test_the_docs_are_those_of_the_catalog():
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert page.split(BEGIN)[1].split(END)[0].strip() == markdown(), "run: potstill methods --write-docs"


def test_the_command_prints_the_table_and_the_count(tmp_path):
    run = CliRunner().invoke(main, ["methods"])
    assert run.exit_code == 0 and "77 papers: 70 runnable" in run.output and "7 out of scope" in run.output
    assert "recipes.logits.interpolated_target" in run.output
    rows = json.loads(CliRunner().invoke(main, ["methods", "--json"]).output)
    assert len(rows) == 77 and rows[0]["calls"] == ["recipes.logits.interpolated_target"]
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert CliRunner().invoke(main, ["methods", "--write-docs", str(page)]).exit_code == 0
    assert page.read_text() == f"before\n{BEGIN}\n{markdown()}\n{END}\nafter\n"
    page.write_text("no place")
    refused = CliRunner().invoke(main, ["methods", "--write-docs", str(page)])
    assert refused.exit_code == 1 and "lacks the lines" in refused.output


def test_a_row_is_entered_once_and_whole():
    with pytest.raises(ValueError, match="row 1 is 'TAID' already"):
        papers.row(1, "Another", "none", family="A", formula="x", knowledge=papers.CODE)(lambda: None)
    with pytest.raises(ValueError, match="names none of"):
        papers.row(99, "Another", "none", family="A", formula="x", knowledge="surely")(lambda: None)
