"""The command line: quick, without torch where none is needed, one clear line for an error."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

HEAVY = ("torch", "transformers", "pyarrow", "datasets", "triton", "matplotlib")


def potstill(*args: object, before: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the command in a new interpreter; `before` is code that runs first."""
    code = f"import sys\n{before}\nfrom potstill.cli import main\nmain(prog_name='potstill')"
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True)


def children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


NO_TORCH = "sys.modules.update(dict.fromkeys(('torch', 'transformers', 'pyarrow')))"  # importing one raises


def write_cache(folder: Path, sequences: int = 3) -> None:
    from potstill import cache

    rng = np.random.default_rng(0)
    with cache.Writer(folder, cache.Spec(vocab_size=100, k=4, teacher="t", tokenizer="x")) as writer:
        for i in range(sequences):
            length = 5 + i
            ids = np.stack([rng.permutation(100)[:4] for _ in range(length)]).astype(np.int32)
            log_probs = np.log(np.tile(np.array([0.4, 0.3, 0.1, 0.05], np.float32), (length, 1)))
            log_rest = np.log(np.full(length, 0.15, np.float32))
            top = SimpleNamespace(ids=ids, log_probs=log_probs, log_rest=log_rest)
            writer.add(f"s{i}", rng.integers(0, 100, length), top)


def test_help_is_quick_and_imports_nothing_heavy():
    check = f"import atexit; atexit.register(lambda: print('LOADED', *(set({HEAVY}) & set(sys.modules))))"
    seconds = []
    for _ in range(3):
        before = children_seconds()
        done = potstill("--help", before=check)
        seconds.append(children_seconds() - before)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().endswith("LOADED")
    for name in ("build", "inspect", "verify", "recover", "convert", "merge", "split", "card", "demo", "doctor"):
        assert f"\n  {name} " in done.stdout
    assert min(seconds) < 0.4  # of processor time: the other tests must not count


def test_help_of_the_tools_is_quick():  # one module holds them all
    check = f"import atexit; atexit.register(lambda: print('LOADED', *(set({HEAVY}) & set(sys.modules))))"
    seconds = []
    for _ in range(3):
        before = children_seconds()
        done = potstill("convert", "--help", before=check)
        seconds.append(children_seconds() - before)
        assert done.returncode == 0 and done.stdout.strip().endswith("LOADED"), done.stderr + done.stdout
    assert min(seconds) < 0.4


def test_every_listed_command_exists():
    from potstill.cli import COMMANDS, main

    for name in COMMANDS:
        command = main.get_command(None, name)
        assert command is not None and command.name == name


def test_import_potstill_imports_nothing_heavy():
    code = f"import sys, potstill; print(sorted(set({HEAVY}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_cache_tools_work_without_torch(tmp_path):
    write_cache(tmp_path / "cache")
    seen = potstill("inspect", tmp_path / "cache", "--json", before=NO_TORCH)
    assert seen.returncode == 0, seen.stderr
    assert json.loads(seen.stdout)["sequences"] == 3
    assert potstill("inspect", tmp_path / "cache", before=NO_TORCH).returncode == 0
    good = potstill("verify", tmp_path / "cache", before=NO_TORCH)
    assert good.returncode == 0 and "3 sequences" in good.stdout, good.stderr
    assert potstill("recover", tmp_path / "cache", before=NO_TORCH).returncode == 0
    from potstill import cache

    rows = np.zeros((9, 0))
    with cache.Writer(tmp_path / "none", cache.Spec(100, 0, token_log_probs=True)) as writer:  # rows of no entries
        top = SimpleNamespace(
            ids=rows.astype(int), log_probs=rows, log_rest=np.zeros(9), token_log_probs=np.full(9, -1.5)
        )
        writer.add("x", np.arange(9), top)
    commands = [["inspect", "none"], ["convert", "none", "none.jsonl"],
                ["convert", "cache", "rows.safetensors"], ["convert", "rows.safetensors", "back"],
                ["merge", "cache", "back", "both"], ["split", "both", "x", "y"], ["card", "both"]]  # fmt: skip
    code = f"import os, sys\n{NO_TORCH}\nos.chdir({str(tmp_path)!r})\nfrom potstill.cli import main\n"
    code += f"for c in {commands}: main.main(c, standalone_mode=False)\nmain(['verify', '--deep', 'both'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_verify_fails_on_a_damaged_cache_and_says_where(tmp_path):
    write_cache(tmp_path / "cache")
    shard = max((f for f in (tmp_path / "cache").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    bad = potstill("verify", tmp_path / "cache")
    assert bad.returncode == 1
    assert shard.name in bad.stderr and "Traceback" not in bad.stderr
    assert f"potstill recover {tmp_path / 'cache'}" in bad.stderr
    report = json.loads(potstill("verify", tmp_path / "cache", "--json").stdout)
    assert report["ok"] is False and len(report["problems"]) >= 1
    mended = potstill("recover", tmp_path / "cache")
    assert mended.returncode == 0 and f"\nlost: {shard.name}, " in mended.stdout
    assert "sequences taken over" in mended.stdout and "were in the cache already" in mended.stdout
    assert "potstill recover" not in mended.stdout  # that is what runs
    assert potstill("verify", tmp_path / "cache").returncode == 0


def test_errors_are_one_line(tmp_path):
    usage = potstill("verify", tmp_path / "nowhere")
    assert usage.returncode == 2 and "nowhere" in usage.stderr
    assert potstill("distil").returncode == 2
    for command in ("inspect", "verify"):  # a folder without a cache
        empty = potstill(command, tmp_path)
        assert empty.returncode == 1
        assert empty.stderr.startswith("Error: ") and empty.stderr.count("\n") == 1


def test_a_missing_optional_package_names_its_extra():
    from potstill.cli import missing

    error = missing(ModuleNotFoundError("No module named 'transformers'", name="transformers.models"))
    assert "pip install 'potstill[hf]'" in error.message
    with pytest.raises(ModuleNotFoundError):
        missing(ModuleNotFoundError("No module named 'potstill.nothing'", name="potstill.nothing"))


def test_an_error_is_a_line_and_a_traceback_on_demand(tmp_path):
    write_cache(tmp_path / "c")
    (tmp_path / "c" / "manifest.json").write_text("{")
    short = potstill("inspect", tmp_path / "c")
    whole = potstill("inspect", tmp_path / "c", before="import os; os.environ['POTSTILL_TRACEBACK'] = '1'")
    assert short.returncode == 1 and short.stderr.startswith("Error: ") and "Traceback" not in short.stderr
    assert whole.returncode == 1 and "Traceback" in whole.stderr and short.stderr[7:].strip() in whole.stderr
