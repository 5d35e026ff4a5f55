"""The command line as a process: `perfmodel`, or `python -m perfmodel`."""

import gc

PATIENCE = 100_000  # allocations before garbage is looked for: modules and steps hold none, and every search walks them
gc.set_threshold(PATIENCE)  # before what is imported allocates


def run() -> None:
    """Answer a command; what it has made goes with the process, unsearched for garbage."""
    from .cli import main

    try:
        main(prog_name="perfmodel")
    finally:
        gc.freeze()


if __name__ == "__main__":
    run()
