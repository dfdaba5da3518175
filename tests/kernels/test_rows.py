"""The row kernels of every backend on this device against the fp64 reference."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from potstill import dispatch, divergences
from potstill.dispatch import Facts
from potstill.rows import COMPLETE, TAILS, RowSpec, Side

V, PADDED, R, K = 1531, 1540, 6, 40  # a prime vocabulary in a padded matrix: no block or vector divides it
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CASES = [
    # temperature, ce_weight, student softcap, student scale
    (1.0, 0.0, 0.0, 1.0),
    (2.0, 0.3, 0.0, 0.7),
    (1.0, 0.5, 8.0, 1.3),
    (0.7, 0.0, 8.0, -0.5),
]


def backends(op: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    found = [name for name, refusal in dispatch.explain(Facts(op, device, dtype)) if refusal is None]
    assert "torch" in found and (device.type != "cpu" or "cpp" in found), "build the extension first"
    return found


class Data:
    """Rows of both sides; row 1 does not count and is full of NaN, and two tokens are banned on one or both sides."""

    def __init__(self, device: torch.device, dtype: torch.dtype, temperature: float, side: Side, tail: str):
        g = torch.Generator().manual_seed(11)
        student = torch.randn(R, PADDED, generator=g) * 3
        teacher = student / abs(side.scale) * side.scale + torch.randn(R, PADDED, generator=g)
        student[:, 5] = teacher[:, 5] = teacher[:, 9] = -math.inf if side.scale > 0 and not side.softcap else -30.0
        self.student, self.teacher = student.to(device, dtype), teacher.to(device, dtype)
        self.labels = torch.randint(10, V, (R,), generator=g).to(device)
        self.coef = (torch.rand(R, generator=g) + 0.1).double().to(device)
        lp = (self.teacher[:, :V].double() / temperature).log_softmax(-1)
        self.log_probs, self.ids = lp.topk(K)
        self.log_rest = lp.scatter(1, self.ids, -math.inf).logsumexp(-1)
        self.ids[2, -3:], self.log_probs[2, -3:] = -1, -math.inf  # a short row
        if tail == "renormalize":
            self.log_probs = self.log_probs - self.log_probs.logsumexp(-1, keepdim=True)
        self.weights = torch.rand(R, K, generator=g, dtype=torch.float64).to(device) + 0.2
        self.coef[1] = 0
        for x in (self.weights, self.student, self.teacher, self.log_probs, self.log_rest):
            x[1] = math.nan
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32

    def run(self, backend: str, op: str, spec: RowSpec, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.student.to(dtype)
        grad = torch.full_like(x, math.nan)
        kernel = dispatch.select(Facts(op, x.device, dtype, divergence=spec.divergence.name), backend)
        coef = self.coef.to(self.wide if dtype != torch.float64 else torch.float64)
        if op == "dense_rows":
            return kernel.run(x, self.teacher.to(dtype), coef, self.labels, spec, grad), grad
        rest = self.log_rest.to(coef.dtype) if spec.tail == "bucket" else None
        weights = self.weights.to(coef.dtype) if spec.tail == "sampled" else None
        found = kernel.run(x, self.ids, self.log_probs.to(coef.dtype), rest, coef, self.labels, spec, grad, weights)
        return found, grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", divergences.TABLE)
@pytest.mark.parametrize("form", ["dense", *TAILS])
def test_rows_against_the_oracle(form, name, dtype, device, no_worse, poisoned):
    op, tail = ("dense_rows", "bucket") if form == "dense" else ("sparse_rows", form)
    if not meaningful(name, form):
        pytest.skip(f"{name} is not defined over {form}")
    for temperature, ce_weight, softcap, scale in CASES:
        side = Side(V, scale, softcap)
        teacher = Side(V) if form == "dense" else None
        spec = RowSpec(divergences.TABLE[name], side, teacher, tail, temperature, 0.6, ce_weight)
        data = Data(device, dtype, temperature, side, tail)
        truth, true_grad = data.run("torch", op, spec, torch.float64)
        plain, plain_grad = data.run("torch", op, spec, dtype)
        for backend in backends(op, device, dtype):
            out, grad = data.run(backend, op, spec, dtype)
            assert (out[:, 1] == 0).all() and (grad[1] == 0).all(), "a row that does not count was looked at"
            assert (grad[:, V:] == 0).all(), "padding received a gradient"
            floor = 1e-12 if dtype == torch.float64 else 4e-6
            finite = truth.isfinite()  # reverse directions are infinite where only the teacher bans
            assert torch.equal(out.isfinite(), finite), (backend, temperature)
            no_worse(out[finite], plain[finite], truth[finite], floor)
            rows = finite.all(0)
            if rows.any():
                no_worse(grad[rows], plain_grad[rows], true_grad[rows], floor)


def meaningful(name: str, form: str) -> bool:
    """Estimators are for sampled tokens; an outer function needs both sides complete, whose mass is the constant 1."""
    d = divergences.TABLE[name]
    if name.endswith("_mass"):
        return form in ("drop", "sampled")
    return form == "sampled" if d.kind == "estimator" else d.outer is None or form in ("dense", *COMPLETE)


@pytest.mark.parametrize("form", ["dense", "bucket"])
def test_the_gradient_may_take_the_students_memory(form, device):
    op = "dense_rows" if form == "dense" else "sparse_rows"
    spec = RowSpec(divergences.get("forward_kl"), Side(V), Side(V) if form == "dense" else None, ce_weight=0.5)
    data = Data(device, torch.float32, 1.0, Side(V), "bucket")
    for backend in backends(op, device, torch.float32):
        _, apart = data.run(backend, op, spec, torch.float32)
        x = data.student.clone()
        kernel = dispatch.select(Facts(op, x.device, x.dtype), backend)
        coef = data.coef.float()
        if form == "dense":
            kernel.run(x, data.teacher, coef, data.labels, spec, x)
        else:
            kernel.run(x, data.ids, data.log_probs.float(), data.log_rest.float(), coef, data.labels, spec, x)
        assert torch.equal(x, apart), backend


def test_pitfall_20_views_of_any_stride(device):
    """Strided rows, strided columns, an offset, an expanded teacher: the same numbers as contiguous copies."""
    spec = RowSpec(divergences.get("jsd"), Side(V), Side(V))
    base = torch.randn(2 * R, PADDED + 3, device=device)
    teacher = torch.randn(1, PADDED, device=device).expand(R, PADDED)
    coef = torch.ones(R, device=device)
    for backend in backends("dense_rows", device, torch.float32):
        run = dispatch.select(Facts("dense_rows", device, torch.float32), backend).run
        for x in (base[::2, 3:], base[1 : R + 1, 1 : PADDED + 1], base[:R, :PADDED].t().contiguous().t()):
            before = x.clone()
            grad, expected = torch.empty(R, PADDED, device=device), torch.empty(R, PADDED, device=device)
            got = run(x, teacher, coef, None, spec, grad)
            want = run(x.contiguous(), teacher.contiguous(), coef, None, spec, expected)
            assert torch.equal(got, want) and torch.equal(grad, expected) and torch.equal(x, before)


def test_sparse_with_every_entry_equals_dense(device):
    data = Data(device, torch.float64, 1.0, Side(V), "bucket")
    lp = data.teacher[:, :V].log_softmax(-1)
    order = lp.nan_to_num(-1).argsort(-1, descending=True)
    for name, backend in itertools.product(divergences.names(), backends("dense_rows", device, torch.float64)):
        d = divergences.get(name)
        dense, sparse = RowSpec(d, Side(V), Side(V)), RowSpec(d, Side(V), None, "bucket")
        a, ga = data.run(backend, "dense_rows", dense, torch.float64)
        data.ids, data.log_probs = order, lp.gather(1, order)
        data.log_rest = torch.full((R,), -math.inf, dtype=torch.float64, device=device)
        b, gb = data.run(backend, "sparse_rows", sparse, torch.float64)
        finite = a.isfinite().all(0)
        torch.testing.assert_close(a[:, finite], b[:, finite], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(ga[finite], gb[finite], rtol=1e-9, atol=1e-12)


def test_a_rest_far_below_the_entries_keeps_its_gradient(device):
    """log(1 - sum q) by subtraction is -inf in fp32 here; the pull on the tail must be the teacher's rest mass."""
    v, k = 600, 8
    student = torch.full((1, v), -40.0, device=device)
    student[:, :k] = 0.0
    ids = torch.arange(k, device=device)[None]
    log_probs = torch.full((1, k), math.log(0.9 / k), device=device)
    log_rest = torch.full((1,), math.log(0.1), device=device)
    spec = RowSpec(divergences.get("forward_kl"), Side(v), None, "bucket")
    for backend in backends("sparse_rows", device, torch.float32):
        for depth in (40.0, 90.0):
            x = torch.where(student < 0, -depth, student)
            grad = torch.empty_like(x)
            run = dispatch.select(Facts("sparse_rows", device, torch.float32), backend).run
            out = run(x, ids, log_probs, log_rest, torch.ones(1, device=device), None, spec, grad)
            exact = 0.9 * math.log(0.9) + 0.1 * (math.log(0.1) - (math.log((v - k) / k) - depth))
            assert out[0].item() == pytest.approx(exact, rel=1e-5), backend
            assert grad[0, k:].sum().item() == pytest.approx(-0.1, rel=1e-4), backend
            assert grad[0, :k].sum().item() == pytest.approx(0.1, rel=1e-4), backend


@pytest.mark.parametrize("tail", TAILS)
def test_a_row_without_entries_is_zero(tail, device):
    """A padding row of a cached batch: no id, all mass in the rest."""
    x = torch.randn(2, 50, device=device)
    ids = torch.full((2, 4), -1, device=device)
    log_probs = torch.full((2, 4), -math.inf, device=device)
    spec = RowSpec(divergences.get("forward_kl"), Side(50), None, tail)
    for backend in backends("sparse_rows", device, torch.float32):
        grad = torch.full_like(x, math.nan)
        run = dispatch.select(Facts("sparse_rows", device, torch.float32), backend).run
        rest = torch.zeros(2, device=device) if tail == "bucket" else None
        weights = torch.zeros(2, 4, device=device) if tail == "sampled" else None
        out = run(x, ids, log_probs, rest, torch.ones(2, device=device), None, spec, grad, weights)
        assert out.abs().max() < 1e-6 and grad.abs().max() < 1e-6, backend


@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_every_instruction_set_of_this_processor(isa, no_worse):
    from potstill import _cpp

    if isa not in _cpp.usable_isas():
        pytest.skip(f"this processor or build has no {isa}")
    before = _cpp.isa()
    spec = RowSpec(divergences.jsd(teacher_weight=0.3), Side(V, 1.1, 9.0), Side(V), "bucket", 2.0, 1.0, 0.5)
    data = Data(torch.device("cpu"), torch.float32, 2.0, Side(V, 1.1, 9.0), "bucket")
    try:
        _cpp.use_isa(isa)
        for op in ("dense_rows", "sparse_rows"):
            truth, true_grad = data.run("torch", op, spec, torch.float64)
            plain, plain_grad = data.run("torch", op, spec, torch.float32)
            out, grad = data.run("cpp", op, spec, torch.float32)
            no_worse(out, plain, truth, 4e-6)
            no_worse(grad, plain_grad, true_grad, 4e-6)
    finally:
        _cpp.use_isa(before)


def test_threads_do_not_change_a_bit():
    spec = RowSpec(divergences.get("forward_kl"), Side(V), Side(V))
    x, y = torch.randn(37, V), torch.randn(37, V)
    run = dispatch.select(Facts("dense_rows", x.device, x.dtype), "cpp").run
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            grad = torch.empty_like(x)
            results.append((run(x, y, torch.ones(37), None, spec, grad), grad))
    finally:
        torch.set_num_threads(threads)
    for out, grad in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(grad, results[0][1])


def test_pitfall_18_rows_beyond_2_31_elements():
    """Only the last row of a lazily mapped matrix is touched; a 32-bit row offset would read elsewhere or crash."""
    rows, v = 16_747, 128_256
    assert rows * v > 2**31
    x = torch.empty(rows, v, dtype=torch.bfloat16)
    x[-1] = torch.randn(v).bfloat16()
    coef = torch.zeros(rows)
    coef[-1] = 1.0
    spec = RowSpec(divergences.get("forward_kl"), Side(v), Side(v))
    out = dispatch.select(Facts("dense_rows", x.device, x.dtype), "cpp").run(x, x, coef, None, spec, None)
    assert out.abs().max() < 1e-6
    y = x[-1:].clone().roll(1)
    out = dispatch.select(Facts("dense_rows", x.device, x.dtype), "cpp").run(
        x, y.expand(rows, v), coef, None, spec, None
    )
    assert out[0, -1] > 0.1 and (out[:, :-1] == 0).all()
