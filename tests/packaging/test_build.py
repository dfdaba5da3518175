"""Building: a missing tool stops it with a sentence that says what to install; versions agree."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import potstill
import pytest
import setuptools


def run(
    code: list[str], cwd: Path, path: Path, python: Path | str = sys.executable, **env: str
) -> subprocess.CompletedProcess[str]:
    """Python with nothing on PATH but what the folder `path` holds."""
    clean = {k: v for k, v in os.environ.items() if k not in ("CXX", "CUDA_HOME", "CUDA_PATH", "POTSTILL_CUDA")}
    full = {**clean, "PATH": str(path), **env}
    return subprocess.run([python, *code], cwd=cwd, env=full, capture_output=True, text=True)


def test_a_missing_compiler_stops_the_build(tree, tmp_path):
    done = run(["setup.py", "build_ext", "--inplace"], tree, tmp_path / "empty", POTSTILL_CUDA="0")
    assert done.returncode == 1
    assert "needs a C++17 compiler" in done.stderr and "apt-get install g++" in done.stderr
    assert "Traceback" not in done.stderr
    named = run(["setup.py", "build_ext"], tree, tmp_path / "empty", CXX="icpx -O1", POTSTILL_CUDA="0")
    assert named.returncode == 1 and "CXX=icpx is not there" in named.stderr


def test_a_missing_rust_stops_every_way_to_build(tree, tmp_path):
    for hook in ("prepare_metadata_for_build_wheel", "build_wheel", "build_editable", "build_sdist"):
        code = f"import build_backend; build_backend.{hook}({str(tmp_path)!r})"
        done = run(["-c", code], tree, tmp_path / "empty")
        assert done.returncode == 1
        assert "needs Rust" in done.stderr and "Install Rust" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def bare(tmp_path):
    """(python, PYTHONPATH) with setuptools and pybind11, but no toolkit in its site-packages."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    lib = tmp_path / "lib"
    lib.mkdir()
    site = Path(setuptools.__file__).parents[1]
    for name in ("setuptools", "_distutils_hack", "pybind11"):
        (lib / name).symlink_to(site / name)
    return tmp_path / "bare/bin/python", str(lib)


@pytest.mark.skipif(Path("/usr/local/cuda/bin/nvcc").exists(), reason="this machine has a CUDA toolkit")
def test_a_demanded_cuda_that_is_not_there_stops_the_build(tree, tmp_path, bare):
    python, lib = bare
    (tree / "csrc/any.cu").touch()
    done = run(["setup.py", "build_ext"], tree, tmp_path / "empty", python, POTSTILL_CUDA="1", PYTHONPATH=lib)
    assert done.returncode == 1
    assert "no CUDA toolkit was found" in done.stderr and "pip install 'cuda-toolkit[nvcc" in done.stderr


@pytest.mark.skipif(Path("/usr/local/cuda/bin/nvcc").exists(), reason="this machine has a CUDA toolkit")
@pytest.mark.parametrize("wish", ["", "1"])
def test_a_lone_nvcc_is_taken_only_where_cuda_is_demanded(tree, tmp_path, bare, wish):
    python, lib = bare
    (tree / "csrc/any.cu").touch()
    wrapper = tmp_path / "toolkit/bin/nvcc"  # no cicc beside it: perhaps a wrapper of a whole toolkit, perhaps a stub
    wrapper.parent.mkdir(parents=True)
    wrapper.write_text("#!/bin/sh\n")
    wrapper.chmod(0o755)
    code = "import sys; sys.argv = ['setup.py', '--version']; import setup; print('found', setup.find_cuda())"
    done = run(["-c", code], tree, wrapper.parent, python, POTSTILL_CUDA=wish, PYTHONPATH=lib)
    found = wrapper.resolve().parents[1] if wish else None
    assert f"found {found}\n" in done.stdout, done.stderr


def test_an_unknown_wish_for_cuda_stops_the_build(tree, tmp_path):
    (tree / "csrc/any.cu").touch()
    done = run(["setup.py", "build_ext"], tree, tmp_path / "empty", POTSTILL_CUDA="yes")
    assert done.returncode == 1 and "POTSTILL_CUDA='yes'" in done.stderr


def test_the_version_is_one(root):
    for file in ("pyproject.toml", "Cargo.toml"):
        found = re.search(r'^version = "(.+)"$', (root / file).read_text(), re.M)
        assert found and found[1] == potstill.__version__, file


def test_the_cuda_package_is_one(root):
    pins = [re.search(r"cuda-toolkit\[\S+?\]==[\d.]+", (root / f).read_text()) for f in ("setup.py", "Makefile")]
    assert pins[0] and pins[1] and pins[0][0] == pins[1][0]
