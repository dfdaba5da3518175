"""The forms a teacher can take."""

from __future__ import annotations

from dataclasses import replace

import potstill as ps
import pytest
import torch


def test_topk_moves_and_indexes_as_one():
    top = ps.topk(torch.randn(3, 5, 20), 4)
    mask = torch.rand(3, 5) > 0.5
    part = top[mask]
    assert part.ids.shape == (int(mask.sum()), 4) and part.log_rest.shape == (int(mask.sum()),)
    assert torch.equal(part.log_probs, top.log_probs[mask])
    assert top.to("cpu").k == 4 and top.counts is None and top.to("cpu").counts is None


def test_topk_carries_every_tensor():
    """What is moved or indexed takes the realised token and the rest at other temperatures along."""
    top = ps.topk(torch.randn(3, 5, 20), 4)
    full = replace(
        top, token_log_probs=torch.randn(3, 5), token_ranks=torch.arange(15).view(3, 5),
        log_rest_at={2.0: torch.randn(3, 5)}, counts=torch.ones(3, 5, 4), sample_temperature=0.8,
    )  # fmt: skip
    for part, pick in ((full[1], lambda x: x[1]), (full.to("cpu"), lambda x: x)):
        for name in ("ids", "log_probs", "log_rest", "lse", "counts", "token_log_probs", "token_ranks"):
            assert torch.equal(getattr(part, name), pick(getattr(full, name))), name
        assert list(part.log_rest_at) == [2.0] and torch.equal(part.log_rest_at[2.0], pick(full.log_rest_at[2.0]))
        assert part.sample_temperature == 0.8
    assert full.to("meta").log_rest_at[2.0].is_meta and top.log_rest_at == {}
    for name in ("token_log_probs", "token_ranks"):
        with pytest.raises(ValueError, match=rf"{name} has shape \[3\]; it must be \[3, 5\]"):
            replace(full, **{name: torch.zeros(3)})
    with pytest.raises(ValueError, match=r"log_rest_at\[2.0\] has shape \[3, 5, 1\]"):
        replace(full, log_rest_at={2.0: torch.randn(3, 5, 1)})
    with pytest.raises(ValueError, match="log_rest_at names the temperature 0.0"):
        replace(full, log_rest_at={0.0: torch.randn(3, 5)})
    with pytest.raises(ValueError, match="sample_temperature names the temperature inf"):
        replace(full, sample_temperature=float("inf"))
