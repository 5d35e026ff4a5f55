"""Times one case: repeats, least and lower quartile, with the clock that `validate measure` uses on the device."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..measuring.clocks import CpuClock

WARM_UP = 2
CUDA_BURST = 5e-4  # s: calls between two events last at least this long, so that their resolution does not show


@dataclass(frozen=True)
class Timing:
    """Seconds a call over several repeats.

    Attributes:
        quartile: a quarter of the repeats were faster: what a call takes on a machine with other work, without the
            repeats that this work disturbed.
        spread: highest less lowest, over the median.
    """

    least: float
    quartile: float
    median: float
    spread: float
    repeats: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        """From the seconds of each repeat (at least one)."""
        s = sorted(seconds)
        median = s[len(s) // 2]
        return cls(s[0], s[len(s) // 4], median, (s[-1] - s[0]) / median if median else 0.0, len(s))


class CpuStopwatch:
    """Calls one by one on the host's clock, less what reading the clock takes."""

    def __init__(self, threads: int) -> None:
        self.clock = CpuClock(alone=threads == 1)
        self.kind = self.clock.kind
        now = self.clock.now
        pairs = [(now(), now()) for _ in range(500)]
        self.cost = min(b - a for a, b in pairs)

    def __call__(self, call: Callable[[int], object], inner: int, seconds: float, repeats: int) -> Timing:
        """Time `call(i)`, `inner` times a repeat, up to `repeats` times or until the time is over (3 at least)."""
        now = self.clock.now
        found: list[float] = []
        end = time.perf_counter() + seconds
        for i in range(WARM_UP):
            call(i)
        while len(found) < repeats and (len(found) < 3 or time.perf_counter() < end):
            base = len(found) * inner
            start = now()
            for i in range(inner):
                call(base + i)
            found.append(max(0.0, now() - start - self.cost) / inner)
        return Timing.of(found)


class CudaStopwatch:
    """Bursts of calls between two events of the stream.

    A burst follows a call that is still in flight: on an idle device the way of the first launch there (5 to 10 us)
    would count as the kernel's.
    """

    kind = "CUDA events"

    def __call__(self, call: Callable[[int], object], inner: int, seconds: float, repeats: int) -> Timing:
        """Time `call(i)`; a burst has `inner` calls, or as many as last long enough for an event."""
        end = time.perf_counter() + seconds
        for i in range(WARM_UP):
            call(i)
        once = self._burst(call, inner, 0)
        inner = max(inner, min(200, int(CUDA_BURST / max(once, 1e-7)) + 1))
        found: list[float] = []
        while len(found) < repeats and (len(found) < 3 or time.perf_counter() < end):
            found.append(self._burst(call, inner, len(found) * inner))
        return Timing.of(found)

    @staticmethod
    def _burst(call: Callable[[int], object], inner: int, base: int) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        call(base)
        start.record()
        for i in range(1, inner + 1):
            call(base + i)
        stop.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(stop)) * 1e-3 / inner


Stopwatch = CpuStopwatch | CudaStopwatch


def stopwatch(device: str, threads: int) -> Stopwatch:
    """The stopwatch of a kind of device."""
    return CudaStopwatch() if device == "cuda" else CpuStopwatch(threads)
