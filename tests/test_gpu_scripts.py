"""bench/gpu_*.py end to end on a CPU with tiny shapes: what they check, time and write does not first run on a card."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

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
    rows = list(csv.DictReader(open(tmp_path / "x.csv")))
    assert kernel in {r["kernel_name"] for r in rows if r["metric_name"] == "speed"}
    assert (tmp_path / "x.png").stat().st_size > 5000
    assert sorted(f.name for f in tmp_path.iterdir()) == ["x.csv", "x.json", "x.png"]  # few files: they are fetched


@pytest.fixture
def frame(tmp_path):
    """bench/gpu_bench.py as a module, and arguments of a tiny run on the CPU."""
    spec = importlib.util.spec_from_file_location("gpu_bench", ROOT / "bench" / "gpu_bench.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    chosen = dict(out=tmp_path / "x.json", seconds=60.0, device=torch.device("cpu"), tiny=True, resume=False)
    return module, SimpleNamespace(**chosen)


ABOUT = dict(kernel="k", mode="full", rows=1, vocab=2, dtype="float32")


def breaks(after):
    """A variant whose call number `after` and all later ones fail, as a compiler's or the device's errors would."""
    calls = iter(range(1000))

    def call():
        if next(calls) >= after:
            raise ZeroDivisionError("broken")
        return torch.ones(3)

    return call


def cases(variants, floor=lambda: None):
    def section(bench):
        for name in ("first", "second"):
            bench.case(name, {"eager": lambda: torch.ones(3)} | variants(), floor, lambda out: out, 1e-6, **ABOUT)

    return {"cases": section}


def rows_of(chosen):
    return {(r["case"], r.get("variant")): r for r in json.loads(chosen.out.read_text())["gpu"]}


@pytest.mark.parametrize("after", [0, 1, 3], ids=["when checked", "when its memory is read", "when timed"])
def test_a_variant_that_fails_loses_no_other(frame, after):
    module, chosen = frame
    assert module.run(chosen, 5, cases(lambda: {"bad": breaks(after)})) == 1
    rows = rows_of(chosen)
    for case in ("first", "second"):
        assert rows[case, "eager"]["over_floor"] > 0
        assert "ZeroDivisionError" in rows[case, "bad"]["failed"] and "ms" not in rows[case, "bad"]


def test_without_a_floor_there_are_times(frame):
    module, chosen = frame
    module.run(chosen, 5, cases(dict, floor=breaks(0)))
    assert all(row["ms"] > 0 and "over_floor" not in row for row in rows_of(chosen).values())


def test_a_section_that_fails_loses_no_other(frame):
    module, chosen = frame
    sections = {"no memory": lambda bench: torch.ones(2) @ torch.ones(3)} | cases(dict)
    assert module.run(chosen, 5, sections) == 1
    assert rows_of(chosen)["first", "eager"]["ms"] > 0 and "failed" in rows_of(chosen)["no memory", "set-up"]


def test_a_lost_device_is_said_and_the_rest_runs_without_its_cause(frame, monkeypatch):
    module, chosen = frame
    monkeypatch.setattr(module.Bench, "alive", lambda self: False)
    assert module.run(chosen, 5, cases(lambda: {"bad": breaks(0)})) == module.DEVICE_LOST
    assert ("second", "eager") not in rows_of(chosen)
    chosen.resume = True
    assert module.run(chosen, 5, cases(lambda: {"bad": breaks(0)})) == 1
    rows = rows_of(chosen)
    assert rows["first", "eager"]["ms"] > 0 and rows["second", "eager"]["ms"] > 0
    assert rows["first", "bad"]["lost"] and ("second", "bad") not in rows


def test_an_interrupt_keeps_what_was_measured(frame):
    module, chosen = frame

    def stop():
        raise KeyboardInterrupt

    def section(bench):
        bench.case("first", {"eager": lambda: torch.ones(3)}, lambda: None, lambda out: out, 1e-6, **ABOUT)
        bench.case("second", {"eager": stop}, lambda: None, lambda out: out, 1e-6, **ABOUT)

    with pytest.raises(KeyboardInterrupt):
        module.run(chosen, 5, {"cases": section})
    assert rows_of(chosen)["first", "eager"]["ms"] > 0 and chosen.out.with_suffix(".csv").exists()


def test_records_need_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    from potstill.bench.records import commit

    assert commit() == ""


def test_the_shell_script_names_only_what_is_there():
    text = (ROOT / "bench" / "gpu.sh").read_text()
    for word in text.split():
        if word.startswith(("bench/", "tests/")) and "*" not in word:
            assert (ROOT / word).exists(), word


def run_script(tmp_path, python: str, **more: str):
    """bench/gpu.sh with a stand-in for the interpreter: prints its arguments, and does what `python` says."""
    fake = tmp_path / "python"
    fake.write_text(f'#!/usr/bin/env bash\ncase "$*" in *get_device_capability*) echo 90; exit;; esac\n{python}\n')
    fake.chmod(0o755)
    environment = os.environ | {"PYTHON": str(fake), "OUT": str(tmp_path / "out")} | more
    done = subprocess.run(["bash", ROOT / "bench" / "gpu.sh"], env=environment, capture_output=True, text=True)
    return done, (tmp_path / "out" / "log.txt").read_text()


def test_the_steps_of_the_shell_script(tmp_path):
    done, log = run_script(tmp_path, 'echo "ran $*"')
    assert done.returncode == 0 and "all steps passed" in log, log
    for step in ("build", "tests", "losses", "topk"):
        assert f"== {step}: exit 0" in log
    assert "gpu_losses.py --out" in log and "-m gpu" in log and "--build-lib" in log


def test_a_step_that_fails_or_hangs_stops_no_other(tmp_path):
    hang = 'trap "echo interrupted; exit 2" INT; for i in $(seq 600); do sleep .1; done'
    broken = f'case "$*" in *setup.py*) exit 1;; *pytest*) {hang};; esac'
    done, log = run_script(tmp_path, broken, LIMIT="8")
    assert done.returncode == 1 and "failed: build tests" in log, log
    assert "interrupted" in log and "not run, the time is used up" in log


def test_a_lost_device_is_followed_by_the_rest(tmp_path):
    done, log = run_script(tmp_path, 'case "$*" in *resume*) exit 0;; *gpu_losses*) exit 3;; esac')
    assert "losses, the rest: exit 0" in log and "== topk: exit 0" in log and done.returncode == 1


@pytest.mark.nightly
def test_the_gpu_tests_are_collected_without_the_rust_extension():
    """One module that needs it would stop the whole run on a machine without Rust."""
    (line,) = [x for x in (ROOT / "bench" / "gpu.sh").read_text().splitlines() if x.startswith("step tests ")]
    folder, pattern = line.split()[-2:]
    chosen = [folder, *(str(file) for file in sorted(ROOT.glob(pattern)))]
    code = "import sys; sys.modules['potstill._rust'] = sys.modules['potstill._cpp'] = None\nimport pytest\n"
    code += f"sys.exit(pytest.main({['-q', '-m', 'gpu', '--collect-only', *chosen]}))"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "tests collected" in done.stdout, done.stdout[-3000:]
