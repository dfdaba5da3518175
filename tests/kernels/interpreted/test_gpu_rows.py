"""Triton row kernels against the fp64 oracle, interpreted (see ../test_triton_rows.py) and on a GPU."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from potstill import divergences
from potstill.dispatch import Facts, explain, kernels, select
from potstill.divergences import Divergence, exp, where
from potstill.kernels import cuda
from potstill.rows import COMPLETE, TAILS, RowSpec, Side

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TARGETS = [
    pytest.param(
        ("triton", "cpu"),
        marks=pytest.mark.skipif(not INTERPRETED, reason="run by tests/kernels/test_triton_rows.py"),
        id="triton-interpreted",
    ),
    pytest.param(
        ("cuda", "cpu"),
        marks=pytest.mark.skipif(INTERPRETED or not shutil.which("g++"), reason="runs once, with g++"),
        id="cuda-on-host",
    ),
    pytest.param(("triton", "cuda"), marks=ON_GPU, id="triton"),
    pytest.param(("cuda", "cuda"), marks=ON_GPU, id="cuda"),
]
NEG_INF = float("-inf")
R, V, PADDED, K = 3, 301, 311, 7
FORMS = ["dense", *TAILS]
ROOT = Path(__file__).parents[3]


@pytest.fixture(params=TARGETS)
def target(request, monkeypatch):
    """(backend, device)"""
    if request.param == ("triton", "cpu"):
        from potstill.kernels import triton_rows

        # two blocks a row, the second one partial
        monkeypatch.setattr(triton_rows, "DENSE_BLOCK", 256)
        monkeypatch.setattr(triton_rows, "SPARSE_BLOCK", 256)
    if request.param == ("cuda", "cpu"):
        monkeypatch.setattr(cuda, "_cuda", request.getfixturevalue("host_cuda"))
        monkeypatch.setattr(cuda, "stream_of", lambda x: 0)
    return request.param


def row_kernel(backend, form):
    return next(k for k in kernels("dense_rows" if form == "dense" else "sparse_rows") if k.backend == backend)


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


def entry_weights(form, teacher):
    """The weights of a sampled row's entries, [R, K]; no argument for the other forms."""
    if form != "sampled":
        return {}
    rows, k = teacher[0].shape
    return {"weights": torch.linspace(0.5, 2.0, k, device=teacher[0].device).expand(rows, k)}


def meaningful(name, form, backend):
    d = divergences.TABLE[name]
    if backend == "cuda" and d.kind != "divergence":
        return False
    if name.endswith("_mass"):
        return form in ("drop", "sampled")
    return form == "sampled" if d.kind == "estimator" else d.outer is None or form in ("dense", *COMPLETE)


def make_spec(form, divergence, **more):
    softcap = more.pop("softcap", 0.0)
    scale = more.pop("scale", 1.0)
    teacher = Side(V, scale=2 * scale, softcap=softcap) if form == "dense" else None
    return RowSpec(
        divergences.TABLE.get(divergence, divergence), Side(V, scale=scale, softcap=softcap), teacher,
        tail="bucket" if form == "dense" else form, **more,
    )  # fmt: skip


def run(backend, case, spec, *, grad=True, dtype=None, grad_dtype=None):
    """(out [2, R], gradient or None) of a backend; dtype casts the logits first (fp64 for the oracle)."""
    student, teacher, coef, labels = case
    if dtype is not None:
        student = student.to(dtype)
        teacher = teacher.to(dtype) if isinstance(teacher, torch.Tensor) else teacher
    dense = spec.teacher is not None
    written = torch.full_like(student, float("nan"), dtype=grad_dtype) if grad else None
    kernel = row_kernel(backend, "dense" if dense else "sparse")
    labels = labels if spec.ce_weight else None
    parts, weights = ((teacher,), {}) if dense else (teacher, entry_weights(spec.tail, teacher))
    return kernel.run(student, *parts, coef, labels, spec, written, **weights), written


def check(target, case, spec, floor=2e-6):
    """Within three times plain torch's own error in the same dtype, and a floor, of the fp64 truth."""
    # the interpreter truncates fp32 to bf16 where a GPU rounds, so there the gradient is compared in fp32
    grad_dtype = torch.float32 if target == ("triton", "cpu") else None
    truth, true_grad = run("torch", case, spec, dtype=torch.float64)
    plain, plain_grad = run("torch", case, spec, grad_dtype=grad_dtype)
    out, grad = run(target[0], case, spec, grad_dtype=grad_dtype)
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
@pytest.mark.parametrize("name", divergences.TABLE)
def test_every_divergence(target, name, form, dtype, temperature):
    if not meaningful(name, form, target[0]):
        return
    spec = make_spec(form, name, temperature=temperature, distill_weight=0.7)
    check(target, make_case(form, dtype, target[1]), spec)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("ce_weight", [0.0, 0.4])
@pytest.mark.parametrize("width", [V, PADDED])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("form", FORMS)
def test_cross_entropy_padding_softcap(target, form, temperature, ce_weight, width, softcap):
    case = make_case(form, torch.float32, target[1], width=width, seed=1)
    if width > V:  # what padding holds must not matter
        case[0][:, V:] = float("nan")
    spec = make_spec(form, "jsd", temperature=temperature, ce_weight=ce_weight, softcap=softcap, scale=0.5)
    _, grad = check(target, case, spec)
    assert not grad[:, V:].any()
    assert not grad[1].any()


@pytest.mark.parametrize("form", FORMS)
def test_dead_rows_are_not_looked_at(target, form):
    case = make_case(form, torch.bfloat16, target[1], seed=2)
    spec = make_spec(form, "forward_kl", ce_weight=0.5)
    out, grad = run(target[0], case, spec)
    assert torch.equal(out[:, 1], torch.zeros_like(out[:, 1])) and not grad[1].any()
    assert out.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("std", [3.0, 60.0])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", divergences.names())
def test_pitfall_02_03_banned_tokens_and_peaked_logits(target, name, form, std):
    if not meaningful(name, form, target[0]):
        return
    student, teacher, coef, labels = make_case(form, torch.float32, target[1], std=std, seed=3)
    student[0, 10:20] = NEG_INF  # banned by the student alone
    student[2, 40:90] = NEG_INF
    if form == "dense":
        teacher[0, 25:29] = NEG_INF  # by the teacher alone
        teacher[2, 40:90] = NEG_INF  # by both
    check(target, (student, teacher, coef, labels), make_spec(form, name), floor=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_over_the_student(target, form):
    case = make_case(form, torch.float32, target[1], seed=4)
    spec = make_spec(form, "skew_reverse_kl", temperature=2.0, ce_weight=0.5)
    out, grad = run(target[0], case, spec)
    student, teacher, coef, labels = case
    buffer = student.clone()
    kernel = row_kernel(target[0], form)
    parts = (teacher,) if form == "dense" else teacher
    in_place = kernel.run(buffer, *parts, coef, labels, spec, buffer, **entry_weights(form, teacher))
    assert torch.equal(in_place, out) and torch.equal(buffer, grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_gradient_in_half_precision(target, form, dtype):
    case = make_case(form, dtype, target[1], seed=4)
    spec = make_spec(form, "reverse_kl", ce_weight=0.5)
    full = run(target[0], case, spec, grad_dtype=torch.float32)[1]
    half = run(target[0], case, spec)[1]
    assert half.dtype == dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(half.float(), full, rtol=step, atol=1e-7)  # one step


@pytest.mark.parametrize("form", FORMS)
def test_without_a_gradient(target, form):
    case = make_case(form, torch.bfloat16, target[1], seed=5)
    spec = make_spec(form, "symmetric_kl", ce_weight=0.5)
    assert torch.equal(run(target[0], case, spec, grad=False)[0], run(target[0], case, spec)[0])


@pytest.mark.parametrize("layout", ["rows", "columns", "expanded", "offset"])
@pytest.mark.parametrize("form", FORMS)
def test_pitfall_20_layouts(target, form, layout):
    case = list(make_case(form, torch.float32, target[1], seed=6))
    spec = make_spec(form, "reverse_kl", ce_weight=0.3)
    student = case[0]
    if layout == "expanded":
        student = case[0] = student[:1].expand(R, V).contiguous()
    want = run(target[0], tuple(case), spec)
    backing = torch.zeros(R * 2, V + 3, device=target[1])
    if layout == "rows":
        case[0] = backing[::2, :V].copy_(student)
    elif layout == "columns":
        case[0] = student.t().contiguous().t()
    elif layout == "expanded":
        case[0] = student[:1].expand(R, V)
    else:
        case[0] = backing[:R, 3:].copy_(student)
    grad = torch.full((R, V), float("nan"), device=target[1])
    grad = grad.t().contiguous().t() if layout == "columns" else grad
    parts = (case[1],) if form == "dense" else case[1]
    weights = entry_weights(form, case[1])
    out = row_kernel(target[0], form).run(case[0], *parts, case[2], case[3], spec, grad, **weights)
    assert torch.equal(out, want[0]) and torch.equal(grad, want[1])


def test_pitfall_22_what_is_loaded_is_widened():
    """The interpreter's bf16 arithmetic is silently wrong, so every float that a kernel loads goes to fp32 at once."""
    source = (ROOT / "python/potstill/kernels/triton_rows.py").read_text()
    loads = [line for line in source.splitlines() if "tl.load(" in line]
    floats = [line for line in loads if not any(name in line for name in ("p_ids", "p_sorted", "p_labels", "p_coef"))]
    assert len(floats) >= 4 and all(".to(tl.float32)" in line for line in floats), floats


def test_pitfall_08_the_rest_is_summed_not_subtracted(target):
    """A rest of exp(-40) beside K entries that hold everything: 1 - sum would give 0 or noise."""
    student = torch.full((1, V), -40.0, device=target[1]) - torch.arange(V, device=target[1]) / 100
    student[0, [3, 130, 260]] = torch.tensor([1.0, 0.5, 0.0], device=target[1])
    ids = torch.tensor([[130, 260, 3]], dtype=torch.int32, device=target[1])
    log_probs = torch.log(torch.tensor([[0.5, 0.3, 0.1]], device=target[1]))
    log_rest = torch.log(torch.tensor([0.1], device=target[1]))
    case = (student, (ids, log_probs, log_rest), torch.ones(1, device=target[1]), None)
    check(target, case, make_spec("bucket", "forward_kl"))


def test_nothing_outside_the_entries(target):
    """Both sides ban all but the K entries: the rest is log 0 twice, and its share is 0, not NaN."""
    ids = torch.tensor([[2, 250, 40]], dtype=torch.int32, device=target[1])
    student = torch.full((1, V), NEG_INF, device=target[1])
    student[0, ids[0].long()] = torch.tensor([1.0, 0.5, 0.0], device=target[1])
    log_probs = torch.log(torch.tensor([[0.5, 0.3, 0.2]], device=target[1]))
    rest = torch.full((1,), NEG_INF, device=target[1])
    case = (student, (ids, log_probs, rest), torch.ones(1, device=target[1]), None)
    _, grad = check(target, case, make_spec("bucket", "forward_kl"))
    assert grad.isfinite().all() and grad[0, 40] != 0


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "skew_forward_kl", "skew_reverse_kl"])
def test_near_the_teacher_the_sum_does_not_cancel(target, name):
    """Of a divergence of 5e-7 the rounding of log s alone is a third; `centre` keeps it to a few per cent."""
    student, _, coef, labels = make_case("dense", torch.float32, target[1], std=0.3, seed=11)
    noise = torch.randn(R, V, generator=torch.Generator().manual_seed(1)).to(target[1])
    case = (student, student * 0.5 + 5e-4 * noise, coef, labels)
    spec = make_spec("dense", name)
    spec = replace(spec, student=replace(spec.student, scale=1.0), teacher=replace(spec.teacher, scale=2.0))
    out, truth = run(target[0], case, spec)[0], run("torch", case, spec, dtype=torch.float64)[0]
    live = truth[0] > 0
    assert live.sum() == R - 1 and (truth[0, live] < 1e-6).all()
    assert ((out[0] - truth[0]).abs()[live] <= 0.05 * truth[0, live]).all(), (out[0], truth[0])


def test_k_equal_to_the_vocabulary_is_dense(target):
    student, teacher, coef, labels = make_case("dense", torch.float32, target[1], seed=7)
    log_probs = torch.log_softmax(teacher[:, :V] * 2.0, -1)
    values, ids = log_probs.sort(-1, descending=True)
    dense = run(target[0], (student, teacher, coef, labels), make_spec("dense", "jsd"))
    rest = torch.full((R,), NEG_INF, device=target[1])
    ids = torch.where(coef[:, None] != 0, ids, 0).int()
    sparse = run(target[0], (student, (ids, values, rest), coef, labels), make_spec("bucket", "jsd"))
    for a, b in zip(dense, sparse, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight", [0.01, 0.9])
def test_parameters_reach_the_kernel(target, form, weight):
    case = make_case(form, torch.float32, target[1], seed=8)
    spec = make_spec(form, "jsd")
    check(target, case, replace(spec, divergence=spec.divergence(teacher_weight=weight)))


SHARPNESS = 3.0


def weigh(p, x):
    return where(p > 0, SHARPNESS * p * x, 0.0)


def squared_ratio(lp, lq, floor):
    """sum p (lp - lq)^2 * 1.5 + floor * q, a formula no kernel has seen."""
    d = lp - lq
    p = exp(lp)
    return 0.5 * weigh(p, d * d) + floor * exp(lq), -weigh(p, d) + floor * exp(lq)


@pytest.mark.parametrize("form", FORMS)
def test_a_formula_of_ones_own(target, form):
    own = Divergence("squared_ratio", squared_ratio, (), (0.25,), lambda floor: 0.0)
    case = make_case(form, torch.float32, target[1], seed=9)
    spec = make_spec(form, own, temperature=2.0, ce_weight=0.2)
    if target[0] == "triton":
        check(target, case, spec)
    else:
        with pytest.raises(ValueError, match="'squared_ratio' is not compiled in with 1 parameters; run python -m"):
            run(target[0], case, spec)


def test_what_a_formula_may_not_use():
    triton_formula = pytest.importorskip("potstill.kernels.triton_formula")

    def odd(lp, lq):
        return torch.logaddexp(lp, lq), lq

    with pytest.raises(TypeError, match="formula 'odd' uses torch = .* which has no Triton form"):
        triton_formula.device_function(odd)


@pytest.mark.parametrize("form", FORMS)
def test_an_empty_batch(target, form):
    case = make_case(form, torch.float32, target[1])
    case = [tuple(x[:0] for x in part) if isinstance(part, tuple) else part[:0] for part in case]
    out, grad = run(target[0], case, make_spec(form, "forward_kl"))
    assert out.shape == (2, 0) and grad.shape == (0, V)


def test_the_vocabulary_in_one_byte_steps(target):
    """Every alignment of rows against the 16-byte loads, and every remainder of the last ones."""
    for width in range(V, V + 9):
        check(target, make_case("dense", torch.bfloat16, target[1], width=width), make_spec("dense", "jsd"))


def test_bad_labels_and_ids_do_not_read_elsewhere(target):
    """Refused at the public edge; here they give NaN in their own row and leave memory alone."""
    case = make_case("bucket", torch.float32, target[1], seed=10)
    case[3][0] = V + 10**6
    case[1][0][2, 0] = V + 10**6
    out, grad = run(target[0], case, make_spec("bucket", "forward_kl", ce_weight=0.5))
    assert out[1, 0].isnan() and out[0, 0].isfinite() and out[0, 2].isnan() and not grad[1].any()


def test_fp64_is_refused_with_a_sentence(target):
    facts = Facts("dense_rows", torch.device("cuda" if target[0] == "cuda" else target[1]), torch.float64)
    sentence = dict(explain(facts))[target[0]]
    assert "torch serves fp64" in sentence or "is not built" in sentence
    with pytest.raises(ValueError, match="no backend serves 'dense_rows' for torch.float64"):
        select(facts, target[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("op", ["dense_rows", "sparse_rows"])
def test_auto_prefers_triton_on_a_gpu(op):
    assert select(Facts(op, torch.device("cuda"), torch.bfloat16)).backend == "triton"


@pytest.mark.skipif(not INTERPRETED, reason="run by tests/kernels/test_triton_rows.py")
@pytest.mark.parametrize("op", ["dense_rows", "sparse_rows"])
def test_auto_does_not_interpret(op):
    assert select(Facts(op, torch.device("cpu"), torch.float32)).backend != "triton"
    assert select(Facts(op, torch.device("cpu"), torch.float32), "triton").backend == "triton"
