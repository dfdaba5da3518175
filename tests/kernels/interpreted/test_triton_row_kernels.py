"""Triton row kernels against the fp64 oracle, interpreted (see ../test_triton_rows.py) and on a GPU."""

import os
from dataclasses import replace

import pytest
import torch
from potstill import divergences
from potstill.dispatch import Facts, explain, kernels, select
from potstill.divergences import Divergence, exp, where
from potstill.rows import TAILS, RowSpec, Side

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IN_INTERPRETER = pytest.mark.skipif(not INTERPRETED, reason="run by tests/kernels/test_triton_rows.py")
DEVICES = [
    pytest.param("cpu", marks=IN_INTERPRETER),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
NEG_INF = float("-inf")
R, V, PADDED, K = 3, 301, 311, 7
FORMS = ["dense", *TAILS]


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    if request.param == "cpu":
        from potstill.kernels import triton_rows

        monkeypatch.setattr(triton_rows, "MAX_BLOCK", 256)  # two blocks a row, the second one partial
    return request.param


def make_case(form, dtype, device, *, width=V, std=3.0, seed=0, rows=R, k=K):
    """(student [R, width], teacher or (ids, log_probs, log_rest), coef, labels); row 1 is dead and NaN."""
    g = torch.Generator().manual_seed(seed)
    student = (torch.randn(rows, width, generator=g) * std).to(dtype)
    teacher = (torch.randn(rows, width, generator=g) * std).to(dtype)
    coef = torch.rand(rows, generator=g) + 0.5
    labels = torch.randint(0, V, (rows,), generator=g)
    log_probs = torch.log_softmax(teacher[:, :V].float(), -1)
    values, ids = log_probs.topk(k, -1)
    log_rest = log_probs.scatter(1, ids, NEG_INF).logsumexp(-1)
    ids, values = ids.int(), values.contiguous()
    for x in (student, teacher, values, log_rest):
        x[1] = float("nan")
    ids[1], labels[1], coef[1] = 5, -100, 0.0
    if form != "dense":
        ids[2, -2:], values[2, -2:] = -1, NEG_INF  # a short row
        teacher = (ids.to(device), values.to(device), log_rest.to(device))
    else:
        teacher = teacher.to(device)
    return student.to(device), teacher, coef.to(device), labels.to(device)


def make_spec(form, divergence, **more):
    softcap = more.pop("softcap", 0.0)
    scale = more.pop("scale", 1.0)
    teacher = Side(V, scale=2 * scale, softcap=softcap) if form == "dense" else None
    return RowSpec(
        divergences.get(divergence), Side(V, scale=scale, softcap=softcap), teacher,
        tail="bucket" if form == "dense" else form, **more,
    )  # fmt: skip


def run(backend, case, spec, *, grad=True, dtype=None, grad_dtype=None):
    """(out [2, R], gradient or None) of a backend; dtype casts the logits first (fp64 for the oracle)."""
    student, teacher, coef, labels = case
    if dtype is not None:
        student = student.to(dtype)
        teacher = teacher.to(dtype) if isinstance(teacher, torch.Tensor) else teacher
    op = "dense_rows" if spec.teacher is not None else "sparse_rows"
    parts = (teacher,) if spec.teacher is not None else teacher
    written = torch.full_like(student, float("nan"), dtype=grad_dtype) if grad else None
    kernel = select(Facts(op, student.device, student.dtype), backend)
    return kernel.run(student, *parts, coef, labels if spec.ce_weight else None, spec, written), written


def check(case, spec, floor=2e-6):
    """Within three times plain torch's own error in the same dtype, and a floor, of the fp64 truth."""
    # the interpreter truncates fp32 to bf16 where a GPU rounds, so there the gradient is compared in fp32
    grad_dtype = torch.float32 if case[0].device.type == "cpu" else None
    truth, true_grad = run("torch", case, spec, dtype=torch.float64)
    plain, plain_grad = run("torch", case, spec, grad_dtype=grad_dtype)
    out, grad = run("triton", case, spec, grad_dtype=grad_dtype)
    for name, got, near, want in (("rows", out, plain, truth), ("grad", grad, plain_grad, true_grad)):
        assert torch.equal(got.isfinite(), near.isfinite()), (name, got, near)
        finite = near.isfinite() & want.isfinite()  # p may underflow in fp32 where q is 0: 0, not inf
        got, near, want = (torch.where(finite, x.double(), 0.0) for x in (got, near, want))
        bound = 3 * (near - want).abs().max() + floor * (1 + want.abs().max())
        assert (got - want).abs().max() <= bound, (name, (got - want).abs().max(), bound)
    return out, grad


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", divergences.names())
def test_every_divergence(device, name, form, dtype, temperature):
    spec = make_spec(form, name, temperature=temperature, distill_weight=0.7)
    check(make_case(form, dtype, device), spec)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("ce_weight", [0.0, 0.4])
@pytest.mark.parametrize("width", [V, PADDED])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("form", FORMS)
def test_cross_entropy_padding_softcap(device, form, temperature, ce_weight, width, softcap):
    case = make_case(form, torch.float32, device, width=width, seed=1)
    if width > V:  # what padding holds must not matter
        case[0][:, V:] = float("nan")
    spec = make_spec(form, "jsd", temperature=temperature, ce_weight=ce_weight, softcap=softcap, scale=0.5)
    _, grad = check(case, spec)
    assert not grad[:, V:].any()
    assert not grad[1].any()


@pytest.mark.parametrize("form", FORMS)
def test_dead_rows_are_not_looked_at(device, form):
    case = make_case(form, torch.bfloat16, device, seed=2)
    spec = make_spec(form, "forward_kl", ce_weight=0.5)
    out, grad = run("triton", case, spec)
    assert torch.equal(out[:, 1], torch.zeros_like(out[:, 1])) and not grad[1].any()
    assert out.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("std", [3.0, 60.0])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", divergences.names())
def test_banned_tokens_and_peaked_logits(device, name, form, std):
    student, teacher, coef, labels = make_case(form, torch.float32, device, std=std, seed=3)
    student[0, 10:20] = NEG_INF  # banned by the student alone
    student[2, 40:90] = NEG_INF
    if form == "dense":
        teacher[0, 25:29] = NEG_INF  # by the teacher alone
        teacher[2, 40:90] = NEG_INF  # by both
    check((student, teacher, coef, labels), make_spec(form, name), floor=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_over_the_student(device, form):
    case = make_case(form, torch.float32, device, seed=4)
    spec = make_spec(form, "skew_reverse_kl", temperature=2.0, ce_weight=0.5)
    out, grad = run("triton", case, spec)
    student, teacher, coef, labels = case
    buffer = student.clone()
    op = "dense_rows" if form == "dense" else "sparse_rows"
    kernel = select(Facts(op, student.device, student.dtype), "triton")
    in_place = kernel.run(buffer, *((teacher,) if form == "dense" else teacher), coef, labels, spec, buffer)
    assert torch.equal(in_place, out) and torch.equal(buffer, grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_gradient_in_half_precision(device, form, dtype):
    case = make_case(form, dtype, device, seed=4)
    spec = make_spec(form, "reverse_kl", ce_weight=0.5)
    full = run("triton", case, spec, grad_dtype=torch.float32)[1]
    half = run("triton", case, spec)[1]
    assert half.dtype == dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(half.float(), full, rtol=step, atol=1e-7)  # one step


@pytest.mark.parametrize("form", FORMS)
def test_without_a_gradient(device, form):
    case = make_case(form, torch.bfloat16, device, seed=5)
    spec = make_spec(form, "symmetric_kl", ce_weight=0.5)
    assert torch.equal(run("triton", case, spec, grad=False)[0], run("triton", case, spec)[0])


@pytest.mark.parametrize("layout", ["rows", "columns", "expanded", "offset"])
@pytest.mark.parametrize("form", FORMS)
def test_layouts(device, form, layout):
    case = list(make_case(form, torch.float32, device, seed=6))
    spec = make_spec(form, "reverse_kl", ce_weight=0.3)
    student = case[0]
    if layout == "expanded":
        student = case[0] = student[:1].expand(R, V).contiguous()
    want = run("triton", tuple(case), spec)
    backing = torch.zeros(R * 2, V + 3, device=device)
    if layout == "rows":
        case[0] = backing[::2, :V].copy_(student)
    elif layout == "columns":
        case[0] = student.t().contiguous().t()
    elif layout == "expanded":
        case[0] = student[:1].expand(R, V)
    else:
        case[0] = backing[:R, 3:].copy_(student)
    op = "dense_rows" if form == "dense" else "sparse_rows"
    grad = torch.full((R, V), float("nan"), device=device)
    grad = grad.t().contiguous().t() if layout == "columns" else grad
    parts = (case[1],) if form == "dense" else case[1]
    out = select(Facts(op, case[0].device, torch.float32), "triton").run(
        case[0], *parts, case[2], case[3], spec, grad
    )
    assert torch.equal(out, want[0]) and torch.equal(grad, want[1])


def test_the_rest_is_summed_not_subtracted(device):
    """A rest of exp(-40) beside K entries that hold everything: 1 - sum would give 0 or noise."""
    student = torch.full((1, V), -40.0, device=device) - torch.arange(V, device=device) / 100
    student[0, [3, 130, 260]] = torch.tensor([1.0, 0.5, 0.0], device=device)
    ids = torch.tensor([[130, 260, 3]], dtype=torch.int32, device=device)
    log_probs = torch.log(torch.tensor([[0.5, 0.3, 0.1]], device=device))
    log_rest = torch.log(torch.tensor([0.1], device=device))
    case = (student, (ids, log_probs, log_rest), torch.ones(1, device=device), None)
    check(case, make_spec("bucket", "forward_kl"))


def test_k_equal_to_the_vocabulary_is_dense(device):
    student, teacher, coef, labels = make_case("dense", torch.float32, device, seed=7)
    log_probs = torch.log_softmax(teacher[:, :V] * 2.0, -1)
    values, ids = log_probs.sort(-1, descending=True)
    dense = run("triton", (student, teacher, coef, labels), make_spec("dense", "jsd"))
    rest = torch.full((R,), NEG_INF, device=device)
    ids = torch.where(coef[:, None] != 0, ids, 0).int()
    sparse = run("triton", (student, (ids, values, rest), coef, labels), make_spec("bucket", "jsd"))
    for a, b in zip(dense, sparse, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight", [0.01, 0.9])
def test_parameters_reach_the_kernel(device, form, weight):
    case = make_case(form, torch.float32, device, seed=8)
    spec = make_spec(form, "jsd")
    check(case, replace(spec, divergence=spec.divergence(teacher_weight=weight)))


SHARPNESS = 3.0


def weigh(p, x):
    return where(p > 0, SHARPNESS * p * x, 0.0)


def squared_ratio(lp, lq, floor):
    """sum p (lp - lq)^2 * 1.5 + floor * q, a formula no kernel has seen."""
    d = lp - lq
    p = exp(lp)
    return 0.5 * weigh(p, d * d) + floor * exp(lq), -weigh(p, d) + floor * exp(lq)


@pytest.mark.parametrize("form", FORMS)
def test_a_formula_of_ones_own(device, form):
    own = Divergence("squared_ratio", squared_ratio, (), (0.25,), lambda floor: 0.0)
    case = make_case(form, torch.float32, device, seed=9)
    check(case, make_spec(form, own, temperature=2.0, ce_weight=0.2))


def test_what_a_formula_may_not_use(device):
    def odd(lp, lq):
        return torch.logaddexp(lp, lq), lq

    own = Divergence("odd", odd, (), (), lambda: 0.0)
    with pytest.raises(TypeError, match="formula 'odd' uses torch = .* which has no Triton form"):
        run("triton", make_case("dense", torch.float32, device), make_spec("dense", own))


def test_an_empty_batch(device):
    student = torch.empty(0, V, device=device)
    coef = torch.empty(0, device=device)
    out, grad = run("triton", (student, student, coef, None), make_spec("dense", "forward_kl"))
    assert out.shape == (2, 0) and grad.shape == (0, V)


def test_fp64_is_refused_with_a_sentence(device):
    facts = Facts("dense_rows", torch.device(device), torch.float64)
    assert "torch serves fp64" in dict(explain(facts))["triton"]
    with pytest.raises(ValueError, match="torch serves fp64"):
        select(facts, "triton")
    assert select(facts).backend != "triton"


@pytest.mark.parametrize("op", ["dense_rows", "sparse_rows"])
def test_auto_prefers_it_on_a_gpu_only(device, op):
    assert (kernels(op)[0].backend == "triton") == (device == "cuda")
    assert (select(Facts(op, torch.device(device), torch.float32)).backend == "triton") == (device == "cuda")
