"""Seconds of products by expert (`torch._grouped_mm`): one kernel for all experts, or a product for each.

The one kernel (CUTLASS, persistent) has one shape of tiles for all groups. The tiles of all groups fill the SMs
together, so that only the last wave of all is partly idle; what groups with few rows waste is the rest of their own
tiles. It goes from group to group, so that the weights of an expert with few rows, which take longer to read than to
multiply, are not read behind the products of one with many rows: each group takes the longer of its own two times.
Every weight that is hit is read once. Where ATen has no such kernel it calls a product for each expert.
"""

from typing import Any, NamedTuple

import numpy as np

from ..program.dims import Array
from ..program.routing import Routing
from .gemm import LAYOUTS, _bytes, _flop_time, _overlap, _Rates, _throttled, _waves, gemm_time
from .gemm_parameters import GroupedParameters
from .profile import DeviceProfile

Sizes = tuple[Any, Any, Any]  # m, n, k of one expert's product
TOGETHER = 65_536  # groups x products evaluated together: bounds the working set
NOTHING = 1e-30  # s: instead of 0 for groups without rows, whose two times are compared by a ratio


def grouped_time(
    profile: DeviceProfile, dtype: str, layout: str, routing: Routing, looped: bool, rows: Any, a: Any, b: Any
) -> Array:
    """Seconds of products of `rows` rows over all experts, of one call each; the columns broadcast.

    Args:
        layout: tn or nn: (rows, a)·(a, b) by expert; nt: (a, rows)·(rows, b), the weights' gradient.
        routing: how many rows each expert gets.
        looped: whether each expert has a kernel of its own.
    """
    rows, a, b = np.broadcast_arrays(np.asarray(rows, dtype=np.int64), a, b)
    groups = [(np.asarray(n), np.asarray(times)) for n, times in routing.groups(rows)]
    if looped:
        sizes: list[Sizes] = [(a, b, n) if layout == "nt" else (n, b, a) for n, _ in groups]
        return _one_by_one(profile, dtype, layout, sizes, [times for _, times in groups])
    counts, times = (np.stack([np.broadcast_to(x[i], rows.shape) for x in groups]) for i in (0, 1))
    at_once = _AtOnce.of(profile, dtype, layout)
    flat = np.empty(rows.size)
    counts, times, a, b = counts.reshape(len(groups), -1), times.reshape(len(groups), -1), a.reshape(-1), b.reshape(-1)
    step = max(1, TOGETHER // len(groups))
    for start in range(0, rows.size, step):
        part = slice(start, start + step)
        flat[part] = at_once.seconds(counts[:, part], times[:, part], a[part], b[part])
    return flat.reshape(rows.shape)


def _one_by_one(profile: DeviceProfile, dtype: str, layout: str, sizes: list[Sizes], times: list[Array]) -> Array:
    """A kernel for each expert that is hit."""
    parameters = profile.gemm[dtype]
    total: Any = 0.0
    for (m, n, k), count in zip(sizes, times, strict=True):
        seconds = gemm_time(
            np.maximum(m, 1), n, np.maximum(k, 1), hardware=profile.hardware, parameters=parameters, dtype=dtype,
            layout=_layout(layout), b_copies=_reuse(layout),
        )  # fmt: skip
        total = total + np.where(np.asarray(m) * k > 0, count * seconds, 0.0)
    return np.asarray(total)


class _AtOnce(NamedTuple):
    """One kernel for all groups, on one device."""

    layout: str
    slowdown: float
    launch: float  # s
    rates: _Rates
    grouped: GroupedParameters

    @classmethod
    def of(cls, profile: DeviceProfile, dtype: str, layout: str) -> "_AtOnce":
        p = profile.gemm[dtype]
        rates = _Rates.of(profile.hardware, p, dtype, None)
        launch = p.launch_clocks / profile.hardware.clock_hz
        return cls(layout, p.slowdown(_layout(layout)), launch, rates, profile.grouped)

    def seconds(self, counts: Array, times: Array, a: Array, b: Array) -> Array:
        """Seconds of products of `counts` rows, `times` of each: (groups, products); a and b: (products,)."""
        m, n, k = (a, b, counts) if self.layout == "nt" else (counts, b, a)
        times = np.where(counts > 0, times, 0)
        near, far = _bytes(
            np.asarray(m), n, k, times, np.asarray(1.0), np.asarray(_reuse(self.layout)), np.asarray(1.0), self.rates
        )
        memory = np.maximum((near / self.rates.l2 + far / self.rates.dram) * self.grouped.memory, NOTHING)
        best: Any = np.inf
        for tile in self.rates.p.tiles:
            work, tiles = self._work(tile, m, n, k)
            work, tiles = work * times, (tiles * times).sum(axis=0)
            alike = work * (_waves(tiles / self.rates.sm_count, self.rates.p.wave_tail) / np.maximum(tiles, 1.0))
            busy = alike.sum(axis=0)
            each = np.maximum(alike * (_throttled(busy, self.rates) / np.maximum(busy, NOTHING)), NOTHING)
            best = np.minimum(best, _overlap(each, memory, self.grouped.overlap_loss).sum(axis=0))
        drawn = (2.0 * m * n * k * times).sum(axis=0) * self.rates.flop_power
        return np.asarray(self.launch + np.maximum(best, drawn))

    def _work(self, tile: tuple[int, int], m: Any, n: Any, k: Any) -> tuple[Any, Any]:
        """Seconds that the tiles of one product take on one SM, and how many there are."""
        r, (height, width) = self.rates, tile
        rows, cols = np.minimum(m, height), np.minimum(n, width)
        padded = np.ceil(k / r.p.k_step) * r.p.k_step
        math = 2.0 * height * width * (_flop_time(np.asarray(k, dtype=np.float64), r) * self.slowdown)
        slice_time = np.maximum((rows + cols) * (r.item / r.sm_load), np.maximum(math, r.k_latency))
        main_loop = padded * (slice_time + r.k_bubble) * self.grouped.main_loop
        each = main_loop + rows * cols * (self.grouped.epilogue * r.p.epilogue * r.out_item / r.sm_load)
        tiles = np.ceil(m / height) * np.ceil(n / width)
        return tiles * each, tiles


def _layout(layout: str) -> Any:
    assert layout in LAYOUTS, layout
    return layout


def _reuse(layout: str) -> float:
    """How often another B comes before the same one: a weight waits for the next step, an activation was just there."""
    return 1.0 if layout == "nt" else np.inf
