"""Seconds of products by expert (`torch._grouped_mm`): one kernel for all experts, or a product for each.

The one kernel (CUTLASS, persistent) has one shape of tiles for all groups. The tiles of all groups fill the SMs
together, so that only the last wave of all is partly idle; what groups with few rows waste is the rest of their own
tiles. Every weight that is hit is read once. Where ATen has no such kernel it calls a product for each expert.
"""

from typing import Any

import numpy as np

from ..program.routing import Routing
from .gemm import LAYOUTS, Array, _bytes, _flop_time, _overlap, _Rates, _throttled, _waves, gemm_time
from .profile import DeviceProfile

Sizes = tuple[Any, Any, Any]  # m, n, k of one expert's product


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
    sizes: list[Sizes] = [(a, b, n) if layout == "nt" else (n, b, a) for n, _ in groups]
    times = [times for _, times in groups]
    if looped:
        return _one_by_one(profile, dtype, layout, sizes, times)
    return _at_once(profile, dtype, layout, sizes, times)


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


def _at_once(profile: DeviceProfile, dtype: str, layout: str, sizes: list[Sizes], times: list[Array]) -> Array:
    """One kernel: the best of the tiles that are the same for all groups."""
    parameters = profile.gemm[dtype]
    rates = _Rates.of(profile.hardware, parameters, dtype, None)
    slowdown = parameters.slowdown(_layout(layout))
    memory: Any = 0.0
    for (m, n, k), count in zip(sizes, times, strict=True):
        near, far = _bytes(m, n, k, count, np.asarray(1.0), np.asarray(_reuse(layout)), np.asarray(1.0), rates)
        memory = memory + near / rates.l2 + far / rates.dram
    best: Any = np.inf
    for tile in parameters.tiles:
        work, tiles = _work(tile, sizes, times, slowdown, rates)
        filled = tiles / rates.sm_count
        seconds = _waves(filled, parameters.wave_tail) * (work / np.maximum(tiles, 1.0))
        best = np.minimum(best, seconds)
    best = _overlap(_throttled(best, rates), memory, parameters.overlap_loss)
    return np.asarray(parameters.launch_clocks / profile.hardware.clock_hz + best)


def _work(tile: tuple[int, int], sizes: list[Sizes], times: list[Array], slowdown: float, r: _Rates) -> tuple[Any, Any]:
    """Seconds that all tiles of all groups take on one SM, and how many there are."""
    height, width = tile
    work: Any = 0.0
    tiles: Any = 0.0
    for (m, n, k), count in zip(sizes, times, strict=True):
        rows, cols = np.minimum(m, height), np.minimum(n, width)
        padded = np.ceil(np.asarray(k) / r.p.k_step) * r.p.k_step
        math = 2.0 * height * width * (_flop_time(np.asarray(k, dtype=np.float64), r) * slowdown)
        slice_time = np.maximum((rows + cols) * (r.item / r.sm_load), np.maximum(math, r.k_latency))
        each = padded * (slice_time + r.k_bubble) + rows * cols * (r.p.epilogue * r.out_item / r.sm_load)
        blocks = count * np.ceil(np.asarray(m) / height) * np.ceil(np.asarray(n) / width)
        work, tiles = work + blocks * each, tiles + blocks
    return work, tiles


def _layout(layout: str) -> Any:
    assert layout in LAYOUTS, layout
    return layout


def _reuse(layout: str) -> float:
    """How often another B comes before the same one: a weight waits for the next step, an activation was just there."""
    return 1.0 if layout == "nt" else np.inf
