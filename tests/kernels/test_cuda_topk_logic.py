"""The logic of csrc/topk.cu on the host, its threads in shuffled order between barriers, against an fp64 sort."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from potstill.dispatch import Facts
from potstill.kernels import cuda, cuda_topk
from potstill.rows import Side

from ..topk_cases import KINDS, check, check_side, check_with, rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKS = {"64 threads": 0, "3 threads": 1, "20 threads in teams of 4": 2}
FULL = 3  # 512 threads in warps of 32


@pytest.fixture
def topk(host_cuda, monkeypatch):
    """topk(x, k, side=, block=, order=) on the host; `order` seeds the order of the threads."""
    monkeypatch.setattr(cuda, "_cuda", host_cuda)

    def run(x, k, *, side=None, block=0, order=1):
        monkeypatch.setattr(cuda, "stream_of", lambda x: 8 * order + block)
        return cuda_topk.topk(x, k, side or Side(x.shape[1]))

    return run


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("kind", KINDS)
def test_exact(topk, poisoned, kind, block):
    for dtype in DTYPES:
        for v in (1, 7, 1023, 1025, 2503):
            x = rows(kind, 2, v, seed=v).to(dtype)
            for k in (1, 3, 64, 1000):
                if k <= v:
                    check(topk(x, k, block=block), x, k, what=f"{dtype} {v} {k}")


@pytest.mark.parametrize("k", [1, 2, 31, 64, 65, 255, 512, 777, 1023, 1024])
def test_every_size_of_k(topk, k):
    for kind in ("gaussian", "steps"):
        for dtype in (torch.float32, torch.bfloat16):
            x = rows(kind, 1, 3001).to(dtype)
            for block in BLOCKS.values():
                check(topk(x, k, block=block), x, k)


@pytest.mark.parametrize("kind", ["gaussian", "ascending", "equal", "third_banned"])
def test_a_real_vocabulary_with_the_real_block(topk, kind):
    x = rows(kind, 1, 151_937).bfloat16()
    for k in (64, 1024):
        check(topk(x, k, block=FULL), x, k)


def test_rows_that_rise_in_the_order_of_the_visit(topk):
    """Every chunk above all before it: hits that do not fit, in every round."""
    v, chunk = 32 * 1024, 32 * 32
    chunks = (v + 7 + chunk - 1) // chunk
    step = int(chunks * 0.618) + 1
    while math.gcd(step, chunks) != 1:
        step += 1
    x = torch.randn(1, v) / 100
    for visit in range(chunks):
        at = visit * step % chunks
        x[:, at * chunk : (at + 1) * chunk] += visit
    for k in (1, 64, 1024):
        check(topk(x, k), x, k)


def test_no_bit_depends_on_the_order_of_the_threads(topk):
    for kind in ("gaussian", "steps", "ascending"):
        x = rows(kind, 1, 9001).bfloat16()
        for k in (5, 200):
            first = topk(x, k, order=0)
            for order in (1, 2, 3):
                assert all(torch.equal(a, b) for a, b in zip(first, topk(x, k, order=order), strict=True))


def test_every_alignment(topk):
    for dtype in DTYPES:
        backing = torch.full((5000,), 99.0, dtype=dtype)  # what lies around the rows would win
        for offset in range(9):
            for v in (57, 200):
                x = backing[offset : offset + 3 * (v + 11)].view(3, v + 11)[:, 3 : 3 + v]
                x.copy_(rows("gaussian", 3, v, seed=offset))
                for block in BLOCKS.values():
                    check(topk(x, 9, block=block), x, 9)
                x.fill_(99.0)


VALUES = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.5, -math.inf, 60000.0, 1e-7, math.inf])


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_exact_by_hypothesis(host_cuda, data):
    """Few distinct values, so that ties are everywhere; any k, width, padding, stride, block and order."""
    draw = data.draw
    v, n, step = draw(st.integers(1, 700)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 2]))
    dtype, block = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([*BLOCKS.values()]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    chosen = VALUES[torch.randperm(len(VALUES), generator=g)[: draw(st.integers(1, 9))]]
    wide = torch.full((n * step, v + 3), 9.0, dtype=dtype)
    wide[::step, :v] = chosen[torch.randint(0, len(chosen), (n, v), generator=g)].to(dtype)
    vocab = draw(st.integers(1, v))
    k = draw(st.integers(1, vocab))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_cuda", host_cuda)
        patch.setattr(cuda, "stream_of", lambda x: 8 + block)
        found = cuda_topk.topk(wide[::step], k, Side(vocab))
    check(found, wide[::step], k, vocab)


def test_scale_and_softcap_order_by_the_logits_they_make(topk):
    """Softcapped logits round to ties that the raw ones do not have, and a negative scale turns the order round."""
    x = rows("gaussian", 2, 1500) * 20
    for side in (Side(1400, 0.5, 3.0), Side(1500, -2.0, 0.0), Side(1500, 0.25, 30.0)):
        for block in BLOCKS.values():
            check_side(topk(x, 40, side=side, block=block), x, 40, side)


def test_the_rest_has_no_cancellation(topk):
    """A rest of 1e-12, and one of 1e-87, beside a top entry of nearly 1, also where it was in the buffer before."""
    for depth in (35.0, 200.0):
        for block in BLOCKS.values():
            x = torch.full((1, 3000), -depth)
            x[0, 7] = 0.0
            assert topk(x, 1, block=block)[2].item() == pytest.approx(math.log(2999) - depth, rel=1e-6)
            ramp = -depth - torch.arange(3000.0)[None] / 512
            ramp[0, :70] = 0.0
            rest = topk(ramp, 70, block=block)[2].item()
            truth = ramp[0, 70:].double().logsumexp(-1) - math.log(70)
            assert rest == pytest.approx(truth.item(), rel=1e-6)


@pytest.mark.parametrize("temperatures", [[], [0.5], [0.5, 2.0, 7.0, 1.5, 3.0]], ids=str)
@pytest.mark.parametrize("named", [True, False])
def test_tokens_and_temperatures(topk, named, temperatures):
    """The realised token's log-probability and rank, and the rest at other temperatures, in the same pass."""
    n, v, k = 4, 2503, 20
    for dtype in DTYPES:
        x = (rows("gaussian", n, v) / 2).to(dtype)
        tokens = torch.tensor([int(x[0].argmax()), 77, v - 1, -1]) if named else None
        for block in BLOCKS.values():
            topk(x[:0], k, block=block)  # sets the block
            check_with(cuda_topk.topk_with(x, k, Side(v), tokens, temperatures), x, k, tokens, temperatures)


def test_what_is_refused_is_said():
    facts = Facts("topk", torch.device("cuda"), torch.float32, 2**30 + 1, 4)
    assert "at most 1073741824 columns, not 1073741825" in cuda_topk.refuses(facts)
    assert "k up to 1024, not 2000" in cuda_topk.refuses(Facts("topk", torch.device("cuda"), torch.float32, 4000, 2000))
    if cuda._cuda is None:
        assert "is not built" in cuda_topk.refuses(Facts("topk", torch.device("cuda"), torch.float32, 40, 4))


def test_a_refused_launch_raises(topk):
    with pytest.raises(RuntimeError, match="the host has blocks 0 to 3"):
        topk(torch.zeros(1, 8), 1, block=7)
    assert topk(torch.empty(0, 8), 3)[0].shape == (0, 3)
