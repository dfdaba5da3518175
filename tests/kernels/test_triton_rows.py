"""Runs interpreted/ in Triton's interpreter, in a new process: it is chosen before Triton is imported."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
OTHERS = ("test_every_divergence", "banned_tokens", "test_topk")
PARTS = (*OTHERS, " and ".join(f"not {part}" for part in OTHERS))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("part", PARTS)
def test_kernels_in_the_interpreter(part):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-rs", "-p", "no:xdist"]
    command += ["-p", "no:cacheprovider"]
    command += ["-m", "not gpu", "-k", f"({part}) and not on-host", str(HERE / "interpreted")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parent.parent)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    *lines, summary = done.stdout.strip().splitlines()
    left_out = [
        line for line in lines if line.startswith("SKIPPED") and "Triton 3.2 has no one-bit constants" not in line
    ]
    assert " passed" in summary and not left_out, done.stdout[-2000:]


def test_without_triton_it_refuses_with_a_sentence():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "import torch\n"
        "from potstill.dispatch import Facts, explain, select\n"
        "facts = Facts('dense_rows', torch.device('cpu'), torch.float32)\n"
        "assert 'Triton is not installed' in dict(explain(facts))['triton']\n"
        "assert select(facts).backend != 'triton'\n"
    )
    path = os.pathsep.join(filter(None, [str(HERE.parent.parent / "python"), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
