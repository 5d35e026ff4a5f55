"""Step time as a max-plus product: the host dispatches, every stream of the device executes, each on its own clock.

An op that runs on stream s, after streams a, b, … (`perfmodel.program.streams`), advances the clocks:

    host' = host + dispatch
    s'    = max(s, a, b, …, host' + launch) + duration

and where it synchronises, the host then waits: host'' = max(host', s'). Each of these is a matrix in the (max, +)
semiring. Matrices of ops multiply to one of their part, a part that repeats is a power, and every entry is an array
over the grid. A matrix has entries only for the clocks that its ops touch: a step on two clocks pays for no third.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ..program.streams import COMPUTE, HOST, MAIN, Run

Seconds = Any  # float or array over the grid
NEVER = -np.inf
FEW = 64  # points of a grid that are worked on together


def later(a: Seconds, b: Seconds) -> Seconds:
    """The later of two times at every point of the grid."""
    if type(a) is float and type(b) is float:
        return a if a > b else b
    return np.maximum(a, b)


class Clocks(NamedTuple):
    """A max-plus matrix on any number of clocks, by columns.

    Attributes:
        ends: `ends[y][x]` is the delay from clock x at the start to clock y at the end. There is no path where x is
            missing, and a clock y that is missing altogether stays as it is.
    """

    ends: Mapping[str, Mapping[str, Seconds]] = {}

    def then(self, other: "Clocks") -> "Clocks":
        """This stretch of work followed by another (the max-plus product)."""
        before = self.ends
        if not before:
            return other
        ends = dict(before)
        for end, paths in other.ends.items():
            latest: dict[str, Seconds] = {}
            for through, rest in paths.items():
                for start, delay in before.get(through, {through: 0.0}).items():
                    time = delay + rest
                    latest[start] = later(latest[start], time) if start in latest else time
            ends[end] = latest
        return Clocks(ends)

    def power(self, n: int) -> "Clocks":
        """This stretch n times in a row: where the host waits for nothing in closed form, else by repeated squaring."""
        if n < 2:
            return self if n else IDENTITY
        host_paths, paths = self.ends.get(HOST, {}), self.ends.get(COMPUTE, {})
        if self.ends.keys() == paths.keys() == {HOST, COMPUTE} and host_paths.keys() == {HOST}:
            host, launch, busy = host_paths[HOST], paths[HOST], paths[COMPUTE]
            latest = launch + later(host, busy) * (n - 1)  # of the way through one, all others on the longer side
            return Clocks({HOST: {HOST: host * n}, COMPUTE: {HOST: latest, COMPUTE: busy * n}})
        half = self.power(n // 2)
        even = half.then(half)
        return even.then(self) if n % 2 else even

    def delay(self, start: str, end: str) -> Seconds:
        """Seconds from one clock at the start to another at the end; `NEVER` where there is no path."""
        return self.ends.get(end, {end: 0.0}).get(start, NEVER)

    @property
    def end(self) -> Seconds:
        """When all work is done, all clocks started at 0."""
        latest: Seconds = 0.0
        for paths in self.ends.values():
            for delay in paths.values():
                latest = later(latest, delay)
        return latest


IDENTITY = Clocks()


def advance_clock(clock: str, seconds: Seconds) -> Clocks:
    """A clock works on by itself."""
    return Clocks({clock: {clock: seconds}})


def wait(clock: str, *others: str) -> Clocks:
    """A clock waits for others: the host for a stream (a synchronisation), a stream for other streams."""
    return Clocks({clock: dict.fromkeys((clock, *others), 0.0)})


def launched(seconds: float) -> Clocks:
    """One launch that the compute stream waits for (a CUDA graph)."""
    return Clocks({HOST: {HOST: seconds}, COMPUTE: {HOST: seconds, COMPUTE: 0.0}})


class ClockRow(NamedTuple):
    """Ops that the host dispatches one after another.

    Attributes:
        dispatch: host seconds before each op, shape (ops, *grid), or with ones for the grid.
        duration: seconds that it runs on its stream, shape (ops, *grid); 0 where nothing runs on the device.
        launched: which ops launch something, shape (ops,).
        synchronised: the places of ops that the host then waits for.
        runs: where each op runs; all on the compute stream if None.
        taken: seconds by which each op of another stream holds up the compute stream, shape (ops, *grid).
    """

    dispatch: np.ndarray
    duration: np.ndarray
    launched: np.ndarray
    synchronised: Sequence[int] = ()
    runs: Sequence[Run] | None = None
    taken: np.ndarray | None = None

    def pieces(self) -> Iterator[tuple[slice, Run, bool]]:
        """Stretches of one stream: its first op may wait; last whether the host waits at the end."""
        runs, n = self.runs, len(self.launched)
        waits = {place + 1 for place in self.synchronised}
        starts = {0, *waits}
        if runs is not None:
            starts.update(i for i in range(1, n) if runs[i].after or runs[i].on != runs[i - 1].on)
        for start, stop in pairwise(sorted({*starts, n})):
            yield slice(start, stop), MAIN if runs is None else runs[start], stop in waits


def of_row(row: ClockRow, launch: float) -> Clocks:
    """The matrix of a row of ops.

    Args:
        launch: seconds from the host's launch to the device's start.
    """
    result = IDENTITY
    for rows, run, synchronises in row.pieces():
        if run.after:
            result = result.then(wait(run.on, *run.after))
        result = result.then(of_ops(row.dispatch[rows], row.duration[rows], launch, row.launched[rows], run.on))
        if run.on != COMPUTE and row.taken is not None:
            result = result.then(advance_clock(COMPUTE, total(row.taken[rows])))
        if synchronises:
            result = result.then(wait(HOST, run.on))
    return result


def total(seconds: np.ndarray) -> Seconds:
    """The sum over ops; a float where there is no grid."""
    if seconds.ndim > 1:  # whose sums are the same however many points there are
        return np.add.reduceat(seconds, (0,))[0]
    return seconds.sum().item()


def of_ops(
    dispatch: np.ndarray, duration: np.ndarray, launch: float, launched: np.ndarray, stream: str = COMPUTE
) -> Clocks:
    """The matrix of ops of one stream that wait for nothing but their launch, in closed form; arguments as of `Row`.

    Since the stream's clock after the last op is max over i of (host time of op i + launch + durations from i on), two
    cumulative sums and a maximum replace the loop.
    """
    host = np.cumsum(dispatch, axis=0)
    end = host[-1] if host.ndim > 1 else host[-1].item()
    host, duration = host[launched], duration[launched]
    if not len(host):
        return advance_clock(HOST, end)
    if duration.ndim > 1:
        latest, busy = (_of_few if duration[0].size <= FEW else _of_grid)(host, duration)
    else:
        before = np.cumsum(duration)
        latest, busy = (host - (before - duration)).max().item(), before[-1].item()
    return Clocks({HOST: {HOST: end}, stream: {HOST: latest + (launch + busy), stream: busy}})


def _of_few(host: np.ndarray, duration: np.ndarray) -> tuple[Seconds, Seconds]:
    """The same sums over a small grid, all ops at once."""
    after = np.cumsum(duration, axis=0)
    return np.maximum(host[0], (host[1:] - after[:-1]).max(axis=0, initial=NEVER)), after[-1]


def _of_grid(host: np.ndarray, duration: np.ndarray) -> tuple[Seconds, Seconds]:
    """The same sums over a grid, op by op: the three rows at work stay in the cache."""
    before = np.zeros(duration.shape[1:])
    latest = np.full(duration.shape[1:], NEVER)
    lead = np.empty(duration.shape[1:])
    for dispatched, seconds in zip(host, duration, strict=True):
        np.maximum(latest, np.subtract(dispatched, before, out=lead), out=latest)
        before += seconds
    return latest, before
