"""Recording without passes of Python's cycle collector."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from ..tape.core import ONE_AT_A_TIME


@contextmanager
def no_collector() -> Iterator[None]:
    """Without passes of the cycle collector: tapes free by reference count, and a pass would only cost time.

    Two threads that came and went here as they like could leave it off for good.
    """
    with ONE_AT_A_TIME:
        collecting = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collecting:
                gc.enable()
