"""Shards of the vocabulary over processes: loss and gradients equal to one process, the loss the same in every bit."""

from __future__ import annotations

import pytest
import shard_work


@pytest.mark.parametrize("world", [2, 3])
def test_shards_give_what_one_process_gives(world, in_processes):
    in_processes(world, shard_work.engine)


@pytest.mark.parametrize("world", [2, 3])
def test_the_public_loss_with_a_head_in_shards(world, in_processes):
    in_processes(world, shard_work.public)


def test_shards_that_do_not_fit_are_refused_in_every_process(in_processes):
    in_processes(2, shard_work.refused)
