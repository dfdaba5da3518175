"""DistillTrainer over two gloo processes: gradients, logs and evaluation equal to one process."""

from __future__ import annotations

import pytest
from torch.distributed.fsdp import FSDPModule


@pytest.mark.skipif(not hasattr(FSDPModule, "set_reshard_after_forward"), reason="not of FSDP2 in torch 2.6")
def test_a_trainer_over_two_processes(in_processes, tmp_path):
    """Unequal rows, a process without any, FSDP2 with one all-gather of the head a step: see trainer_work."""
    import trainer_work

    trainer_work.write_cache(tmp_path / "cache")
    in_processes(2, trainer_work.work, str(tmp_path / "cache"))
