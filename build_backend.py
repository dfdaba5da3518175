"""The build backend: setup.py compiles csrc/ in place, then maturin builds _rust and packs one wheel."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import maturin


def _need_cargo() -> None:
    if shutil.which("cargo") is None:
        sys.exit("potstill: building needs Rust; `cargo` is not on PATH. Install Rust (rustup) and build again.")


def _build_native() -> None:
    _need_cargo()
    for stale in Path("python/potstill").glob("_c*.so"):
        stale.unlink()
    if subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"]).returncode:
        sys.exit("potstill: the C++ extension was not built; the reason stands above.")


def build_wheel(directory: str, settings: Any = None, metadata: str | None = None) -> str:
    _build_native()
    return maturin.build_wheel(directory, settings, metadata)


def build_editable(directory: str, settings: Any = None, metadata: str | None = None) -> str:
    _build_native()
    return maturin.build_editable(directory, settings, metadata)


def build_sdist(directory: str, settings: Any = None) -> str:
    _need_cargo()
    return maturin.build_sdist(directory, settings)


def prepare_metadata_for_build_wheel(directory: str, settings: Any = None) -> str:
    _need_cargo()
    return maturin.prepare_metadata_for_build_wheel(directory, settings)


prepare_metadata_for_build_editable = prepare_metadata_for_build_wheel
