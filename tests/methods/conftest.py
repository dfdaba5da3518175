"""Fixtures of the methods' tests: value and gradient against a plain formula, and the largest allocation."""

from __future__ import annotations

import contextlib

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
