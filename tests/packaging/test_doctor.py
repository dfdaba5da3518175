"""potstill doctor: content with a whole installation, and clear about what is wrong with a broken one."""

from __future__ import annotations

import importlib
import json

import pytest
from potstill import dispatch, doctor


def test_a_whole_installation_is_well(capsys):
    assert doctor.report() == 0
    text = capsys.readouterr().out
    assert text.endswith("all is well\n")
    assert all(word in text for word in ("_cpp", "_rust", "_cuda"))
    served = {line.split()[0]: line for line in text.splitlines() if line.startswith("  ")}
    assert {*dispatch.ops()} <= {*served} and "cpp" in served["dense_rows"]
    assert "no: " not in text and len(text.splitlines()) < 60
    assert doctor.report(reasons=True) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("dense_rows, cpu", "dense_rows, cuda", "no: ")) and "dense_rows  " in text


def test_json_tells_every_op_device_and_dtype(capsys):
    assert doctor.report(as_json=True) == 0
    facts = json.loads(capsys.readouterr().out)
    kinds = {(row["op"], row["device"], row["dtype"]) for row in facts["backends"]}
    assert len(kinds) == len(dispatch.ops()) * 2 * len(doctor.DTYPES) == len(facts["backends"])
    for row in facts["backends"]:
        assert row["serves"] == next((name for name, refusal in row["answers"] if refusal is None), None)


@pytest.mark.parametrize("name", ["_cpp", "_rust"])
def test_a_missing_extension_is_a_problem(name, monkeypatch, tmp_path, capsys):
    real = importlib.import_module

    def without(module, *args):
        if module == f"potstill.{name}":
            raise ModuleNotFoundError(module)
        return real(module, *args)

    monkeypatch.setattr(importlib, "import_module", without)
    monkeypatch.setattr(doctor, "PACKAGE", tmp_path)
    assert doctor.report() == 1
    assert f"problem: {name}: not built" in capsys.readouterr().out
    (tmp_path / f"{name}.cpython-36m-x86_64-linux-gnu.so").touch()
    assert "another Python" in doctor.extension(name)["detail"]


def test_an_op_without_a_backend_is_a_problem(monkeypatch, capsys):
    refused = dispatch.Kernel("dense_rows", "none", 99, print, lambda facts: "it never serves")
    monkeypatch.setattr(dispatch, "kernels", lambda op: [refused])
    assert doctor.report() == 1
    assert "dense_rows" in (text := capsys.readouterr().out) and "none" in text
    assert "problem: dense_rows: no backend serves float32 on cpu" in text


def test_dtypes_served_otherwise_are_named():
    rows = [
        {"op": "f", "device": d, "dtype": t, "serves": s, "answers": []}
        for d, t, s in (
            ("cpu", "float32", "cpp"),
            ("cpu", "float64", "cpp"),
            ("cpu", "float16", "torch"),
            ("cuda", "float32", None),
        )
    ]
    assert doctor.served(rows)[1].split() == ["f", "cpp", "(float16:", "torch)", "none"]


def test_numpy_that_breaks_the_interpreter_is_noted():
    assert "numpy < 2.4" in doctor.notes({"numpy": "2.4.1", "triton": "3.6.0"})[0]
    assert doctor.notes({"numpy": "2.3.5", "triton": "3.6.0"}) == []
    assert doctor.notes({"numpy": "2.3.5", "triton": None}) == []
