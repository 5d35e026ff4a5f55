"""What goes wrong: ways in which a program that writes files is stopped, hindered or confused.

Each try runs in a fork. What a `Fault` does there happens before the program begins; a `random` one is a signal from
outside, some time after it has.
"""

import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfmodel.__main__ import end_tidily

NOBODY = 65534
CHANGES = ("os.rename", "os.remove", "os.chmod", "os.mkdir", "os.truncate")  # audit events that change what is on disk


@dataclass(frozen=True)
class Fault:
    """A way to fail.

    Attributes:
        inject: makes it happen in the process, with a number that says where.
        sent: the signal that comes from outside instead.
    """

    name: str
    inject: Callable[[int, Path], None] = lambda place, folder: None
    sent: int = 0


def killed_before(place: int, _: Path) -> None:
    """SIGKILL before the n-th opening, renaming, removing or change of a file."""
    left = [place % 40]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        writing = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writing or event in CHANGES:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def killed_within(place: int, _: Path) -> None:
    """The end of the process in the middle of a write, when a file gets longer than so many bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    _files_up_to(place)


def full(place: int, _: Path) -> None:
    """No room for more than so many bytes in a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _files_up_to(place)


def _files_up_to(place: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (place % 14_000, resource.RLIM_INFINITY))


def read_only(place: int, folder: Path) -> None:
    """A folder that may be read and not written; to root nothing is forbidden, so the process is somebody else."""
    folder.chmod(0o555)
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def clock_jumps(place: int, _: Path) -> None:
    """A clock that is set back and forth by years between any two looks at it."""
    real, drawn = time.time, random.Random(place)
    time.time = lambda: max(0.0, real() + drawn.uniform(-1e8, 1e8))


NONE = Fault("none")
FAULTS = (
    Fault("kill before a change", killed_before),
    Fault("kill within a write", killed_within),
    Fault("kill at random", sent=signal.SIGKILL),
    Fault("SIGTERM at random", sent=signal.SIGTERM),
    Fault("SIGINT at random", sent=signal.SIGINT),
    Fault("full disk", full),
    Fault("read-only folder", read_only),
    Fault("clock jumps", clock_jumps),
)


def as_a_command() -> None:
    """Signals as a command meets them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    end_tidily()
