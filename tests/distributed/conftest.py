from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # processes import their work by name


@pytest.fixture
def in_processes(tmp_path: Path):
    """in_processes(world, work, *arguments): see processes.run."""
    import processes

    return partial(processes.run, tmp_path)
