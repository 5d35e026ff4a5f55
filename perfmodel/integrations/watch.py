"""What a callback sees of a training run: marks on the device's clock, and the shapes of its batches."""

import time
from collections import defaultdict
from itertools import pairwise
from typing import Any

IN_STEP, DATA, OTHER = "step", "data", "other"  # what the time up to a mark went into


class Stopwatch:
    """Marks in time: on the device's stream where there is one, so that nothing waits for them."""

    def __init__(self, cuda: Any = None) -> None:
        self.cuda = cuda  # torch.cuda, or None on a CPU

    def mark(self) -> Any:
        """Now."""
        if self.cuda is None:
            return time.perf_counter()
        event = self.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: Any, last: Any) -> float:
        """From one mark to a later one; waits for the device."""
        if self.cuda is None:
            return float(last - first)
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3


class Watch:
    """One window of a run: time inside and between steps, and (samples, tokens, padded) of every micro-batch."""

    def __init__(self, clock: Stopwatch) -> None:
        self.clock = clock
        self.marks: list[tuple[str, Any]] = []
        self.batches: list[tuple[int, int, Any]] = []
        self.steps = 0

    def mark(self, what: str) -> None:
        """The time since the mark before went into this."""
        self.marks.append((what, self.clock.mark()))

    def batch(self, ids: Any, mask: Any) -> None:
        """A micro-batch of a shape (batch, seq); of the mask a sum is kept, to be read when the window is over."""
        self.batches.append((int(ids.shape[0]), int(ids.shape[1]), None if mask is None else mask.sum()))

    def seconds(self) -> dict[str, float]:
        """Seconds by what they went into."""
        found: dict[str, float] = defaultdict(float)
        for (_, first), (what, last) in pairwise(self.marks):
            found[what] += self.clock.seconds(first, last)
        return found

    def shapes(self) -> list[tuple[int, int, float]]:
        """(samples, tokens a sample, share of tokens that are padding) of the micro-batches."""
        return [(b, s, 0.0 if kept is None else 1 - float(kept) / (b * s)) for b, s, kept in self.batches]
