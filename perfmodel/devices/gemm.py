"""Latency of one GEMM, C(m x n) = A(m x k) . B(k x n), on one GPU: a small physical model.

A library kernel cuts C into tiles, one thread block each, and may split k over several blocks. A shape costs

    launch floor + min over (tile, split) of [ overlap(SM time, memory time) + split cost ]

SM time      waves of blocks over the SMs x (fill and drain of a tile + k x time of a k-slice); a k-slice is bound by
             the math pipe or by loading its operands from L2, whichever is slower
memory time  compulsory bytes of A, B, C: from L2 what still lies there since its last use, from DRAM the rest

but not less than the energy of its FLOPs, of loading operands into SMs and of DRAM takes at the power of the board.
16-bit products whose rows do not start at multiples of 16 bytes run on older kernels (`alignment`).

The `min` stands for the library's heuristic, so it must be offered only tiles that the library really has (the fp32
sets are those in the kernel names of NeuSight's profiles, https://github.com/sitar-lab/NeuSight).
"""

import math
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..program.dims import Array, Index
from .alignment import LOADED, WIDE, load_width, older_kernels
from .gemm_parameters import LAYOUTS, GemmParameters, Layout, Tiles, layout_index
from .hardware import ITEMSIZE, Hardware

SPLIT_WAVES = 2  # a split of k fills so many waves of the SMs at most
CHUNK = 16_384  # shapes evaluated together: bounds the working set
TOGETHER = 4_096  # the same for shapes x tiles, where there are few shapes


class _Rates(NamedTuple):
    """Hardware and parameters combined for one dtype, in SI units."""

    p: GemmParameters
    sm_count: int
    kept_bytes: float  # of L2 between two uses
    item: float  # bytes of an element of A and B
    out_item: float  # bytes of an element of C
    math: float  # FLOP/s of the main loop in forward layout, all SMs, before derating
    sm_load: float  # B/s that one SM loads from L2
    dram: float  # B/s of long streams
    l2: float  # B/s of one pass over data in L2
    k_latency: float  # s per element of k
    k_bubble: float  # s per element of k
    flop_power: float  # s in which the board may draw the energy of a FLOP; 0: no limit
    dram_power: float  # s in which it may draw that of a byte from or to DRAM
    narrow_load: float  # s that an element of a tile's rows or columns costs its threads for each of k; 0: nothing more

    @classmethod
    def of(cls, hw: Hardware, p: GemmParameters, dtype: str, out_item: float | None, loaded: float = 0.0) -> "_Rates":
        """`loaded` bytes a clock is what the threads of an SM load at most; 0: no limit."""
        item, peak = ITEMSIZE[dtype], hw.peak(dtype)
        lanes = hw.lanes if peak == hw.fp32_flops else 1.0
        sm_load = peak / hw.sm_count / (p.tile_balance * lanes)
        dram = hw.memory_bandwidth * p.memory_efficiency
        energy, power = hw.limit(dtype)
        flop_power, dram_power = p.power_share * energy / power, (hw.memory_energy or 0.0) / power
        limited = _can_reach_the_limit(p, peak * flop_power, item, dram * dram_power)
        return cls(
            p=p,
            sm_count=hw.sm_count,
            kept_bytes=p.l2_share * hw.l2_bytes,
            item=item,
            out_item=item if out_item is None else float(out_item),
            math=peak * p.math_efficiency * p.sustained,
            sm_load=sm_load,
            dram=dram,
            l2=max(dram, sm_load * hw.sm_count * p.l2_stream),
            k_latency=p.k_latency / hw.clock_hz,
            k_bubble=p.k_bubble / hw.clock_hz,
            flop_power=flop_power if limited else 0.0,
            dram_power=dram_power if limited else 0.0,
            narrow_load=item / (loaded * hw.clock_hz) if loaded else 0.0,
        )


def _can_reach_the_limit(p: GemmParameters, math: float, item: float, dram: float) -> bool:
    """Whether any product could draw what the board may: `math` of that by SMs at their peak, `dram` by busy DRAM."""
    if not math:
        return False
    loads = max((a + b) / (2 * a * b) for a, b in (*p.tiles, *(p.batched_tiles or ()))) * item * p.load_energy
    return math * (1.0 + loads) + dram / min(1.0, max(p.write_cost, 0.01)) > 1.0  # written bytes may be cheaper


def gemm_time(
    m: ArrayLike,
    n: ArrayLike,
    k: ArrayLike,
    batch: ArrayLike = 1,
    *,
    hardware: Hardware,
    parameters: GemmParameters,
    dtype: str = "bf16",
    output_itemsize: float | None = None,
    accumulate: ArrayLike = False,
    layout: Layout | Index = "tn",
    a_copies: ArrayLike = 1.0,
    b_copies: ArrayLike = np.inf,
) -> Array:
    """Seconds of `batch` products (m x k).(k x n), floor included; the shapes (from 1 up) broadcast.

    Args:
        m, n, k, batch: rows and columns of C, elements summed over, products in one launch.
        hardware, parameters: the device's datasheet and fitted figures.
        dtype: of A and B: bf16, fp16, tf32 or fp32.
        output_itemsize: bytes of an element of C; as A and B if None.
        accumulate: whether C is read before it is written.
        layout: 'tn' forward, 'nn' input gradient, 'nt' weight gradient; or of each product its index in `LAYOUTS`.
        a_copies, b_copies: how many different A and B the caller cycles through before it uses the same one again:
            1 for an activation that was just written, infinity for a weight that is next used in the next step. That
            decides what is still in L2.

    >>> h100 = Hardware(132, 1.83e9, 80e9, 3.35e12, 50e6, 66.9e12, 494.7e12, 989e12, 989e12)
    >>> f"{gemm_time(4096, 4096, 4096, hardware=h100, parameters=GemmParameters()) * 1e6:.0f} us"
    '181 us'
    """
    kernels = _Kernels(hardware, parameters, dtype, output_itemsize)
    index = layout_index(layout) if isinstance(layout, str) else layout
    columns = [m, n, k, batch, a_copies, b_copies, np.add(1.0, accumulate), kernels.of(WIDE).slowdowns[index]]
    width = load_width(m, n, k, index, dtype)
    if width.min() < WIDE:
        columns += [width, index]
    given = [np.asarray(x, dtype=np.float64) for x in columns]
    shape = np.broadcast_shapes(*(x.shape for x in given))
    floor = parameters.launch_clocks / hardware.clock_hz
    if math.prod(shape) <= TOGETHER:  # few: what does not vary along an axis may be there again
        whole = (1, math.prod(shape))
        flat = [x if x.size in whole else np.broadcast_to(_aligned(x, shape), shape) for x in given]
        return floor + kernels.seconds(*(x.reshape(-1) for x in flat)).reshape(shape)
    out = np.empty(shape)
    rows = out.reshape(-1, shape[-1])
    aligned = [_aligned(x, shape) for x in given]
    for row, place in zip(rows, np.ndindex(shape[:-1]), strict=True):
        of_row = [x[tuple(min(i, d - 1) for i, d in zip(place, x.shape, strict=False))].reshape(-1) for x in aligned]
        for start in range(0, len(row), CHUNK):
            part = slice(start, start + CHUNK)
            row[part] = kernels.seconds(*(x if len(x) == 1 else x[part] for x in of_row))
    return floor + out


def _aligned(x: Array, shape: tuple[int, ...]) -> Array:
    """An array with as many axes as a shape, the further ones in front."""
    return x.reshape((1,) * (len(shape) - x.ndim) + x.shape)


class _Kernel(NamedTuple):
    """The kernels of one generation on one device."""

    rates: _Rates
    slowdowns: Array  # main-loop time of each of `LAYOUTS` over that of the forward layout


class _Kernels:
    """The kernels of a library on one device: those that load 16 bytes at once, and the older ones (`alignment`)."""

    def __init__(self, hardware: Hardware, parameters: GemmParameters, dtype: str, out_item: float | None) -> None:
        self.device = hardware, parameters, dtype, out_item
        self.known: dict[int, _Kernel] = {}

    def of(self, width: int) -> _Kernel:
        """Those whose threads load so many elements at once."""
        if width not in self.known:
            hardware, p, dtype, out_item = self.device
            if width < WIDE:
                p = older_kernels(hardware, p, dtype, width)
            rates = _Rates.of(hardware, p, dtype, out_item, LOADED.get(width, 0.0))
            self.known[width] = _Kernel(rates, np.array([p.slowdown(name) for name in LAYOUTS]))
        return self.known[width]

    def seconds(
        self, m: Array, n: Array, k: Array, b: Array, a_copies: Array, b_copies: Array, c_passes: Array,
        slowdown: Array, width: Array | None = None, layout: Array | None = None,
    ) -> Array:  # fmt: skip
        """Seconds of products in one dimension, without the launch floor; `width`, `layout`: if not all are wide."""
        r = self.of(WIDE).rates
        near, far = _bytes(m, n, k, b, a_copies, b_copies, c_passes, r)
        memory, drawn = near / r.l2 + far / r.dram, far * r.dram_power
        out = _best(m, n, k, b, memory, drawn, slowdown, r)
        if width is None or layout is None:
            return out
        for loaded in LOADED:
            these = width == loaded
            if these.any():
                older = self.of(loaded)
                slowdown = older.slowdowns[layout.astype(np.intp)]
                out = np.where(these, np.maximum(out, _best(m, n, k, b, memory, drawn, slowdown, older.rates)), out)
        return out


class _Product(NamedTuple):
    """What does not depend on the tile, each of shape (1, products) or (1, 1)."""

    batch: Array
    flop_time: Array  # s of one FLOP on one SM
    k_padded: Array
    k_splits: Array  # most parts of k
    memory: Array  # s
    drawn: Array  # s in which the board may draw the energy of DRAM
    partials: Array  # s for one split's share of the partial sums


def _best(m: Array, n: Array, k: Array, b: Array, memory: Array, drawn: Array, slowdown: Array, r: _Rates) -> Array:
    """Seconds of the best tile and split, without the launch floor; what differs between shapes is an array."""
    k_padded = np.ceil(k / r.p.k_step) * r.p.k_step
    k_splits = np.clip(k_padded / r.p.k_split, 1.0, r.p.max_split)
    partials = b * m * n * (4.0 * r.p.split_traffic / r.l2)
    whole, divided = np.full(memory.shape, np.inf), np.full(memory.shape, np.inf)
    of_products = (b, _flop_time(k, r) * slowdown, k_padded, k_splits, memory, drawn, partials)
    product = _Product(*(x.reshape(1, -1) for x in of_products))
    sets: list[tuple[Tiles, NDArray[np.bool_] | None]] = [(r.p.tiles, None)]
    if r.p.batched_tiles is not None:
        sets = [(r.p.tiles, b > 1), (r.p.batched_tiles, b <= 1)]
    along_m, along_n = _Extent(m), _Extent(n)
    at_once = max(1, TOGETHER // memory.size)
    for tiles, excluded in sets:
        if excluded is not None and excluded.all():
            continue
        for start in range(0, len(tiles), at_once):
            some, where, split = _with_tiles(tiles[start : start + at_once], along_m, along_n, product, r)
            np.minimum(whole, some if excluded is None else np.where(excluded, np.inf, some), out=whole)
            if excluded is not None:
                split = np.where(np.broadcast_to(excluded, whole.shape)[where], np.inf, split)
            if at_once == 1:
                divided[where] = np.minimum(divided[where], split)
            else:  # a product may be there with several tiles
                np.minimum.at(divided, where, split)
    if not r.flop_power:  # memory time is the same for every tile: the best of them is the one with the least SM time
        whole = _overlap(_throttled(whole, r), memory, r.p.overlap_loss)
    return np.asarray(np.minimum(whole, divided))


class _Extent:
    """Rows or columns of C, of many products, and how tiles cut them."""

    def __init__(self, extent: Array) -> None:
        self.extent = extent
        self.least = extent.min()
        self.known: dict[tuple[int, ...], tuple[Array, Array]] = {}

    def cut(self, sides: tuple[int, ...]) -> tuple[Array, Array]:
        """How much of each tile an extent fills, and how many of them cover it, (tiles, products or 1)."""
        if sides not in self.known:
            column = _column(sides)
            filled = column if self.least >= max(sides) else np.minimum(self.extent, column)
            self.known[sides] = filled, np.ceil(self.extent / column)
        return self.known[sides]


@cache
def _column(sides: tuple[int, ...]) -> Array:
    return np.array(sides, dtype=np.float64).reshape(-1, 1)


def _with_tiles(
    tiles: Tiles, along_m: _Extent, along_n: _Extent, product: _Product, r: _Rates
) -> tuple[Array, Index, Array]:
    """Seconds of whole k with the best of some tiles; which products a split of k may pay for, and seconds of that.

    Of whole k in all where power is limited, else of the SMs alone. A product is there once for each tile.
    """
    heights, widths = zip(*tiles, strict=True)
    (rows, down), (cols, across) = along_m.cut(heights), along_n.cut(widths)
    # Padding is computed but not loaded: a thin GEMM wastes the math pipe, not bandwidth.
    whole_rows, whole_cols = _column(heights), _column(widths)
    flops = 2.0 * whole_rows * whole_cols
    least = np.maximum(flops * product.flop_time, r.k_latency)
    if r.narrow_load:  # threads without an element to load take part
        least = np.maximum(least, (whole_rows + whole_cols) * r.narrow_load)
    slice_time = np.maximum((rows + cols) * (r.item / r.sm_load), least)
    main_loop = product.k_padded * (slice_time + r.k_bubble)
    fill_drain = rows * cols * (r.p.epilogue * r.out_item / r.sm_load)
    waves = down * (across * product.batch / r.sm_count)
    seconds = _waves(waves, r.p.wave_tail) * (fill_drain + main_loop)
    drawn = product.drawn
    if r.flop_power:
        energy = flops + (whole_rows + whole_cols) * (r.item * r.p.load_energy)  # of a k-slice, in FLOPs
        drawn = drawn + down * across * product.batch * product.k_padded * (energy * r.flop_power)
        seconds = np.maximum(_overlap(_throttled(seconds, r), product.memory, r.p.overlap_loss), drawn)
    whole = _least(seconds)
    where = np.flatnonzero(np.broadcast_to(waves < SPLIT_WAVES, (len(tiles), product.memory.size)))
    if not len(where):  # most products of a large grid fill the SMs without a split
        return whole, where, np.empty(0)
    tile, of = (where, where) if len(tiles) == 1 else divmod(where, product.memory.size)

    def chosen(x: Array) -> Array:
        return x.reshape(1) if x.size == 1 else x.take(of if len(x) == 1 else tile if x.shape[1] == 1 else where)

    given = (waves, fill_drain, main_loop, product.k_splits, product.memory, product.partials)
    divided = _divided(r, *map(chosen, given))
    return whole, of, np.maximum(divided, chosen(drawn)) if r.flop_power else divided


def _least(x: Array) -> Array:
    """The least over tiles."""
    return np.asarray(x[0] if len(x) == 1 else x.min(axis=0))


def _divided(
    r: _Rates, unsplit: Array, ends: Array, loop: Array, k_splits: Array, memory: Array, partials: Array
) -> Array:
    """Seconds with k split so that the blocks fill 1 or 2 waves; infinite where that is no split."""
    best = np.asarray(np.inf)
    for filled_waves in range(1, SPLIT_WAVES + 1):
        split = np.minimum(np.maximum(filled_waves / unsplit, 1.0), k_splits)
        seconds = _split_time(r, split, unsplit, ends, loop, memory, partials)
        best = np.minimum(best, np.where(split > 1.0, seconds, np.inf))
    return best


def _split_time(
    r: _Rates, split: Array, waves: Array, fill_drain: Array, main_loop: Array, memory: Array, partials: Array
) -> Array:
    """Seconds with k split so many times, the partial sums added in L2."""
    sm_time = _throttled(_waves(waves * split, r.p.wave_tail) * (fill_drain + main_loop / split), r)
    return _overlap(sm_time, memory, r.p.overlap_loss) + r.p.split_latency + split * partials


def _flop_time(k: Array, r: _Rates) -> Array | float:
    """Seconds of one FLOP on one SM."""
    seconds = r.sm_count / r.math
    if not r.p.long_row:
        return seconds
    pitch = (k * (r.item / r.p.page_reach)) ** 3
    return seconds * (1.0 + r.p.long_row * pitch / (1.0 + pitch))


def _throttled(time: Array, r: _Rates) -> Array:
    """SM time at the clock that the power limit leaves to a kernel of this length."""
    return time * (1.0 + r.p.derating * time / (time + r.p.derating_time))


def _waves(waves: Array, tail: float) -> Array:
    """Waves that the slowest SM runs: whole ones if `tail` is 1, the average if 0, never less than one."""
    return np.maximum(1.0, waves + tail * (np.ceil(waves) - waves))


def _overlap(x: Array, y: Array, loss: float) -> Array:
    """Two engines at once: the longer time, and the more on top the closer the shorter one comes."""
    longer, shorter = np.maximum(x, y), np.minimum(x, y)
    return longer + loss * shorter * shorter / longer


def _bytes(
    m: Array, n: Array, k: Array, b: Array, a_copies: Array, b_copies: Array, c_passes: Array, r: _Rates
) -> tuple[Array, Array]:
    """Bytes of A, B and C moved once, (from or to L2, from or to DRAM): by what was touched since their last use."""
    size_a, size_b, size_c = b * m * k * r.item, b * k * n * r.item, b * m * n * r.out_item
    common = np.minimum(a_copies, b_copies)
    hit_a = _hit((a_copies * size_a + common * size_b + size_c) / r.kept_bytes)
    never = np.isinf(b_copies).all()  # as every weight
    hit_b = 0.0 if never else _hit((b_copies * size_b + common * size_a + size_c) / r.kept_bytes)
    hit_c = _hit((size_a + size_b + size_c) / (r.kept_bytes * r.p.l2_written))
    moved_c = size_c * c_passes
    near = size_a * hit_a + size_b * hit_b + moved_c * hit_c * r.p.l2_write_cost
    far = size_a * (1.0 - hit_a) + size_b * (1.0 - hit_b) + moved_c * (1.0 - hit_c) * r.p.write_cost
    return near, far


def _hit(fill: Array) -> Array:
    """Share found in L2 when `fill` capacities were touched since: a soft step at 1 (replacement is not exact LRU)."""
    f = fill * fill  # infinite for data that is never used again
    f = f * f
    f = f * f
    return 1.0 / (1.0 + f * f)


__all__ = ["LAYOUTS", "GemmParameters", "Layout", "Tiles", "gemm_time"]
