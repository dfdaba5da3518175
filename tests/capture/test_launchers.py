"""`potstill build` under the launchers themselves: the same sequences and rows as one process, bit for bit but
for the order of entries whose stored log-probabilities are equal, which each shard chooses.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import potstill as ps
import pytest
import torch
from click.testing import CliRunner
from potstill.capture import build, open_text
from potstill.cli import main

from .test_build import assert_same_content

OPTIONS = {"k": 8, "length": 24, "batch_size": 2}
WORDS = ["--k", 8, "--length", 24, "--batch-size", 2, "--device", "cpu", "--quiet"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(12):
        (folder / f"{number:02d}.txt").write_text(f"file {number} says: " + "été and water, " * (number + 1))
    return folder


@pytest.fixture(scope="module")
def single(model, tokenizer, texts, tmp_path_factory):
    """The cache of one process, in this one, with as many threads as the launched ones have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        out = tmp_path_factory.mktemp("single") / "c"
        build(model, tokenizer, open_text(texts), out, teacher=None, **OPTIONS)
    finally:
        torch.set_num_threads(before)
    return ps.cache.open(out)


def assert_equal(single, out):
    found = ps.cache.open(out)
    assert found.verify().ok and sorted(found.keys()) == sorted(single.keys()) and len(found) > 20
    assert_same_content(found, single)


def launch(launcher, model_folder, texts, out, **environ):
    """Runs `launcher` in front of the command; what it printed."""
    rootless = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "RANK", "WORLD", "MASTER"))}
    done = subprocess.run(
        [*launcher, "build", *map(str, (model_folder, texts, out, *WORDS))],
        env={**rootless, "OMP_NUM_THREADS": "1", **environ},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.nightly
def test_torchrun(model_folder, texts, single, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    said = launch([*torchrun, "--module", "potstill.cli"], model_folder, texts, tmp_path / "c")
    assert all(f"part {rank}/2 (torchrun or accelerate)" in said for rank in range(2))
    assert_equal(single, tmp_path / "c")


@pytest.mark.slow
def test_accelerate_launch(model_folder, texts, single, tmp_path):
    """accelerate starts torchrun, so this is both."""
    words = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    words += ["--main_process_port=0", "--module", "potstill.cli"]  # several processes of one machine, cards or not
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", *words]
    home = str(tmp_path / "home")  # no configuration of the machine's user
    said = launch(accelerate, model_folder, texts, tmp_path / "c", HF_HOME=home)
    assert all(f"part {rank}/2 (torchrun or accelerate)" in said for rank in range(2))
    assert_equal(single, tmp_path / "c")


def test_srun_and_parts_by_hand(model_folder, texts, single, tmp_path):
    """Three tasks of srun, by the variables that it sets; then another folder by two parts of --shard."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for rank in range(3):
            job = {"SLURM_JOB_ID": "9", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "3", "SLURM_STEP_NUM_TASKS": "3"}
            call(model_folder, texts, tmp_path / "c", SLURM_PROCID=str(rank), **job)
        for part in ("1/2", "0/2"):
            call(model_folder, texts, tmp_path / "d", "--shard", part)
    finally:
        torch.set_num_threads(before)
    assert_equal(single, tmp_path / "c")
    assert_equal(single, tmp_path / "d")


def call(model_folder, texts, out, *more, **environ):
    done = CliRunner().invoke(main, ["build", *map(str, (model_folder, texts, out, *WORDS, *more))], env=environ)
    assert done.exit_code == 0, done.output
