"""The command line as a process: `perfmodel`, or `python -m perfmodel`."""

import gc
from importlib import import_module

PATIENCE = 100_000  # allocations before garbage is looked for: modules and steps hold none, and every search walks them
gc.set_threshold(PATIENCE)  # before what is imported allocates


def run() -> None:
    """Answer a command; what it has made goes with the process, unsearched for garbage."""
    import_module("numpy")  # deep inside other imports CPython maps and unmaps its stack a thousand times for it
    from .cli import main

    try:
        main(prog_name="perfmodel")
    finally:
        gc.freeze()


if __name__ == "__main__":
    run()
