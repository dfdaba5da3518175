"""Shards of the vocabulary over processes: loss and gradients equal to one process, the loss the same in every bit."""

from __future__ import annotations

import pytest
import shard_work


@pytest.mark.parametrize("world", [2, 3])
def test_shards_give_what_one_process_gives(world, in_processes):
    in_processes(world, shard_work.engine)
