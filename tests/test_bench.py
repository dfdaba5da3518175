"""The benchmark measures what it says, and refuses to time what is wrong."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from click.testing import CliRunner
from potstill.bench import losses, run, topk
from potstill.bench.command import bench
from potstill.bench.measure import in_turns, peak_in_process
from potstill.teachers import TopK


@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_the_rivals_compute_the_same(form):
    sparse = form == "sparse"
    calls = losses.variants(form, rows=33, hidden=16, teacher_hidden=24, vocab=700, gather_first=sparse)
    calls.pop("floor")
    values = [call() for call in calls.values()]
    assert len(values) == (3 if sparse else 2)
    assert values == pytest.approx([values[0]] * len(values), rel=1e-5)


def test_memory_is_measured_where_it_is_known():
    """Eager holds at least its logits and their gradient; the fused loss never a [rows, vocab] matrix."""
    shape = dict(form="sparse", rows=2048, hidden=16, teacher_hidden=0, vocab=16_384)
    matrix = 4 * 2048 * 16_384
    peaks = {
        which: peak_in_process("potstill.bench.losses:variants", {**shape, "choose": which}, 1)
        for which in ("potstill", "eager")
    }
    assert peaks["eager"] > 2 * matrix
    assert 256 * 16_384 * 4 < peaks["potstill"] < matrix / 2


def test_variants_take_turns():
    order: list[str] = []
    seconds = in_turns({name: lambda name=name: order.append(name) for name in "ab"}, repeats=3, warm_up=1)
    assert "".join(order) == "baabbaab" and all(len(s) == 3 for s in seconds.values())


def test_a_wrong_variant_is_not_timed(monkeypatch):
    monkeypatch.setattr(losses, "eager_sparse", lambda *a: torch.tensor(3.0, requires_grad=True))
    with pytest.raises(AssertionError, match="nothing was timed"):
        run.loss_rows("case", "sparse", 8, 4, 0, 100, repeats=1, compiled=False)
    monkeypatch.setattr(topk, "topk", lambda x, k: TopK(x[:, :k].int(), x[:, :k]))
    with pytest.raises(AssertionError, match="differs"):
        topk.check(torch.randn(2, 100), 3)


def test_smoke_writes_csv_and_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(topk, "CASES", [(torch.bfloat16, 2, 4000, 16, "gaussian")])
    done = CliRunner().invoke(bench, ["all", "--smoke", "--out", str(tmp_path), "--cache", str(tmp_path / "no")])
    assert done.exit_code == 0, done.output
    assert "skipped" in done.output and "| loss, forward + backward" in done.output
    rows = list(csv.DictReader(open(tmp_path / "losses.csv")))
    assert {r["variant"] for r in rows} == {"potstill", "eager"} and all(float(r["seconds"]) > 0 for r in rows)
    assert json.loads((tmp_path / "bench.json").read_text())["machine"]["torch"] == torch.__version__


def test_docs_are_written_between_the_marks(tmp_path):
    (tmp_path / "docs").mkdir()
    for file in (tmp_path / "README.md", tmp_path / "docs" / "performance.md"):
        file.write_text(f"before\n{run.MARK[0]}\nold\n{run.MARK[1]}\nafter\n")
    machine = dict(cpu="x", cores=2, capability="y", torch="2", potstill="0")
    run.write_docs({"machine": machine, "losses": [], "topk": [], "cache": []}, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before") and text.endswith("after\n") and "Made on x" in text and "old" not in text
    (tmp_path / "README.md").write_text("no marks")
    with pytest.raises(ValueError, match="README"):
        run.write_docs({"machine": machine, "losses": [], "topk": [], "cache": []}, tmp_path)
