"""A process that works for the campaign: it may run out of memory, hang or crash without taking the campaign along.

The parent keeps off CUDA, so that a forked child may start it. Where processes cannot be forked the work is done in
place, and nothing bounds it.
"""

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable
from typing import Any

from ..measuring import isolate
from ..measuring.records import Record

Work = Callable[[Any], Record]
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class WorkTimeout(Exception):
    """The work took longer than it may; its process was ended."""


class Worker:
    """Runs `work` on one thing after another in a forked process, which is made anew when it died."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.process: Any = None
        self.pipe: Any = None

    def __call__(self, thing: Any, seconds: float) -> Record:
        """The record of `work(thing)`; one with status oom or error if that raised, or if its process died.

        Raises:
            WorkTimeout: it was not done after so many seconds.
        """
        if not isolate.can_fork():
            return attempted(self.work, thing)
        if self.process is None:
            self._start()
        self.pipe.send(thing)
        try:
            if not self.pipe.poll(seconds):
                self.close()
                raise WorkTimeout
            found: Record = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            self.close()
            return isolate.died(-code) if code < 0 else {"status": "error", "message": f"ended with code {code}"}
        return found

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(self.work, other, self.pipe, os.getpid()), daemon=True)
        self.process.start()
        other.close()

    def close(self) -> None:
        """End the process, whatever it does."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.pipe.close()
        self.process = self.pipe = None


def attempted(work: Work, thing: Any) -> Record:
    """The record of `work(thing)`, or one that tells why there is none."""
    try:
        return work(thing)
    except Exception as error:  # of torch, transformers or peft in whatever version is here
        text = " ".join(str(error).split())[:300]
        oom = isinstance(error, MemoryError) or "out of memory" in text.lower()
        return {"status": "oom" if oom else "error", "message": f"{type(error).__name__}: {text}"}


def _serve(work: Work, pipe: Any, other: Any, parent: int) -> None:
    other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # nobody measures on when the parent is killed
    while os.getppid() == parent:
        try:
            thing = pipe.recv()
        except EOFError:
            return
        pipe.send(attempted(work, thing))
