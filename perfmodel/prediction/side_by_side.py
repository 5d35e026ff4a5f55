"""Several devices that run the same program: their figures are columns, shape (devices, 1), beside those of a grid."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..devices.profile import DeviceProfile
from .contention import Seconds

Devices = tuple[DeviceProfile, ...]


def of_each(on: DeviceProfile | Devices, figure: Callable[[DeviceProfile], float]) -> Any:
    """A figure of one device, or the column of several."""
    return figure(on) if isinstance(on, DeviceProfile) else np.array([[figure(device)] for device in on])


def stacked(found: Sequence[Seconds]) -> Seconds:
    """What a part's ops take on each of several devices, shape (ops, devices, points)."""
    if all(seconds.alone is seconds.added for seconds in found):
        alone = _stacked([seconds.alone for seconds in found])
        return Seconds(alone, alone)
    return Seconds(*(_stacked(columns) for columns in zip(*found, strict=True)))


def _stacked(found: Sequence[np.ndarray]) -> np.ndarray:
    of_points = [seconds if seconds.ndim > 1 else seconds[:, None] for seconds in found]
    return np.stack(of_points, axis=1) if len(found) > 1 else of_points[0][:, None]
