"""Memory-bound kernels inside a real program: medians of a profile of Qwen1.5-0.5B's forward on an H100.

https://github.com/AMD-AGI/TraceLens, tests/traces/h100/Qwen_Qwen1.5-0.5B-Chat__1016005 (MIT): torch 2.6, bf16, 16 rows
of 559 tokens, 1,024 wide, with an MLP of 2,816. There a kernel finds in L2 what the one before it has left.
"""

import pandas as pd

from .judging import fold
from .sequences import UNARY, Kernels, TimedKernel

TOKENS = 16.0 * 559.0
N = TOKENS * 1024.0  # elements of a hidden state, of queries and of keys
WIDE = TOKENS * 2816.0
HALF = N / 2.0
PROFILED: dict[str, tuple[float, TimedKernel]] = {  # us, kernel
    "queries times cosines": (28.0, TimedKernel(2 * N, 2 * N, "strided", N)),
    "queries copied in order": (29.3, TimedKernel(2 * N, 2 * N, "strided", N)),
    "halves joined": (42.0, TimedKernel(2 * N, 2 * N, "cat", N * UNARY)),
    "rotated queries added": (34.8, TimedKernel(4 * N, 2 * N, "strided", N)),
    "a half negated": (12.2, TimedKernel(2 * HALF, 2 * HALF, "strided", HALF * UNARY)),
    "hidden by its norm": (32.6, TimedKernel(4 * N, 4 * N, "strided", N)),
    "normed by weight": (25.1, TimedKernel(2 * N, 2 * N, "strided", N)),
    "to fp32": (29.2, TimedKernel(2 * N, 4 * N, "cast", N)),
    "to bf16": (18.2, TimedKernel(4 * N, 2 * N)),  # streams since torch 2.6
    "squares": (26.4, TimedKernel(4 * N, 4 * N)),
    "means of rows": (15.1, TimedKernel(4 * N, 4 * TOKENS, "reduction")),
    "residual added": (17.9, TimedKernel(4 * N, 2 * N)),
    "gate times up": (51.1, TimedKernel(4 * WIDE, 2 * WIDE)),
    "silu": (38.4, TimedKernel(2 * WIDE, 2 * WIDE)),
    "epsilon added": (1.6, TimedKernel(4 * TOKENS, 4 * TOKENS)),
    "embedding": (51.8, TimedKernel(2 * N, 2 * N, "embedding", N, TOKENS)),
}


def profiled_rows() -> pd.DataFrame:
    """gpu, family, kernels, fold, seconds: one row a kernel of the program."""
    out: list[tuple[str, str, Kernels, int, float]] = [
        ("h100-sxm", "eager", [kernel], fold(name), us * 1e-6) for name, (us, kernel) in PROFILED.items()
    ]
    return pd.DataFrame(out, columns=["gpu", "family", "kernels", "fold", "seconds"])
