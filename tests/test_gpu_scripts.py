"""bench/gpu_*.py end to end on a CPU with tiny shapes: what they check, time and write does not first run on a card."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("script, kernel", [("gpu_losses", "linear_distill_loss_dense"), ("gpu_topk", "topk")])
def test_a_tiny_run_writes_json_csv_records_and_plots(script, kernel, tmp_path):
    command = [
        sys.executable,
        ROOT / "bench" / f"{script}.py",
        "--tiny",
        "--device",
        "cpu",
        "--out",
        tmp_path / "x.json",
    ]
    path = os.pathsep.join([str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "x.json").read_text())
    timed = [row for row in found["gpu"] if "ms" in row]
    assert timed and all(row["over_floor"] > 0 for row in timed) and not [r for r in found["gpu"] if "wrong" in r]
    rows = list(csv.DictReader(open(tmp_path / "x.records.csv")))
    assert kernel in {r["kernel_name"] for r in rows if r["metric_name"] == "speed"}
    assert (tmp_path / "x_plots" / "gpu.png").stat().st_size > 5000


def test_the_shell_script_names_only_what_is_there():
    text = (ROOT / "bench" / "gpu.sh").read_text()
    for word in text.split():
        if word.startswith(("bench/", "tests/")) and "*" not in word:
            assert (ROOT / word).exists(), word
