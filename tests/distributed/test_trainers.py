"""DistillTrainer over two gloo processes: gradients, logs and evaluation equal to one process."""

from __future__ import annotations


def test_a_trainer_over_two_processes(in_processes, tmp_path):
    """Unequal rows, a process without any, FSDP2 with one all-gather of the head a step: see trainer_work."""
    import trainer_work

    trainer_work.write_cache(tmp_path / "cache")
    in_processes(2, trainer_work.work, str(tmp_path / "cache"))
