"""Data-parallel heads in shards (FSDP2), gathered once a step: loss and gradients equal to one process."""

from __future__ import annotations

import head_work
import pytest
from torch.distributed.fsdp import FSDPModule


@pytest.mark.skipif(not hasattr(FSDPModule, "set_reshard_after_forward"), reason="not of FSDP2 in torch 2.6")
@pytest.mark.parametrize("world", [2, 3])
def test_pitfall_33_a_sharded_head_trains_and_evaluates(world, in_processes):
    in_processes(world, head_work.fsdp2)


def test_data_parallel_with_one_denominator(in_processes):
    in_processes(2, head_work.ddp)
