"""Rank and world size as launchers give them, and builds by several processes that die and change their number."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter

import numpy as np
import potstill as ps
import pytest
import torch
from potstill.capture import Shard, build, open_text, rank_and_world, sequences, shard_of
from potstill.capture.plan import Groups

from ..forks import exit_code, fork

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none"}
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "2",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "3",
}


@pytest.mark.parametrize(
    "environ, shard, expected",
    [
        ({}, None, (0, 1)),
        ({}, "2/3", (2, 3)),
        ({}, (2, 3), (2, 3)),
        (TORCHRUN, None, (1, 4)),
        (TORCHRUN, "1/4", (1, 4)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "2/3", (2, 3)),  # accelerate launch with one process
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "3"}, None, (2, 3)),
        (SRUN, None, (2, 3)),  # the step's tasks, not the job's
        ({**SRUN, **TORCHRUN, "WORLD_SIZE": "6"}, None, (1, 6)),  # srun starts torchrun on each of 3 nodes
        ({**SRUN, **TORCHRUN, "WORLD_SIZE": "3"}, None, (1, 3)),  # nodes numbered as they arrived
        ({"PMI_RANK": "3", "PMI_SIZE": "5"}, None, (3, 5)),
        ({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "5"}, None, (3, 5)),
        # a batch script, and a shell of salloc: one process, whatever was granted
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None, (0, 1)),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, None, (0, 1)),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, "1/2", (1, 2)),
        ({**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, "1/2", (1, 2)),  # srun --pty bash
    ],
)
def test_rank_and_world(environ, shard, expected):
    rank, world, source = rank_and_world(shard, environ)
    assert (rank, world) == expected and source


@pytest.mark.parametrize(
    "environ, shard, sentence",
    [
        (TORCHRUN, "0/2", "--shard says rank 0 of 2, torchrun or accelerate says rank 1 of 4"),
        (SRUN, "0/3", "srun says rank 2 of 3"),
        ({**SRUN, **TORCHRUN}, None, "torchrun or accelerate says rank 1 of 4, srun says rank 2 of 3"),
        ({**SRUN, "RANK": "1", "WORLD_SIZE": "3"}, None, "srun says rank 2 of 3"),  # a RANK left over, no torchrun
        ({"RANK": "4", "WORLD_SIZE": "4"}, None, "rank 4 of 4"),
        ({"RANK": "1"}, None, "RANK is set and WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, None, "WORLD_SIZE is set and RANK is not"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, None, "integers are needed"),
        ({}, "3/3", "rank 3 of 3"),
        ({}, "1", "I/N is accepted"),
        ({}, "-1/2", "I/N is accepted"),
        ({}, "a/b", "I/N is accepted"),
    ],
)
def test_what_contradicts_is_refused(environ, shard, sentence):
    with pytest.raises(ValueError, match=sentence):
        rank_and_world(shard, environ)


def test_the_plan_depends_on_keys_alone_and_is_even():
    keys = [f"doc{i}.txt#{i}" for i in range(4000)]
    for world in (1, 2, 3, 8):
        shares = Counter(shard_of(key, world) for key in keys)
        assert sorted(shares) == list(range(world))
        assert all(abs(n - 4000 / world) < 5 * (4000 / world) ** 0.5 for n in shares.values()), shares
        owners = [[Shard(rank, world).owns(key) for rank in range(world)] for key in keys[:100]]
        assert all(sum(o) == 1 for o in owners)
    # written down: processes of other machines and versions must agree
    assert [shard_of(key, 1000) for key in ("a#0", "docs/ä.txt#1024")] == [323, 335]
    with pytest.raises(ValueError, match="at least 1 process"):
        shard_of("a", 0)


def test_teams_share_out_groups_evenly_and_without_asking():
    sizes = np.random.default_rng(0).integers(1, 1000, 400).tolist()
    for world, count, teams in (
        (8, 400, 8),
        (8, 100, 4),
        (6, 100, 6),
        (7, 111, 1),
        (7, 112, 7),
        (4, None, 1),
        (1, 400, 1),
    ):
        processes = [Groups(Shard(rank, world), count) for rank in range(world)]
        assert all(p.teams == teams for p in processes)
        assert {(p.team, p.within[:2]) for p in processes} == {
            (team, (rank, world // teams)) for team in range(teams) for rank in range(world // teams)
        }
        shares = [0] * teams
        for size in sizes:
            owners = {p.team for p in processes if p.owns_next(size)}
            assert len(owners) == 1
            shares[owners.pop()] += size
        assert max(shares) - min(shares) <= 1000


OPTIONS = {"k": 8, "length": 32, "pack": False, "batch_size": 2, "commit_seconds": 0.0}


def ranks(world, model, tokenizer, corpus, out, reports, *, die_at=None, **options):
    """`world` forked builds; with die_at[rank], that rank kills itself before so many forward passes. Exit codes."""
    module = sys.modules[build.__module__]
    forward = module._teacher_rows

    def one(rank):
        torch.set_num_threads(1)
        calls = 0

        def mortal(*args):
            nonlocal calls
            if die_at is not None and calls == die_at[rank]:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1
            return forward(*args)

        module._teacher_rows = mortal
        report = build(model, tokenizer, open_text(corpus), out, shard=(rank, world), **{**OPTIONS, **options})
        (reports / f"{world}-{rank}.json").write_text(json.dumps(report.new_sequences))

    return [exit_code(pid) for pid in [fork(lambda r=r: one(r)) for r in range(world)]]


@pytest.mark.parametrize("group_bytes, pack", [(None, False), (40, False), (40, True)])
def test_killed_at_world_size_2_and_resumed_with_3(group_bytes, pack, model, tokenizer, corpus, tmp_path, monkeypatch):
    if group_bytes:  # 55 groups of documents, enough for 3 teams
        monkeypatch.setattr(sequences, "GROUP_BYTES", group_bytes)
        assert sequences.groups_of(open_text(corpus), Shard(0, 3), None).teams == 3
    build(model, tokenizer, open_text(corpus), tmp_path / "single", **{**OPTIONS, "pack": pack})
    single, out = ps.cache.open(tmp_path / "single"), tmp_path / "c"
    died = ranks(2, model, tokenizer, corpus, out, tmp_path, die_at=[2, 4], pack=pack)
    assert died == [-signal.SIGKILL] * 2
    kept = ps.cache.open(out)
    assert 0 < len(kept) < len(single) and kept.verify().ok
    assert ranks(3, model, tokenizer, corpus, out, tmp_path, pack=pack) == [0, 0, 0]
    new = [json.loads((tmp_path / f"3-{rank}.json").read_text()) for rank in range(3)]
    assert min(new) > 0 and sum(new) == len(single) - len(kept), "a committed sequence was built again"
    whole = ps.cache.open(out)
    assert whole.verify().ok and sorted(whole.keys()) == sorted(single.keys())
    assert len(whole.keys()) == len(set(whole.keys()))
    for key in single.keys():  # and the same bits, since batches do not depend on the world
        for a, b in zip(whole.numpy(key), single.numpy(key), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=key)


def test_the_command_takes_its_part_and_says_so(model_folder, corpus, tmp_path):
    from click.testing import CliRunner
    from potstill.cli import main

    def call(*words, **environ):
        words = [
            "build",
            model_folder,
            corpus,
            tmp_path / "c",
            "--k",
            8,
            "--length",
            32,
            "--device",
            "cpu",
            "--quiet",
            *words,
        ]
        return CliRunner().invoke(main, list(map(str, words)), env=environ)

    for rank in range(2):
        done = call(RANK=str(rank), WORLD_SIZE="2")
        assert done.exit_code == 0 and f"part {rank}/2 (torchrun or accelerate)" in done.output, done.output
    parts = len(ps.cache.open(tmp_path / "c"))
    again = call()
    assert (
        again.exit_code == 0 and "this run: 0 sequences" in again.output and len(ps.cache.open(tmp_path / "c")) == parts
    )
    refused = call("--shard", "0/3", RANK="1", WORLD_SIZE="2")
    assert refused.exit_code == 1 and "--shard says rank 0 of 3" in refused.output and "Traceback" not in refused.output
