"""The kernels over parts of the vocabulary, every backend on this device against the fp64 reference."""

from __future__ import annotations

import math

import pytest
import torch
from potstill import dispatch, divergences
from potstill.dispatch import Facts
from potstill.rows import RowSpec, Side

C, WIDE, R, K = 1531, 1540, 6, 40
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPS = ("part_lse", "dense_part_sums", "dense_part_grad", "sparse_part_grad")


def backends(op: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    found = [name for name, refusal in dispatch.explain(Facts(op, device, dtype)) if refusal is None]
    assert "torch" in found and (device.type != "cpu" or "cpp" in found), "build the extension first"
    return found


class Data:
    """Logits of a part, with the statistics of a whole that has more mass elsewhere; row 1 does not count."""

    def __init__(self, device: torch.device, dtype: torch.dtype, side: Side, temperature: float):
        g = torch.Generator().manual_seed(5)
        student = torch.randn(R, WIDE, generator=g) * 3
        teacher = student + torch.randn(R, WIDE, generator=g)
        if not side.softcap and side.scale > 0:
            student[:, 5] = teacher[:, 5] = teacher[:, 9] = -math.inf
        student[1] = teacher[1] = math.nan
        self.student, self.teacher = student.to(device, dtype), teacher.to(device, dtype)
        torch_lse = dispatch.select(Facts("part_lse", device, dtype), "torch").run
        self.ids = torch.randint(-C // 2, 2 * C, (R, 4 * K), generator=g)[:, :K].to(device)
        self.ids[:, :3] = torch.tensor([7, 0, C - 1])
        self.ids[2] = self.ids[2].unique()[0] - torch.arange(K, device=device)  # none in the part, or one
        elsewhere = torch.rand(R, generator=g, dtype=torch.float64).to(device) + 2.0
        x, y = self.student.double(), self.teacher.double()
        self.lse_s = torch.logaddexp(torch_lse(x, side, temperature), elsewhere)
        self.lse_t = torch.logaddexp(torch_lse(y, Side(C), temperature), elsewhere)
        self.lse_rest = torch.logaddexp(torch_lse(x, side, temperature, self.ids), elsewhere)
        self.lse_1 = torch.logaddexp(torch_lse(x, side, 1.0), elsewhere)
        self.total = -torch.rand(R, generator=g, dtype=torch.float64).to(device)
        self.weight = torch.rand(R, generator=g, dtype=torch.float64).to(device) + 0.5
        self.rest = torch.tensor([0.0, 1.0, -0.3, 0.2, -0.1, 0.0], dtype=torch.float64, device=device)
        self.outside = torch.tensor([0.0, 1.0, 0.4, -0.2, 0.0, 0.3], dtype=torch.float64, device=device)
        self.entries = torch.randn(R, K, generator=g, dtype=torch.float64).to(device)
        self.labels = torch.tensor([0, 3, -5, C - 1, C, 700], device=device)  # two of them lie elsewhere
        self.coef = (torch.rand(R, generator=g) + 0.1).double().to(device)
        self.coef[1] = 0
        self.side, self.temperature = side, temperature

    def run(self, op: str, backend: str, spec: RowSpec, dtype: torch.dtype) -> torch.Tensor:
        x, y = self.student.to(dtype), self.teacher.to(dtype)
        named = spec.divergence.name if op.startswith("dense") else None
        run = dispatch.select(Facts(op, x.device, dtype, divergence=named), backend).run
        coef = self.coef.to(torch.float64 if dtype == torch.float64 else torch.float32)
        if op == "part_lse":
            return torch.stack([run(x, self.side, self.temperature, ids) for ids in (None, self.ids)])
        if op == "dense_part_sums":
            return run(x, y, self.lse_s, self.lse_t, coef, spec)
        grad = torch.full_like(x, math.nan)
        rows = (coef, self.labels, self.lse_1, spec, grad)
        if op == "dense_part_grad":
            run(x, y, self.lse_s, self.lse_t, self.total, self.weight, *rows)
        else:
            entries = self.entries.to(coef.dtype)
            run(x, self.ids, entries, self.lse_s, self.lse_rest, self.outside, self.rest, *rows)
        return grad


CASES = [(1.0, 0.0, 0.0, 1.0), (2.0, 0.3, 0.0, 0.7), (1.0, 0.5, 8.0, 1.3), (0.7, 0.2, 8.0, -0.5)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_parts_against_the_oracle(op, dtype, device, no_worse, poisoned):
    names = divergences.names() if op.startswith("dense") else ["forward_kl"]
    for temperature, ce_weight, softcap, scale in CASES:
        side = Side(C, scale, softcap)
        data = Data(device, dtype, side, temperature)
        for name in names:
            spec = RowSpec(divergences.TABLE[name], side, Side(C), "bucket", temperature, 0.6, ce_weight)
            truth = data.run(op, "torch", spec, torch.float64)
            plain = data.run(op, "torch", spec, dtype)
            for backend in backends(op, device, dtype):
                got = data.run(op, backend, spec, dtype)
                if op.endswith("grad"):
                    assert (got[1] == 0).all(), "a row that does not count was looked at"
                    assert (got[:, C:] == 0).all(), "padding received a gradient"
                elif op == "part_lse":
                    got, here, there = (x[:, data.coef != 0] for x in (got, plain, truth))
                    no_worse(got, here, there, 1e-12 if dtype == torch.float64 else 2e-6)
                    continue
                else:
                    assert got.dtype == torch.float64 and (got[:, 1] == 0).all()
                finite = truth.isfinite()
                assert torch.equal(got.isfinite(), finite), (backend, name)
                no_worse(got[finite], plain[finite], truth[finite], 1e-12 if dtype == torch.float64 else 4e-6)


@pytest.mark.parametrize("op", ["dense_part_grad", "sparse_part_grad"])
def test_the_gradient_may_take_the_students_memory(op, device):
    side = Side(C, 0.9, 7.0)
    spec = RowSpec(divergences.get("jsd"), side, Side(C), "bucket", 1.0, 1.0, 0.5)
    data = Data(device, torch.float32, side, 1.0)
    for backend in backends(op, device, torch.float32):
        apart = data.run(op, backend, spec, torch.float32)
        run = dispatch.select(Facts(op, device, torch.float32), backend).run
        x = data.student.clone()
        rows = (data.coef.float(), data.labels, data.lse_1, spec, x)
        if op == "dense_part_grad":
            run(x, data.teacher, data.lse_s, data.lse_t, data.total, data.weight, *rows)
        else:
            run(x, data.ids, data.entries.float(), data.lse_s, data.lse_rest, data.outside, data.rest, *rows)
        assert torch.equal(x, apart), backend


def test_columns_of_a_wider_matrix(device):
    """A tile of a teacher's logits is a view of columns."""
    x, y = torch.randn(R, 3 * C, device=device), torch.randn(R, 3 * C, device=device)
    spec = RowSpec(divergences.get("forward_kl"), Side(C), Side(C))
    lse, coef = x.double().logsumexp(-1), torch.ones(R, device=device)
    a, b = x[:, 17 : 17 + C], y[:, 17 : 17 + C]
    for backend in backends("dense_part_sums", device, torch.float32):
        run = dispatch.select(Facts("dense_part_sums", device, torch.float32), backend).run
        assert torch.equal(run(a, b, lse, lse, coef, spec), run(a.contiguous(), b.contiguous(), lse, lse, coef, spec))
        lse_of = dispatch.select(Facts("part_lse", device, torch.float32), backend).run
        assert torch.equal(lse_of(a, Side(C), 2.0), lse_of(a.contiguous(), Side(C), 2.0))


def test_a_part_without_mass(device):
    """All banned, or all its columns among the ids: -inf, not NaN."""
    x = torch.randn(2, 9, device=device)
    x[0] = -math.inf
    ids = torch.arange(9, device=device).expand(2, 9)
    for backend in backends("part_lse", device, torch.float32):
        run = dispatch.select(Facts("part_lse", device, torch.float32), backend).run
        assert run(x, Side(9), 1.0)[0] == -math.inf
        assert (run(x, Side(9), 1.0, ids) == -math.inf).all()
