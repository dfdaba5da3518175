"""Top-k on a card, by CUDA C++ and by Triton: exact, the same bits every time, and rows past 2^31 elements."""

import pytest
import torch
from potstill.dispatch import Facts, explain, kernels, select
from potstill.rows import Side

from ..topk_cases import KINDS, check, check_side, check_with, rows

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["cuda", "triton"])
def topk(request):
    """topk(x, k, side), or with tokens and temperatures too, on one backend."""
    refusal = dict(explain(Facts("topk", torch.device("cuda"), torch.bfloat16, 1000, 4)))[request.param]
    assert refusal is None, refusal

    def run(x, k, side=None, *more):
        op = "topk_with" if more else "topk"
        kernel = next(kernel for kernel in kernels(op) if kernel.backend == request.param)
        return kernel.run(x, k, side or Side(x.shape[1]), *more)

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_exact(topk, poisoned, kind, dtype):
    for v in (1, 9, 1023, 5003, 16_390, 151_937):
        x = rows(kind, 3, v, seed=v).to("cuda", dtype)
        for k in (1, 2, 64, 65, 512, 1000, 1024):
            if k <= v:
                check(topk(x, k), x, k, what=f"{v} {k}")


def test_many_rows_of_a_real_vocabulary(topk):
    x = (torch.randn(600, 151_936, device="cuda") * 3).bfloat16()
    for k in (64, 1024):
        check(topk(x, k), x, k)


def test_every_alignment(topk):
    for dtype in DTYPES:
        backing = torch.full((9 * 70_000,), 99.0, dtype=dtype, device="cuda")  # what lies around the rows would win
        for offset in range(9):
            x = backing[offset : offset + 4 * 66_000].view(4, 66_000)[:, 3 : 3 + 65_537]
            x.copy_(rows("gaussian", 4, 65_537, seed=offset))
            check(topk(x, 64), x, 64)
            x.fill_(99.0)


def test_columns_that_are_not_adjacent(topk):
    x = rows("gaussian", 2000, 7).cuda().t()
    check(topk(x, 20), x, 20)
    assert topk(x[:0], 20)[0].shape == (0, 20)


def test_scale_softcap_and_padding(topk):
    x = (rows("gaussian", 5, 33_000) * 20).cuda()
    for side in (Side(32_768, 0.5, 3.0), Side(32_999, -2.0, 0.0), Side(33_000, 0.25, 30.0)):
        check_side(topk(x, 100, side), x, 100, side)


def test_tokens_and_temperatures(topk):
    x = (rows("gaussian", 6, 40_001) / 2).cuda()
    tokens = torch.tensor([int(x[0].argmax()), -1, 40_000, 0, 7, 77], device="cuda")
    for named in (tokens, None):
        for temperatures in ([], [0.5], [0.5, 2.0, 7.0, 1.5, 3.0]):
            check_with(topk(x, 64, None, named, temperatures), x, 64, named, temperatures)


def test_the_same_bits_every_time(topk):
    for kind in ("gaussian", "steps", "ascending"):
        x = rows(kind, 64, 151_936).bfloat16().cuda().repeat(16, 1)
        first = topk(x, 200)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, topk(x, 200), strict=True))
        assert all(torch.equal(part[:64], part[-64:]) for part in first)


def test_rows_past_2_to_the_31_elements(topk):
    rows_, v = 2**31 // 151_936 + 3, 151_936
    if torch.cuda.mem_get_info()[0] < 3 * rows_ * v:
        pytest.skip("needs 6.5 GB of device memory")
    x = torch.empty(rows_, v, dtype=torch.bfloat16, device="cuda").fill_(-1.0)
    ends = [0, rows_ - 2, rows_ - 1]
    x[ends] = (rows("gaussian", 3, v)).bfloat16().cuda()
    found = topk(x, 64)
    check([part[ends] for part in found], x[ends], 64)
    assert (found[0][1:-2] == torch.arange(64, device="cuda")).all()  # ties to the lowest column, in every row between


def test_on_a_stream_of_its_own(topk):
    x = rows("gaussian", 32, 50_257).cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = x * 0.5
        found = topk(late, 64)
    torch.cuda.current_stream().wait_stream(stream)
    check(found, x * 0.5, 64)


def test_auto_prefers_cuda():
    assert select(Facts("topk", torch.device("cuda"), torch.bfloat16, 151_936, 64)).backend == "cuda"
