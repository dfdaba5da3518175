"""Adding a divergence is one function and one table line: torch, C++ and Triton serve it with no kernel touched."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

NEW = '''
from torch import exp

from potstill.divergences import Parameter, divergence, times


@divergence()
def squared_hellinger(lp, lq):
    """sum (sqrt p - sqrt q)^2 / 2 = 1 - sum sqrt(p q)."""
    both = exp(0.5 * (lp + lq))
    q = exp(lq)
    return 0.5 * (exp(lp) + q) - both, 0.5 * (q - both)


@divergence(Parameter("forward", 0.25, 0.0, 1.0), centre=lambda w: 2 * w - 1)
def blended_kl(lp, lq, forward):
    """forward * KL(p || q) + (1 - forward) * KL(q || p)."""
    p = exp(lp)
    q = exp(lq)
    reverse = times(q, lq - lp)
    return forward * times(p, lp - lq) + (1 - forward) * reverse, (1 - forward) * (reverse + q) - forward * p
'''

CHECK = """
import importlib.util, sys
from pathlib import Path

import new_divergences

spec = importlib.util.spec_from_file_location("potstill._cpp", next(Path("built").rglob("_cpp*.so")))
module = importlib.util.module_from_spec(spec)
sys.modules["potstill._cpp"] = module
spec.loader.exec_module(module)
import potstill
potstill._cpp = module
import torch
import potstill as ps

torch.manual_seed(0)
v = 250
hidden, weight = torch.randn(5, 8), torch.randn(v, 8)
teacher_logits = torch.randn(5, v) * 2
for d in (new_divergences.squared_hellinger, new_divergences.blended_kl(forward=0.7)):
    for teacher in (ps.LogitsTeacher(teacher_logits), ps.topk(teacher_logits, 20)):
        results = {}
        for backend in ("oracle", "torch", "cpp", "triton"):
            dtype = torch.float64 if backend == "oracle" else torch.float32
            h, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
            words = dict(divergence=d, backend="torch" if backend == "oracle" else backend)
            linear = ps.linear_distill_loss(h, w, teacher, **words)
            grads = torch.autograd.grad(linear, (h, w))
            logits = (h @ w.T).detach().requires_grad_()
            at_hand = ps.distill_loss(logits, teacher, **words)
            results[backend] = [linear.detach(), *grads, at_hand.detach(), *torch.autograd.grad(at_hand, logits)]
        assert results["oracle"][0] > 0.01
        for backend in ("torch", "cpp", "triton"):
            for got, truth in zip(results[backend], results["oracle"]):
                torch.testing.assert_close(got.double(), truth.double(), rtol=2e-4, atol=2e-6)
    z = torch.randn(3, v, dtype=torch.float64).requires_grad_()
    lq, lp = z.log_softmax(-1), torch.randn(3, v, dtype=torch.float64).log_softmax(-1)
    dense = d.formula(lp, lq, *d.values)[0].sum()
    ours = ps.distill_loss(z, ps.LogitsTeacher(lp), divergence=d, reduction="sum", backend="cpp")
    torch.testing.assert_close(ours, dense)
    torch.testing.assert_close(torch.autograd.grad(ours, z), torch.autograd.grad(dense, z))
print("every backend agrees")
"""


@pytest.mark.slow
def test_a_new_divergence_reaches_every_backend(tmp_path):
    (tmp_path / "new_divergences.py").write_text(NEW)
    (tmp_path / "check.py").write_text(textwrap.dedent(CHECK))
    path = os.pathsep.join([str(ROOT / "python"), str(tmp_path)])
    environment = os.environ | {
        "PYTHONPATH": path,
        "POTSTILL_CSRC_INCLUDE": str(tmp_path / "spelled"),
        "POTSTILL_ISAS": "base",
    }
    environment |= {"POTSTILL_CUDA": "0", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}

    def run(*command: str, cwd: Path = tmp_path) -> str:
        done = subprocess.run([sys.executable, *command], env=environment, cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    spelled = run("-c", "import new_divergences; from potstill import spell; print(spell.cpp_source(), end='')")
    assert "squared_hellinger" in spelled and "X(blended_kl, 1)" in spelled
    (tmp_path / "spelled").mkdir()
    (tmp_path / "spelled" / "divergences.inc").write_text(spelled)
    run(
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        str(tmp_path / "built"),
        "--build-temp",
        str(tmp_path / "temp"),
        cwd=ROOT,
    )
    assert "every backend agrees" in run("check.py")


def test_a_divergence_that_is_not_compiled_in_falls_to_torch():
    code = NEW + (
        "\nimport torch, potstill as ps\n"
        "from potstill.dispatch import Facts, explain\n"
        "facts = Facts('dense_rows', torch.device('cpu'), torch.float32, divergence='squared_hellinger')\n"
        "assert 'potstill.spell' in dict(explain(facts))['cpp']\n"
        "z = torch.randn(2, 9)\n"
        "loss = ps.distill_loss(z, ps.LogitsTeacher(torch.randn(2, 9)), divergence='squared_hellinger')\n"
        "assert 0 < loss < 1\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
