"""docs/correctness.md: every class of failure is right here, and every test it names is there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "bench" / "parity.py").exists(), reason="the bench folder is not here")


@pytest.fixture(scope="module")
def parity():
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        import parity

        yield parity
    finally:
        sys.path.remove(str(ROOT / "bench"))


def test_this_library_is_right_in_every_class(parity):
    """The questions of bench/parity.py, to this library alone."""
    ours = parity.SUBJECTS[0]
    assert ours.name == "potstill" and len(parity.CHECKS) > 20
    answers = {which.name: parity.answer(ours, which) for which in parity.CHECKS}
    assert {name: said for name, (verdict, said) in answers.items() if verdict != "right"} == {}


def test_a_wrong_loss_is_called_wrong(parity):
    """A subject that is the plain loss times 1.01 fails the checks of values; one without an argument says so."""

    class Off(type(parity.SUBJECTS[0])):
        def loss(self, *args, **words):
            return 1.01 * super().loss(*args, **words)

    by_name = {which.name: which for which in parity.CHECKS}
    assert parity.answer(Off(), by_name["whose weight beta is"])[0] == "wrong"
    assert parity.answer(Off(), by_name["value and gradient disagree at T = 2"])[0] == "right"
    liger = next(s for s in parity.SUBJECTS if s.package == "liger-kernel")
    if liger.version is not None:
        assert parity.answer(liger, by_name["softcap and logit scale left out"])[0] == "not offered"


def test_the_page_is_of_these_checks_and_names_tests_that_exist(parity, tmp_path):
    page = parity.DOCS.read_text()
    made = page.split(parity.MARKS[0])[1].split(parity.MARKS[1])[0]
    assert re.findall(r"^- \*\*(.+?)\*\*: ", made, re.M) == [which.name for which in parity.CHECKS]
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", page)
    assert len(named) >= len(parity.CHECKS) + 10
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{file} has no {test}"
    copy = tmp_path / "page.md"
    copy.write_text(page)
    parity.write("new", copy)
    text = copy.read_text()
    assert text.count("new\n") == 1 and text.startswith("# Correctness") and "Held by tests alone" in text
