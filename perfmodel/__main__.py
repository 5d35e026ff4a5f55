"""The command line as a process: `perfmodel`, or `python -m perfmodel`."""

import gc
import os
import signal
import sys
from importlib import import_module

THREADS = "OPENBLAS_NUM_THREADS"
PATIENCE = 100_000  # allocations before garbage is looked for: modules and steps hold none, and every search walks them
gc.set_threshold(PATIENCE)  # before what is imported allocates


def load_numpy() -> None:
    """Before all else: deep inside other imports CPython maps and unmaps its stack a thousand times for it.

    Its BLAS would start a thread a core, 50 ms on two, for products that no answer makes.
    """
    given = os.environ.get(THREADS)
    os.environ[THREADS] = "1"
    import_module("numpy")
    if given is None:
        del os.environ[THREADS]  # processes that measure choose for themselves
    else:
        os.environ[THREADS] = given


def end_tidily() -> None:
    """Let SIGTERM end the process as SIGINT does: what is half written is removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def open_streams() -> None:
    """Streams that were closed before the start lead nowhere: what is opened next must not become one of them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "w" if number else "r"))


def run() -> None:
    """Answer a command. What it has made goes with the process, neither searched for garbage nor freed bit by bit."""
    end_tidily()
    open_streams()
    load_numpy()
    from .cli import Unwritten, main

    try:
        main(prog_name="perfmodel")
    except SystemExit as end:
        try:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        except OSError as error:
            if not isinstance(end, Unwritten):  # what it could not write may be in the buffer still
                os.write(2, f"perfmodel: {error.strerror}\n".encode())
            os._exit(1)
        if isinstance(end.code, int):
            os._exit(end.code)
        raise


if __name__ == "__main__":
    run()
