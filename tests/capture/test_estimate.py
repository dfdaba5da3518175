from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from potstill.capture.estimate import Assumed, estimate
from potstill.cli import main


def number(text):
    return float(re.match(r"[\d,.]+", text)[0].replace(",", ""))


def test_the_table_of_the_docs_is_what_the_command_says():
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    (table,) = re.findall(r"<!-- potstill plan -->\n(.*?)\n<!-- end -->", page, re.S)
    assert CliRunner().invoke(main, ["plan"]).output.strip() == table


def test_the_arithmetic():
    a = Assumed(tokens=1e9, parameters=5e11, layers=10, hidden=100, length=1000, peak=1e15, utilisation=0.5)
    a = replace(a, accelerators=2)
    assert a.flops == 1e12 + 2e6 and a.node_rate == pytest.approx(1000, rel=1e-4)
    one, four = estimate(a, 1), estimate(a, 4)
    assert number(one["time of the teacher"]) == pytest.approx(1e6 / 86400, abs=0.06)
    assert number(four["teacher, tokens/s"]) == 4 * number(one["teacher, tokens/s"]) == pytest.approx(4000, rel=1e-3)
    assert one["cache"] == "120 GB" and one["files"] == four["files"] == "112"
    assert one["sequences"] == "1,000,000" and four["from a server: requests/s"] == "4.0"
    assert number(estimate(replace(a, k=128), 1)["from a server: JSON received"]) == 11
    assert one["accelerator hours"] == four["accelerator hours"]


def test_refusals():
    done = CliRunner().invoke(main, ["plan", "--tokens", "0"])
    assert done.exit_code == 1 and "--tokens is 0.0: it must be above 0" in done.output
