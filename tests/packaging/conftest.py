"""Fixtures of the packaging tests: the source tree, and a copy of it that a test may build in."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TREE = ("csrc", "rust", "python", "Cargo.toml", "Cargo.lock", "LICENSE", "README.md", "constraints.txt")
BUILD = ("pyproject.toml", "setup.py", "build_backend.py")


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a build reads, without what earlier builds left."""
    copy = tmp_path / "tree"
    copy.mkdir()
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "target")
    for name in TREE + BUILD:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=ignore)
        else:
            shutil.copy(source, copy / name)
    return copy
