"""Shared fixtures: devices, poisoned allocations, and the oracle's tolerance."""

from __future__ import annotations

import contextlib
import os
import random
import sys

import numpy as np
import pytest
import torch
from potstill import gemm

torch.set_num_threads(1)  # the tests run several processes side by side

# every run draws the same; POTSTILL_TEST_RANDOM=1 draws anew, as the nightly leg does
DRAWN_ANEW = os.environ.get("POTSTILL_TEST_RANDOM") == "1"
with contextlib.suppress(ImportError):  # a machine with a GPU may lack it
    import hypothesis

    hypothesis.settings.register_profile("same", derandomize=True)
    if not DRAWN_ANEW:
        hypothesis.settings.load_profile("same")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test's draws do not depend on which tests its process ran before."""
    if not DRAWN_ANEW:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """An error on the device is its test's, and ends the process: all that followed there would fail too."""
    if not item.get_closest_marker("gpu") or not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"\n{item.nodeid} took the device down: {error}", file=sys.__stderr__, flush=True)
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(3)  # xdist goes on with a new worker
        pytest.exit("the device is lost", returncode=3)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and its kin hold NaN, so that a value nobody wrote cannot pass for a result."""

    def poison(original):
        def allocate(*args, **kwargs):
            out = original(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return allocate

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


@pytest.fixture(params=["widened", "native"])
def bf16_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways in which CPUs multiply 16-bit matrices, whichever this one is."""
    monkeypatch.setattr(gemm, "cpu_has_native", lambda dtype: request.param == "native")
    return request.param


@pytest.fixture
def no_worse():
    """no_worse(got, plain, truth): got's error against fp64 is at most 3 times plain torch's, plus a floor.

    The floor is `floor` times the largest value of the truth: a few roundings of the compute type.
    """

    def check(got: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, floor: float = 2e-6) -> None:
        truth = truth.double()
        assert not got.isnan().any(), f"NaN in {got}"
        error = (got.double() - truth).abs().max().item()
        allowed = 3 * (plain.double() - truth).abs().max().item() + floor * truth.abs().max().item() + 1e-30
        assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"

    return check
