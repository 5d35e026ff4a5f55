"""What ops of several streams take from each other while they run at the same time."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..calls import costs
from ..calls.collectives import KIND_OF, exchanges, message_bytes
from ..devices.profile import DeviceProfile
from ..program.part import Part
from ..program.streams import COMPUTE


class Seconds(NamedTuple):
    """Device seconds of a part's ops, shape (ops, *grid).

    Attributes:
        alone: of each by itself: what it keeps its stream busy.
        added: by which it lengthens the time that the device is busy; less than `alone` where it runs beside others.
    """

    alone: np.ndarray
    added: np.ndarray

    def without_collectives(self, part: Part) -> "Seconds":
        """The same of GPUs that need not exchange anything."""
        return self._without([i for i, op in enumerate(part.ops) if exchanges(op)])

    def without_offloading(self, part: Part) -> "Seconds":
        """The same where copies over the bus and the host's cores take no time."""
        return self._without([i for i, op in enumerate(part.ops) if costs.offloads(op)])

    def _without(self, places: list[int]) -> "Seconds":
        alone, added = self.alone.copy(), self.added.copy()
        alone[places] = added[places] = 0.0
        return Seconds(alone, added)


def on_each(found: Sequence[Seconds]) -> Seconds:
    """Those of a part's ops on each of several devices, shape (ops, devices, points)."""

    def stacked(columns: Sequence[np.ndarray]) -> np.ndarray:
        of_points = [seconds if seconds.ndim > 1 else seconds[:, None] for seconds in columns]
        return np.stack(of_points, axis=1) if len(of_points) > 1 else of_points[0][:, None]

    alone = stacked([seconds.alone for seconds in found])
    same = all(seconds.added is seconds.alone for seconds in found)
    return Seconds(alone, alone if same else stacked([seconds.added for seconds in found]))


def on_the_slowest(part: Part, alone: np.ndarray, on: DeviceProfile) -> np.ndarray:
    """What a part's ops take on the slowest GPU of a job, for which the others wait; what GPUs exchange, or move over
    the bus, takes what it takes on any.

    Args:
        alone: of each op by itself on the mean GPU.
    """
    if on.network is None or np.all(np.equal(on.network.slowest, 1.0)):
        return alone
    slower = np.asarray(on.network.slowest)
    found = np.broadcast_to(alone[:, None], (len(alone), *slower.shape)) if slower.ndim and alone.ndim == 1 else alone
    own = np.array([not (exchanges(op) or costs.offloads(op)) for op in part.ops], dtype=bool)
    return np.where(own.reshape(-1, *[1] * (found.ndim - 1)), found * slower, found)


def beside_streams(part: Part, alone: np.ndarray, on: DeviceProfile) -> Seconds:
    """What a part's ops take when those of other streams run beside those of the compute stream.

    Copies move memory, and get the bandwidth that the compute stream leaves: all of it goes to kernels that only move
    memory too, a matrix product or attention needs it for its bytes alone. What finds no room holds up the compute
    stream. A collective has multiprocessors to itself, which kernels beside it lack. What is offloaded is no faster
    than the bus, for which the device's memory has room. A CPU has no streams: there one op follows the other.
    """
    elsewhere = np.array([costs.offloads(op) for op in part.ops], dtype=bool)
    if on.kind == "cpu" or (part.runs is None and not elsewhere.any()):
        return Seconds(alone, alone)
    beside = np.array([op.launched and op.runs.on != COMPUTE for op in part.ops], dtype=bool)
    if not (beside | elsewhere).any():
        return Seconds(alone, alone)
    sends = np.array([exchanges(op) for op in part.ops], dtype=bool)
    added = alone.copy()
    if sends.any():
        added[sends] = alone[sends] * _share_of_processors(part, alone, on)
    added[elsewhere] = 0.0
    copies = beside & ~sends & ~elsewhere
    if copies.any():
        needed, free = alone[copies].sum(axis=0), _free_bandwidth(part, beside, alone, on)
        added[copies] *= np.maximum(0.0, needed - free) / np.maximum(needed, np.finfo(float).tiny)
    return Seconds(alone, added)


def _free_bandwidth(part: Part, beside: np.ndarray, alone: np.ndarray, on: DeviceProfile) -> Any:
    """Seconds of the compute stream in which memory has nothing to do."""
    free: Any = 0.0
    for op, apart, seconds in zip(part.ops, beside, alone, strict=True):
        if not apart and costs.kind(op) in ("gemm", "attention"):
            moving = (op.bytes_read + op.bytes_written) / on.hardware.memory_bandwidth
            free = free + np.maximum(0.0, seconds - moving)
    return free


def _share_of_processors(part: Part, alone: np.ndarray, on: DeviceProfile) -> np.ndarray:
    """The share of the multiprocessors that each collective of a part takes, as long as it runs beside kernels there.

    Collectives of a part run beside its kernels for as long as the shorter of the two takes.
    """
    assert on.network is not None
    ops = [(op, seconds) for op, seconds in zip(part.ops, alone, strict=True) if exchanges(op)]
    sending = sum(seconds for _, seconds in ops)
    computing = sum(s for op, s in zip(part.ops, alone, strict=True) if op.runs.on == COMPUTE)
    overlap = np.minimum(1.0, computing / np.maximum(sending, np.finfo(float).tiny))
    shares = [
        np.minimum(
            1.0, on.network.channels(KIND_OF[op.name], message_bytes(op), *op.attrs.ranks) / on.hardware.sm_count
        )
        for op, _ in ops
        if op.attrs.ranks is not None
    ]
    return np.stack([np.broadcast_to(share * overlap, alone.shape[1:]) for share in shares])
