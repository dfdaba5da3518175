"""One package by every road: sdist -> wheel, editable, uv pip install. Needs the package registries."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
UV = [sys.executable, "-m", "uv"]
PROBE = (
    "import sys, potstill; from potstill import _cpp, _rust; "
    "assert 'torch' not in sys.modules; print(potstill.__file__, _cpp.__file__, _rust.__file__)"
)


def call(*command: object, cwd: Path | None = None) -> str:
    environment = {**os.environ, "POTSTILL_CUDA": "0", "POTSTILL_ISAS": "base"}  # one unit a source is enough
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def environment(folder: Path) -> Path:
    """A new environment that borrows all but potstill from this one; returns its python."""
    call(*UV, "venv", "--python", sys.executable, folder)
    python = folder / "bin/python"
    site = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def check(python: Path, away: Path) -> str:
    """Both extensions load and the doctor is content, run from a folder away from any source."""
    where = call(python, "-c", PROBE, cwd=away)
    assert "all is well" in call(python, "-m", "potstill.cli", "doctor", cwd=away)
    return where


def test_every_road_gives_one_package(tree, tmp_path):
    out = tmp_path / "out"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")

    # the sdist holds what a build needs, and nothing that was built
    code = f"import build_backend; build_backend.build_sdist({str(out)!r})"
    out.mkdir()
    call(sys.executable, "-c", code, cwd=tree)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path / "sdist", filter="data")
    for name in ("setup.py", "build_backend.py", "pyproject.toml", "Cargo.toml", "Cargo.lock", "LICENSE"):
        assert name in names
    for folder in ("csrc", "rust"):
        wanted = {str(f.relative_to(tree)) for f in (tree / folder).rglob("*") if f.is_file()}
        wanted = {name for name in wanted if not name.startswith("rust/fuzz/")}  # a workspace of its own
        assert {name for name in wanted if "/src/" in name or folder == "csrc"} <= names
    assert not [name for name in names if name.endswith(".so")]

    # sdist -> wheel by pip, in isolation without torch
    (source,) = (tmp_path / "sdist").iterdir()
    call(*PIP, "wheel", "-q", "--no-deps", "-w", out, source)
    (wheel,) = out.glob("*.whl")
    assert {f"potstill/_cpp{suffix}", f"potstill/_rust{suffix}", "potstill/py.typed"} <= contents(wheel)
    assert sum(name.endswith(".so") for name in contents(wheel)) == 2
    assert [name for name in contents(wheel) if name.endswith(".cyclonedx.json")], "a bill of materials of the crates"
    python = environment(tmp_path / "from-wheel")
    call(*UV, "pip", "install", "--python", python, "--no-deps", wheel)
    assert str(tmp_path / "from-wheel") in check(python, tmp_path)

    # editable, and a wheel from the same tree after it
    python = environment(tmp_path / "editable")
    call(*UV, "pip", "install", "--python", python, "--no-deps", "-e", source)
    assert str(source / "python") in check(python, tmp_path)
    again = tmp_path / "again"
    call(*PIP, "wheel", "-q", "--no-deps", "-w", again, source)
    assert contents(next(again.glob("*.whl"))) == contents(wheel)

    # uv pip install from the source
    python = environment(tmp_path / "by-uv")
    call(*UV, "pip", "install", "--python", python, "--no-deps", source)
    assert str(tmp_path / "by-uv") in check(python, tmp_path)
