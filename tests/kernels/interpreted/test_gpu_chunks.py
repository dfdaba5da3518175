"""Sums over chunks by Triton against the plain ones, interpreted (see ../test_triton_rows.py) and on a GPU."""

import os

import pytest
import torch
from potstill.dispatch import kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OLD = torch.__version__.startswith("2.6.")  # and with it Triton 3.2
TARGETS = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="run by tests/kernels/test_triton_rows.py")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")]),
]


def backend(op, name):
    return next(k for k in kernels(op) if k.backend == name).run


@pytest.mark.skipif(INTERPRETED and OLD, reason="the interpreter of Triton 3.2 has no one-bit constants")
@pytest.mark.parametrize("device", TARGETS)
@pytest.mark.parametrize("count", [0, 1, 130])
def test_sums_and_gradient(count, device):
    g = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, 6, (count,), generator=g)
    chunk = torch.repeat_interleave(torch.arange(count), lengths).int()
    chunk = torch.cat([torch.tensor([-1, -1], dtype=torch.int32), chunk, torch.tensor([-1], dtype=torch.int32)])
    ends = 2 + lengths.cumsum(0)
    starts = ends - lengths
    inside = (torch.rand(len(chunk), generator=g) < 0.2) & (torch.arange(len(chunk)) > 5)
    chunk[inside] = -1  # special tokens inside a chunk
    values = torch.randn(len(chunk), generator=g) - 0.5
    values[-1] = 0.0
    given = [x.to(device) for x in (values, chunk, starts, ends)]
    want = backend("chunk_sums", "torch")(values.double(), chunk, starts, ends)
    torch.testing.assert_close(backend("chunk_sums", "triton")(*given).cpu().double(), want, rtol=1e-5, atol=1e-6)
    up = torch.randn(count, generator=g)
    got = backend("chunk_sums_backward", "triton")(up.to(device), given[0], given[1])
    assert torch.equal(got.cpu(), backend("chunk_sums_backward", "torch")(up, values, chunk))
