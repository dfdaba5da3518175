"""Fixtures of the methods' tests: a plain formula's value and gradient, the largest allocation, the miniatures."""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture
def agree():
    """agree(got, expected, leaves): the same value, and the same gradient of every leaf, in fp64 to 1e-10."""

    def check(got, expected, leaves, rtol=1e-10):
        leaves = list(leaves)
        torch.testing.assert_close(got, expected, rtol=rtol, atol=1e-13)
        gots, truths = (torch.autograd.grad(x, leaves, retain_graph=True, allow_unused=True) for x in (got, expected))
        for leaf, g, e in zip(leaves, gots, truths, strict=True):
            assert (g is None) == (e is None), f"one side has no gradient for a leaf of shape {list(leaf.shape)}"
            if e is not None and g is not None:
                torch.testing.assert_close(g, e, rtol=rtol, atol=rtol * max(1e-3, e.abs().max().item()))

    return check


@pytest.fixture
def largest():
    """with largest() as made: ...; made[0] is the most bytes that one operation of torch kept, backward included."""

    @contextlib.contextmanager
    def watch():
        made = [0]
        with torch.autograd.profiler.profile(profile_memory=True) as seen:
            yield made
        made[0] = max(event.self_cpu_memory_usage for event in seen.function_events)

    return watch


@pytest.fixture(scope="module")
def load():
    """Imports a module of examples/methods, as running a script there would."""
    folder = Path(__file__).parents[2] / "examples" / "methods"
    sys.path.insert(0, str(folder))
    before = set(sys.modules)
    yield importlib.import_module
    sys.path.remove(str(folder))
    for name in set(sys.modules) - before:
        if (folder / f"{name}.py").exists():
            del sys.modules[name]
