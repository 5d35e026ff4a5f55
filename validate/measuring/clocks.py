"""Seconds by phase of a training step.

CPU: with one thread, the CPU time of the thread that trains, which the machine's other work cannot lengthen; with more,
or with several processes, the clock on the wall (threads that wait for each other spin, processes sleep). CUDA: events
in the stream, so that a phase's time is what it adds to the device's clock; the step's time is taken on the wall
between two synchronisations.
"""

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

THREAD, WALL, EVENTS = "thread CPU time", "wall", "CUDA events"


class Clock(Protocol):
    """Laps of one step."""

    kind: str

    def start(self) -> None:
        """The step begins."""

    def lap(self, phase: str) -> None:
        """What ran since the last mark belongs to a phase."""

    def finish(self) -> dict[str, float]:
        """Seconds by phase, `step` (the sum, or on CUDA the wall's) and `wall`."""


class CpuClock:
    """Laps on the host's clock."""

    def __init__(self, *, alone: bool) -> None:
        self.kind = THREAD if alone else WALL
        self.now: Callable[[], float] = time.thread_time if alone else time.perf_counter

    def start(self) -> None:
        """The step begins."""
        self.laps: dict[str, float] = {}
        self.wall = time.perf_counter()
        self.last = self.now()

    def lap(self, phase: str) -> None:
        """What ran since the last mark belongs to a phase."""
        now = self.now()
        self.laps[phase] = self.laps.get(phase, 0.0) + now - self.last
        self.last = now

    def finish(self) -> dict[str, float]:
        """Seconds by phase, their sum as `step`, and `wall`."""
        return {**self.laps, "step": sum(self.laps.values()), "wall": time.perf_counter() - self.wall}


class CudaClock:
    """Laps in the device's stream."""

    kind = EVENTS

    def start(self) -> None:
        """The step begins with an idle host and an idle device."""
        torch.cuda.synchronize()
        self.wall = time.perf_counter()
        self.marks: list[tuple[str, Any]] = [("", self._event())]

    def lap(self, phase: str) -> None:
        """What ran since the last mark belongs to a phase."""
        self.marks.append((phase, self._event()))

    def finish(self) -> dict[str, float]:
        """Seconds by phase between events; `step` and `wall` until the device is idle again."""
        torch.cuda.synchronize()
        wall = time.perf_counter() - self.wall
        laps: dict[str, float] = {}
        for (_, before), (phase, after) in zip(self.marks, self.marks[1:], strict=False):
            laps[phase] = laps.get(phase, 0.0) + before.elapsed_time(after) * 1e-3
        return {**laps, "step": wall, "wall": wall}

    @staticmethod
    def _event() -> Any:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def clock_for(device: str, *, alone: bool) -> Clock:
    """The clock of a kind of device; on a CPU, whether one thread does all the work."""
    return CudaClock() if device == "cuda" else CpuClock(alone=alone)
