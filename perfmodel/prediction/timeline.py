"""Step time as a max-plus product: the host dispatches, the device executes, each on its own clock.

An op advances the clocks (host, device):

    host'   = host + dispatch
    device' = max(device, host' + launch) + duration

which is a matrix in the (max, +) semiring. Matrices of ops multiply to one of their part, a part that repeats is a
power, and every entry is an array over the grid. A synchronisation sets both clocks to the later one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Seconds = Any  # float or array over the grid
NEVER = -np.inf


def later(a: Seconds, b: Seconds) -> Seconds:
    """The later of two times at every point of the grid."""
    if type(a) is float and type(b) is float:
        return a if a > b else b
    return np.maximum(a, b)


@dataclass(frozen=True, slots=True)
class Clocks:
    """A 2 x 2 max-plus matrix on (host, device); `xy` is the delay from clock x at the start to clock y at the end."""

    hh: Seconds
    hd: Seconds
    dh: Seconds
    dd: Seconds

    def then(self, other: "Clocks") -> "Clocks":
        """This stretch of work followed by another (the max-plus product)."""
        return Clocks(
            later(self.hh + other.hh, self.hd + other.dh),
            later(self.hh + other.hd, self.hd + other.dd),
            later(self.dh + other.hh, self.dd + other.dh),
            later(self.dh + other.hd, self.dd + other.dd),
        )

    def power(self, n: int) -> "Clocks":
        """This stretch n times in a row, by repeated squaring."""
        result, square = IDENTITY, self
        while n:
            if n & 1:
                result = result.then(square)
            square = square.then(square) if n > 1 else square
            n >>= 1
        return result

    @property
    def end(self) -> Seconds:
        """When all work is done, both clocks started at 0."""
        return later(later(self.hh, self.dh), later(self.hd, self.dd))


def launched(seconds: float) -> Clocks:
    """One launch that the device waits for (a CUDA graph)."""
    return Clocks(seconds, seconds, NEVER, 0.0)


IDENTITY = Clocks(0.0, NEVER, NEVER, 0.0)
SYNC = Clocks(0.0, 0.0, 0.0, 0.0)


def of_ops(dispatch: np.ndarray, duration: np.ndarray, launch: float, launched: np.ndarray | None = None) -> Clocks:
    """The matrix of a row of ops without synchronisation, in closed form.

    Args:
        dispatch: host seconds of each op, shape (ops, *grid).
        duration: device seconds of each op, same shape; 0 where nothing runs on the device.
        launch: seconds from the host's launch to the device's start.
        launched: which ops launch something, shape (ops,); all if None.

    Since device' of the last op is max over i of (host time of op i + launch + durations from i on), two cumulative
    sums and a maximum replace the loop.
    """
    if not len(dispatch):
        return IDENTITY
    host = np.cumsum(dispatch, axis=0)
    end = host[-1]
    if launched is not None:
        host, duration = host[launched], duration[launched]
    if not len(host):
        return Clocks(end, np.full(duration.shape[1:], NEVER), NEVER, np.zeros(duration.shape[1:]))
    if duration.ndim > 1:
        return _of_grid(host, duration, launch, end)
    before = np.cumsum(duration)
    total = before[-1].item()
    return Clocks(end.item(), (host - (before - duration)).max().item() + (launch + total), NEVER, total)


def _of_grid(host: np.ndarray, duration: np.ndarray, launch: float, end: Seconds) -> Clocks:
    """The same sums over a grid, op by op: the three rows at work stay in the cache."""
    before = np.zeros(duration.shape[1:])
    latest = np.full(duration.shape[1:], NEVER)
    lead = np.empty(duration.shape[1:])
    for dispatched, seconds in zip(host, duration, strict=True):
        np.maximum(latest, np.subtract(dispatched, before, out=lead), out=latest)
        before += seconds
    return Clocks(end, latest + (launch + before), NEVER, before)


def of_synced(pieces: Sequence[Clocks]) -> Clocks:
    """Pieces with a synchronisation between each two."""
    result = pieces[0]
    for piece in pieces[1:]:
        result = result.then(SYNC).then(piece)
    return result


def simulate(dispatch: Sequence[float], duration: Sequence[float], launch: float) -> tuple[float, float]:
    """The same row of ops, op by op: (host, device) at the end. The reference for tests."""
    host = device = 0.0
    for d, t in zip(dispatch, duration, strict=True):
        host += d
        device = max(device, host + launch) + t
    return host, device
