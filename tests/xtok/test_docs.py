"""The examples of docs/xtok.md, and the README's of alignment, run as they stand."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("file", ["docs/xtok.md", "README.md"])
def test_examples_run(file):
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / file).read_text(), re.M | re.S)
    blocks = [block for block in blocks if "xtok" in block]
    assert len(blocks) == 1
    exec(compile(blocks[0], file, "exec"), {})
