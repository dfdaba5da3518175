"""Forked copies of the test's process: the cheapest way to have one die."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable


def fork(body: Callable[[], object]) -> int:
    """Runs `body` in a child that ends with it (exit code 1 for an exception, which is printed); the child's id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        body()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def exit_code(pid: int) -> int:
    """Waits for the child; its exit code, minus the signal where one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
