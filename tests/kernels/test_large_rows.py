"""Row kernels over more than 2^31 elements on a card, in place: every repetition of seven rows gives the same bits.

A few repetitions on the CPU hold the test itself to the reference.
"""

from __future__ import annotations

import pytest
import torch
from potstill import divergences
from potstill.dispatch import kernels
from potstill.rows import RowSpec, Side

UNIQUE, K = 7, 64


def kernel(op, backend):
    return next(k for k in kernels(op) if k.backend == backend).run


@pytest.mark.parametrize("form", ["dense", "sparse"])
@pytest.mark.parametrize(
    "backend, device, vocab, times",
    [
        pytest.param("cpp", "cpu", 1_003, 3, id="cpp"),
        pytest.param("triton", "cuda", 151_936, 2_021, id="triton", marks=pytest.mark.gpu),
        pytest.param("cuda", "cuda", 151_936, 2_021, id="cuda", marks=pytest.mark.gpu),
    ],
)
def test_pitfall_18_every_repetition_is_the_first(form, backend, device, vocab, times):
    g = torch.Generator().manual_seed(0)
    base = (torch.randn(UNIQUE, vocab, generator=g) * 3).bfloat16().to(device)
    other = (torch.randn(UNIQUE, vocab, generator=g) * 3).bfloat16().to(device)
    log_probs = other.float().log_softmax(-1)
    top = log_probs.topk(K, -1)
    rest = log_probs.scatter(1, top.indices, float("-inf")).logsumexp(-1)
    entries = (top.indices.int(), top.values.contiguous(), rest)
    side = Side(vocab)
    spec = RowSpec(divergences.get("jsd"), side, side if form == "dense" else None)
    op, rows = f"{form}_rows", UNIQUE * times
    if device == "cuda":
        assert rows * vocab > 2**31
        if torch.cuda.mem_get_info()[0] < 12 << 30:
            pytest.skip("needs 12 GB of device memory")

    x = base.repeat(times, 1)
    plain = (other,) if form == "dense" else entries
    parts = tuple(part.repeat(times, *[1] * (part.dim() - 1)) for part in plain)
    out = kernel(op, backend)(x, *parts, torch.ones(rows, device=device), None, spec, x)
    blocks, values = x.view(times, UNIQUE, vocab), out.view(2, times, UNIQUE)
    assert all(torch.equal(block, blocks[0]) for block in blocks)  # one at a time: no mask of all of them
    assert torch.equal(values, values[:, :1].expand_as(values))

    grad = torch.empty_like(base, dtype=torch.float32)
    want = kernel(op, "torch")(base.float(), *(p.float() if p.is_floating_point() else p for p in plain),
                               torch.ones(UNIQUE, device=device), None, spec, grad)  # fmt: skip
    torch.testing.assert_close(values[:, 0], want, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(blocks[0].float(), grad, rtol=1e-2, atol=1e-6)
