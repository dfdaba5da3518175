"""What the disk refuses: every system call of a writer fails once, and nothing that was committed is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
COMPILER = shutil.which("cc") or shutil.which("gcc")


@pytest.mark.skipif(not sys.platform.startswith("linux") or COMPILER is None, reason="needs Linux and a C compiler")
def test_every_failing_call_is_a_clean_error(tmp_path):
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path  # a thousand syncs need no disk
    shim = tmp_path / "faults.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", shim, HERE / "faults.c", "-ldl"], check=True)
    with tempfile.TemporaryDirectory(dir=memory) as root:
        done = subprocess.run(
            [sys.executable, HERE / "faulty.py", root],
            env={**os.environ, "LD_PRELOAD": str(shim), "OPENBLAS_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    failed = {(kind, int(code)): int(count) for kind, code, count in map(str.split, done.stdout.splitlines())}
    kinds = {kind for kind, _ in failed}
    assert kinds == {"write", "short", "fsync", "rename", "link", "open", "truncate", "read"}
    assert min(failed.values()) >= 3 and sum(failed.values()) > 60, failed
