"""Memory of freed tensors stays with the process, as jemalloc and tcmalloc keep it.

glibc's malloc gives large blocks back to the system and gets zeroed pages anew, at every step: 0.5 to 4 us a page of
4 KiB, up to a quarter of a step's time, and whether it does hangs on what lies at the top of the heap. PyTorch's own
tuning guide replaces it (https://docs.pytorch.org/tutorials/recipes/recipes/tuning_guide.html); `measure` and
`calibrate` switch its trimming off instead, and their records say so.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
KEPT = "freed memory is kept (M_TRIM_THRESHOLD=-1, M_MMAP_MAX=0)"


def on_glibc() -> bool:
    """Whether this process runs on glibc's malloc."""
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")


def keep_freed_memory() -> None:
    """From here on no block comes from mmap and none goes back to the system; nothing where there is no glibc."""
    if on_glibc():
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)
        libc.mallopt(_M_MMAP_MAX, 0)
