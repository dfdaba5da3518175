"""ZeRO-3, where DeepSpeed is installed: it is no requirement of the tests, and this has not been run yet."""

from __future__ import annotations

import pytest


def test_zero3_trains_as_one_process(in_processes, tmp_path):
    pytest.importorskip("deepspeed")
    import trainer_work
    import zero_work

    trainer_work.write_cache(tmp_path / "cache")
    in_processes(2, zero_work.zero3, str(tmp_path / "cache"))
