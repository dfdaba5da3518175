"""The miniatures run and write what they say; their directions are asked for in the nightly leg alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples" / "methods"
NAMES = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem not in ("common", "plots", "run_all"))


@pytest.mark.parametrize("name", NAMES)
def test_every_miniature_runs(name, load, tmp_path, capsys):
    found = load(name).main(["--smoke", "--out", str(tmp_path)])
    assert json.loads((tmp_path / f"{name}.json").read_text()) == json.loads(json.dumps(found))
    assert (tmp_path / f"{name}.png").stat().st_size > 5_000
    assert all(mean == mean for mean, _ in found["figures"].values()), "a figure is NaN"
    said = capsys.readouterr().out
    assert found["claim"] in said and all(figure in said for figure in found["figures"])


def test_the_language_is_drawn_as_it_says(load):
    common = load("common")
    source = common.Source(3, vocab=8, order=2)
    prompt = torch.tensor([[5, 1, 2]]).expand(20_000, -1)
    drawn = common.draw(source, len(prompt), 1, seed=0, prompts=prompt)[:, 3]
    p = source.logits(prompt[0]).exp()
    share = torch.bincount(drawn, minlength=8) / len(prompt)
    assert p.sum().item() == pytest.approx(1, abs=1e-6)
    assert ((share - p).abs() < 4 * (p * (1 - p) / len(prompt)).sqrt()).all()
    contexts, following = common.windows(torch.tensor([[1, 2, 3, 4, 5]]))
    assert contexts.tolist() == [[1, 2, 3], [2, 3, 4]] and following.tolist() == [4, 5]


def test_the_page_is_what_its_command_writes(load, tmp_path):
    run_all = load("run_all")
    assert sorted(run_all.NAMES) == NAMES
    docs = FOLDER.parents[1] / "docs"
    (tmp_path / "methods.md").write_text((docs / "methods.md").read_text())
    run_all.main(["--write-docs", "--docs", str(tmp_path)])
    page = (docs / "methods-miniatures.md").read_text()
    for name in ("methods-miniatures.md", "methods.md"):
        assert (tmp_path / name).read_text() == (docs / name).read_text(), "run: run_all.py --write-docs"
    for result in (FOLDER / "results").glob("*.json"):
        found = json.loads(result.read_text())
        assert found["sentence"] in page and not found["smoke"]
        assert (FOLDER.parents[1] / "docs" / "methods" / f"{found['name']}.png").is_file()


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in NAMES if (FOLDER / "results" / f"{name}.json").exists()])
def test_the_printed_direction_is_found_again(name, load, tmp_path):
    kept = json.loads((FOLDER / "results" / f"{name}.json").read_text())
    assert load(name).main(["--out", str(tmp_path)])["shows"] == kept["shows"]
