"""Bytes that an op really moves from and to DRAM, where operands are larger than the cache.

Memory-bound kernels move every byte once. A GEMM reads its operands again for every wave of tiles: the tiles that run
at the same time share the rows of A and the columns of B that they need, and the next wave finds neither in the cache.
How many rows and columns a wave touches is decided by the order in which the library walks over the tiles: Triton's
kernels take groups of eight rows of tiles (LoRAFusion's config.py, GROUP_SIZE_M = 8); cuBLAS chooses, and is taken to
choose best.

Nothing is fitted here. Against the figures that LoRAFusion measured with Nsight Compute on an H100, totals come out
within 7 % (tests/published/test_traffic.py).
"""

from math import ceil

from ..calls.costs import products
from ..program.dtypes import ITEMSIZE
from ..program.op import Op
from .hardware import Hardware

TILE = (128, 256)  # rows and columns of C: cuBLAS's and LoRAFusion's large tile on Hopper
TRITON_GROUP = 8
GROUPS = (1, 2, 4, 8, 16, 32, 64)  # rows of tiles that cuBLAS may walk in parallel


def gemm_reads(m: int, n: int, k: int, itemsize: int, hardware: Hardware, groups: tuple[int, ...] = GROUPS) -> int:
    """Bytes of A (m, k) and B (k, n) read from DRAM: wave by wave, with the best of some tile orders.

    >>> h100 = Hardware(132, 1.83e9, 80e9, 3.35e12, 50e6, 66.9e12, 494.7e12, 989e12, 989e12)
    >>> f"{gemm_reads(8192, 4096, 4096, 2, h100) / 2**20:.0f} MiB of {(8192 + 4096) * 4096 * 2 / 2**20:.0f}"
    '308 MiB of 96'
    """
    smallest = (m + n) * k * itemsize
    if smallest <= hardware.l2_bytes:
        return smallest
    return min(max(smallest, _edges(m, n, group, hardware.sm_count) * k * itemsize) for group in groups)


def _edges(m: int, n: int, group: int, sms: int) -> int:
    """Rows of A and columns of B that the waves touch, summed over waves; never more of either than there are."""
    rows, columns = ceil(m / TILE[0]), ceil(n / TILE[1])
    total = 0
    for start in range(0, rows * columns, sms):
        tiles = [_tile(i, rows, columns, group) for i in range(start, min(start + sms, rows * columns))]
        total += min(m, len({row for row, _ in tiles}) * TILE[0])
        total += min(n, len({column for _, column in tiles}) * TILE[1])
    return total


def _tile(i: int, rows: int, columns: int, group: int) -> tuple[int, int]:
    """Row and column of the i-th tile: down a group of rows, then to the next column."""
    first = i // (group * columns) * group
    height = min(rows - first, group)
    inside = i % (group * columns)
    return first + inside % height, inside // height


def dram_bytes(op: Op, hardware: Hardware) -> int:
    """Bytes of one call from and to DRAM; shapes must be integers."""
    moved = int(op.bytes_read + op.bytes_written)
    found = products(op)
    if op.view or len(found) != 1:
        return 0 if op.view else moved
    _, m, n, k, batch = (found[0].layout, *map(int, found[0][1:]))
    itemsize = int(ITEMSIZE[op.inputs[0].dtype])
    groups = (TRITON_GROUP,) if op.name.startswith("lorafusion") else GROUPS
    again = gemm_reads(m, n, k, itemsize, hardware, groups) - (m + n) * k * itemsize
    return int(moved + batch * again)


__all__ = ["dram_bytes", "gemm_reads"]
