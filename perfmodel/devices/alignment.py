"""16-bit products whose rows do not start at multiples of 16 bytes, and the older kernels that run them.

Tensor memory accelerators and the widest copies of a thread move 16 bytes to and from multiples of 16 bytes. Where a
row of A, B or C (BLAS: a leading dimension) is no multiple of 8 elements, cuBLAS runs other kernels: `cutlass_80_*`
`_align2` where all rows are even, whose threads copy two elements at once, else `cutlass_75_*_align1`, whose threads
load one at once, through registers. Only rows count: tokens are as many as they like, unless attention is eager. In
fp32 a thread loads 4 bytes anyway: a vocabulary of 50,257 instead of 50,304 costs a T4 4 % there, and 135 % in 16 bit
(https://github.com/winterstar67/AI-Experiments, Kernel investigation).

What a thread loads at once bounds the main loop, at as many bytes or FLOPs a clock on the SMs of every board:

two elements  11 bytes. H100: 41.3 us for 141 x 30,522 x 512 (https://github.com/AMD-AGI/TraceLens, bert-small), under a
    profiler 57.4 us for 768 x 3,420 x 1,280 and the like (https://github.com/revollllt/flash-vla, LingBot-VLA run-01);
    RTX 5090: 4.4 us for 400 x 1,018 x 256 (same, pi05 PV padding)
one element  385 FLOPs where A and B lie by rows of k (tn), but 8 bytes. H200: 96 and 99 TFLOP/s in 72,000 x 3,072 and
    14,336 x 3,072 (https://github.com/Frankaaay/FastWAM, docs/26-07-03); an sm_86 board of 84 SMs: 54 TFLOP/s, nn 66,
    nt 73 (https://github.com/b-vitamins/slinoss, kernel notes); RTX 4090: 107 to 116 TFLOP/s of squares of 2,055 to
    2,073 in tiles of 128 x 128 (https://github.com/pytorch/pytorch/issues/181718)
"""

from dataclasses import replace
from typing import Any

import numpy as np

from ..program.dims import Array
from .gemm_parameters import LAYOUTS, GemmParameters
from .hardware import Hardware

WIDE = 8  # elements that a thread loads at once of rows at multiples of 16 bytes; of others two or one
LOADED = {2: 11.0, 1: 8.0}  # bytes a clock that an SM loads so, padding of a tile included
ONE_BY_ONE = 385.0  # FLOPs a clock of an SM in forward layout, loading one element at once
# Main-loop time of the other layouts over that: their rows lie along m or n, as in registers.
ONE_BY_ONE_LAYOUTS = {"nn_slowdown": 0.79, "nt_slowdown": 0.74}
# What those kernels are like besides, as A100 and L40S together have it (one fit to both, 2026-11-29): thin tiles wait
# for every slice of k, and waves are whole. They draw too little for a power limit.
OLDER: dict[str, Any] = {
    "k_latency": 7.6, "k_bubble": 0.017, "k_step": 32, "epilogue": 2.1, "wave_tail": 1.0, "derating": 0.0,
    "sustained": 1.0, "power_share": 0.0,
}  # fmt: skip


def load_width(m: Any, n: Any, k: Any, layout: Any, dtype: str) -> Array:
    """How many elements a thread loads at once, 8, 2 or 1; the columns broadcast.

    Args:
        m, n, k: sides of the product; rows of C and of B or Bᵀ have n or k elements, those of A k, in `nt` m.
        layout: index in `LAYOUTS`.
        dtype: of A and B.
    """
    if dtype not in ("bf16", "fp16"):
        return np.array(float(WIDE))
    along = np.where(np.equal(layout, LAYOUTS.index("nt")), m, k)
    sides = [np.asarray(x).astype(np.int64) for x in (along, n)]
    rows, n_rows = (np.where(x == 1, WIDE, x) for x in sides)  # a vector lies as one likes
    rows = rows | n_rows
    return np.where(rows & 1, 1.0, np.where(rows % WIDE, 2.0, WIDE))


def padding(m: Any, n: Any, k: Any, batch: Any, layout: Any) -> tuple[tuple[Any, ...], Array]:
    """Sides with whose rows wide loads go (m, n, k, batch), and the bytes of the 16-bit operands copied for that."""
    nt = np.equal(layout, LAYOUTS.index("nt"))
    to = [np.ceil(x / WIDE) * WIDE for x in (m, n, k)]
    rows, columns, deep = np.where(nt, to[0], m), to[1], np.where(nt, k, to[2])
    copied = np.where((rows > m) | (deep > k), m * k, 0.0) + np.where((columns > n) | (deep > k), k * n, 0.0)
    return (rows, columns, deep, batch), np.asarray(2.0 * batch * copied)


def older_kernels(hw: Hardware, p: GemmParameters, dtype: str, width: int) -> GemmParameters:
    """The parameters of the kernels that load so few elements at once, but for `LOADED`."""
    own: dict[str, Any] = {}
    if width == 1:
        share = ONE_BY_ONE * hw.sm_count * hw.clock_hz / hw.peak(dtype)
        own = {"math_efficiency": min(share, p.math_efficiency), **ONE_BY_ONE_LAYOUTS}
    return replace(p, **own, **OLDER)
