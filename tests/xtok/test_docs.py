"""The examples of docs/xtok.md, and the README's of alignment, run as they stand."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("file, count", [("docs/xtok.md", 3), ("README.md", 1)])
def test_examples_run(file, count):
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / file).read_text(), re.M | re.S)
    if file == "README.md":
        blocks = [block for block in blocks if "xtok" in block]
    assert len(blocks) == count
    for block in blocks:
        exec(compile(block, file, "exec"), {})
