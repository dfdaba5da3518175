"""Triton top-k in the interpreter (see ../test_triton_rows.py); on a GPU, ../test_topk_gpu.py runs it."""

import os

import pytest
import torch
from potstill.dispatch import Facts, explain, select
from potstill.rows import Side

from ...topk_cases import KINDS, check, check_side, check_with, rows

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="run by tests/kernels/test_triton_rows.py")


@pytest.fixture
def triton_topk(monkeypatch):
    from potstill.kernels import triton_topk

    monkeypatch.setattr(triton_topk, "BLOCK", 256)  # a few blocks a row, the last one partial
    monkeypatch.setattr(triton_topk, "SHORTEST", 64)
    return triton_topk


@pytest.mark.parametrize("kind", KINDS)
def test_topk_is_exact(triton_topk, poisoned, kind):
    for dtype, v, k in ((torch.float32, 523, 7), (torch.bfloat16, 301, 20)):
        x = rows(kind, 2, v).to(dtype)
        check(triton_topk.topk(x, k, Side(v)), x, k, what=f"{dtype} {v} {k}")


def test_topk_of_many_and_of_all(triton_topk):
    for v, k in ((300, 100), (40, 40), (1, 1)):
        x = rows("steps", 1, v)
        check(triton_topk.topk(x, k, Side(v)), x, k)


def test_topk_where_the_largest_share_few_places(triton_topk):
    """More at the first bound than the list holds, and not by ties: the bound is found by counting."""
    x = torch.randn(1, 1024)
    for block in range(4):
        x[0, block * 256 : block * 256 + 20] = 10 + torch.arange(20.0) + block / 1024
    check(triton_topk.topk(x, 20, Side(1024)), x, 20)
    y = x.clone()
    y[0, [5, 261, 517]] = torch.nan  # and one that the count goes up to
    check(triton_topk.topk(y, 20, Side(1024)), y, 20)
    low = torch.full((1, 1024), -torch.inf)  # a first bound far below the bound looked for, which others share
    for block in range(4):
        low[0, block * 256 : block * 256 + 30] = 3.0 + torch.arange(30.0) % 3
    low[0, 19] = low[0, 18] = -torch.inf
    check(triton_topk.topk(low, 20, Side(1024)), low, 20)


def test_topk_in_parts(triton_topk, monkeypatch):
    """Rows beyond what the lists of one launch hold, of a strided view with padding."""
    monkeypatch.setattr(triton_topk, "SCRATCH", 4 * 64 * 2)
    x = rows("gaussian", 10, 330)[::2, 3:]
    check(triton_topk.topk(x, 5, Side(311)), x, 5, vocab=311)
    assert triton_topk.topk(x[:0], 5, Side(311))[0].shape == (0, 5)


def test_topk_with_scale_and_softcap(triton_topk):
    x = rows("gaussian", 2, 400) * 20
    for side in (Side(380, 0.5, 3.0), Side(400, -2.0, 0.0)):
        check_side(triton_topk.topk(x, 30, side), x, 30, side)


@pytest.mark.parametrize("temperatures", [[], [0.5, 2.0]], ids=str)
def test_topk_with_tokens_and_temperatures(triton_topk, temperatures):
    x = rows("gaussian", 3, 523) / 2
    tokens = torch.tensor([int(x[0].argmax()), -1, 522])
    for named in (tokens, None):
        check_with(triton_topk.topk_with(x, 9, Side(523), named, temperatures), x, 9, named, temperatures)


def test_topk_auto_does_not_interpret():
    facts = Facts("topk", torch.device("cpu"), torch.float32, 100, 4)
    assert select(facts).backend != "triton" and select(facts, "triton").backend == "triton"
    assert "torch serves fp64" in dict(explain(Facts("topk", torch.device("cpu"), torch.float64, 100, 4)))["triton"]
