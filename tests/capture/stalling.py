"""A build that waits for its signal: after its first new commit it computes nothing. As a program it is the command."""

from __future__ import annotations

import sys
import time
from pathlib import Path


def commits(folder: Path) -> int:
    """Records of shards: a shard's file alone is not committed yet; the first record is the spec."""
    log = folder / "log"
    return sum(1 for p in log.glob("[0-9]*.json") if b'"shard"' in p.read_bytes()) if log.is_dir() else 0


def stall_after_commit(out: Path) -> None:
    """Makes builds in this process sleep once `out` has a commit more than now."""
    from potstill.capture import build

    module = sys.modules[build.__module__]
    forward, before = module._teacher_rows, commits(out)

    def stalling(*args):
        while commits(out) > before:
            time.sleep(1)
        return forward(*args)

    module._teacher_rows = stalling


if __name__ == "__main__":
    from potstill.cli import main

    stall_after_commit(Path(sys.argv[-1]))
    main(["build", *sys.argv[1:]])
