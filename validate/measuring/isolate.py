"""A visit in a process of its own: a forked child measures, the parent only writes records.

So every visit starts from the same heap (what malloc hands out and returns to the system depends on what ran before),
and a child that the kernel kills for its memory leaves a record. The parent must not have started threads.
"""

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def can_fork() -> bool:
    """Whether processes can be forked here without trouble."""
    return sys.platform == "linux"


def run_forked(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of `work`, done in a forked child; a record with status oom or error if the child dies."""
    reader, writer = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        _in_child(work, reader, writer, parent)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        try:
            text = pipe.read()
        except BaseException:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return died(os.WTERMSIG(status))
    result: dict[str, Any] = json.loads(text) if text else {"status": "error", "message": "ended without a result"}
    return result


def _in_child(work: Callable[[], dict[str, Any]], reader: int, writer: int, parent: int) -> None:
    """Work, send the result, and leave without running the parent's clean-up."""
    code = 1
    try:
        os.close(reader)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # nobody measures on when the parent is killed
        if os.getppid() == parent:
            try:
                result = work()
            except Exception as error:  # reported by the parent with the cell's name
                result = {"status": "error", "message": f"{type(error).__name__}: {error}"[:300]}
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(json.dumps(result).encode())
            code = 0
    finally:
        os._exit(code)


def died(number: int) -> dict[str, Any]:
    """The record of a process that a signal ended."""
    name = signal.Signals(number).name
    if number == signal.SIGKILL:
        return {"status": "oom", "message": f"killed ({name}), as the kernel does when memory runs out"}
    return {"status": "error", "message": f"ended by {name}"}
