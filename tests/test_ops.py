"""The registry of ops and of the kernels behind them."""

from __future__ import annotations

import pytest
import torch
from potstill.ops import losses as ops


def test_every_op_has_a_fake_and_a_derivative():
    assert set(ops.SCHEMAS) == set(ops.FAKES) == set(ops.AUTOGRAD)


def test_total_refusal_prints_every_sentence():
    from potstill import dispatch

    with pytest.raises(ValueError, match="no backend serves 'dense_rows' for torch.int64") as caught:
        dispatch.select(dispatch.Facts("dense_rows", torch.device("cpu"), torch.int64))
    for backend in ("cpp", "triton", "cuda", "torch"):
        assert f"\n  {backend}: " in str(caught.value)


def test_losses_work_without_the_extensions():
    """The plain torch backend serves where _cpp and _rust are not built."""
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['potstill._cpp'] = None; sys.modules['potstill._rust'] = None\n"
        "import torch, potstill as ps\n"
        "h = torch.randn(3, 4, requires_grad=True)\n"
        "ps.linear_distill_loss(h, torch.randn(9, 4), ps.topk(torch.randn(3, 9), 2)).backward()\n"
        "assert h.grad.abs().sum() > 0\n"
        "try: ps.topk(torch.randn(2, 9), 2, backend='cpp')\n"
        "except ValueError as e: assert 'not built' in str(e), e\n"
        "else: raise SystemExit('cpp served')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
