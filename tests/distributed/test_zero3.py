"""ZeRO-3 with DeepSpeed itself, where it is installed: it comes as sources alone, and no test requires it."""

from __future__ import annotations

import pytest


@pytest.mark.nightly
def test_zero3_trains_as_one_process(in_processes, tmp_path):
    pytest.importorskip("deepspeed")
    import trainer_work
    import zero_work

    trainer_work.write_cache(tmp_path / "cache")
    in_processes(2, zero_work.zero3, str(tmp_path / "cache"))
