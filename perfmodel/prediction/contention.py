"""What ops of several streams take from each other while they run at the same time."""

from typing import Any, NamedTuple

import numpy as np

from ..calls import costs
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


def beside_streams(part: Part, alone: np.ndarray, on: DeviceProfile) -> Seconds:
    """What a part's ops take when those of other streams run beside those of the compute stream.

    The former move memory, and get the bandwidth that the latter leave: all of it goes to kernels that only move memory
    too, a matrix product or attention needs it for its bytes alone. What finds no room holds up the compute stream. A
    CPU has no streams: there one op follows the other.
    """
    if on.kind == "cpu" or part.runs is None:
        return Seconds(alone, alone)
    beside = np.array([op.launched and op.runs.on != COMPUTE for op in part.ops], dtype=bool)
    if not beside.any():
        return Seconds(alone, alone)
    free: Any = 0.0
    for op, apart, seconds in zip(part.ops, beside, alone, strict=True):
        if not apart and costs.kind(op) in ("gemm", "attention"):
            moving = (op.bytes_read + op.bytes_written) / on.hardware.memory_bandwidth
            free = free + np.maximum(0.0, seconds - moving)
    needed = alone[beside].sum(axis=0)
    added = alone.copy()
    added[beside] *= np.maximum(0.0, needed - free) / np.maximum(needed, np.finfo(float).tiny)
    return Seconds(alone, added)
