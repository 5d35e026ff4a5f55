"""The command line as a process: `perfmodel`, or `python -m perfmodel`."""

import gc
import os
import sys
from contextlib import suppress
from importlib import import_module

PATIENCE = 100_000  # allocations before garbage is looked for: modules and steps hold none, and every search walks them
gc.set_threshold(PATIENCE)  # before what is imported allocates


def run() -> None:
    """Answer a command. What it has made goes with the process, neither searched for garbage nor freed bit by bit."""
    import_module("numpy")  # deep inside other imports CPython maps and unmaps its stack a thousand times for it
    from .cli import main

    try:
        main(prog_name="perfmodel")
    except SystemExit as end:
        with suppress(OSError):  # of what cannot be written the interpreter's own exit tells
            sys.stdout.flush()
            sys.stderr.flush()
            if isinstance(end.code, int):
                os._exit(end.code)
        raise


if __name__ == "__main__":
    run()
