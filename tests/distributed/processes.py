"""Runs a function in several gloo processes on this machine."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def worker(rank: int, world: int, folder: str, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world,
            timeout=datetime.timedelta(seconds=300),
        )  # fmt: skip
        work(rank, world, *arguments)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"error-{rank}").write_text(traceback.format_exc())
        raise


def run(folder: Path, world: int, work: Callable[..., None], *arguments: Any) -> None:
    """work(rank, world, *arguments) in each process; any failure is an AssertionError with every traceback.

    `work` is imported by name in the processes; they are forked from a server that has torch and no autograd threads.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "potstill.losses"])
    processes = [
        context.Process(target=worker, args=(rank, world, str(folder), work, arguments)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)  # a hang ends here; on a busy machine imports alone take minutes
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    errors = "\n".join(f.read_text() for f in sorted(folder.glob("error-*")))
    assert all(p.exitcode == 0 for p in processes), errors or [p.exitcode for p in processes]
