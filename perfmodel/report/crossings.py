"""Where a verdict turns, in words: "batch 1 to 512: faster up to 2, slower from 3 on"."""

from itertools import groupby

from ..questions.crossover import Crossover

FLUTTER = 1.05  # a stretch between points closer than this is not told
MOST_TOLD = 4  # stretches of one verdict; with more, only the first and the last are told


def crossing_in_words(c: Crossover, labels: tuple[str, str]) -> str:
    """One axis in a line; `labels` are the two methods in words."""
    if not c.values:
        return f"{c.axis}: {verdicts(c, labels)}"
    span = _at(c, 0) if len(c.values) == 1 else f"{_at(c, 0)} to {_at(c, -1)}"
    return f"{c.axis} {span}: {verdicts(c, labels)}"


def verdicts(c: Crossover, labels: tuple[str, str]) -> str:
    """What holds along the axis, and how far the two fit."""
    if not c.values:
        return "no other value is possible"
    stretches = _settled(c)
    if len(stretches) == 1:
        text = f"{_plainly(c.verdict[0])} throughout, speed-up {c.ratio[0]:.2f} to {c.ratio[-1]:.2f}"
    elif len(stretches) <= MOST_TOLD:
        text = ", ".join(_stretch(c, verdict, index) for verdict, index in stretches)
    else:
        first, last = stretches[0], stretches[-1]
        between = f"turning {len(stretches) - 1} times in between"
        text = f"{_stretch(c, *first)}, {_stretch(c, *last)}, {between}"
    return text + _room(c, labels)


def _settled(c: Crossover) -> list[tuple[str, list[int]]]:
    """(verdict, its points) along the axis, without the flutter where the ratio runs along the edge of a verdict."""
    runs = [[i for i, _ in group] for _, group in groupby(enumerate(c.verdict), lambda x: x[1])]
    kept = [
        run
        for k, run in enumerate(runs)
        if k in (0, len(runs) - 1) or c.values[run[-1] + 1] > FLUTTER * c.values[run[0] - 1]
    ]
    alike = groupby(kept, lambda run: c.verdict[run[0]])
    return [(verdict, [i for run in runs for i in run]) for verdict, runs in alike]


def _stretch(c: Crossover, verdict: str, index: list[int]) -> str:
    first, last = index[0], index[-1]
    if first == 0:
        return f"{_plainly(verdict)} up to {_at(c, last)}"
    if last == len(c.values) - 1:
        return f"{_plainly(verdict)} from {_at(c, first)} on"
    where = _at(c, first) if first == last else f"{_at(c, first)} to {_at(c, last)}"
    return f"{_plainly(verdict)} at {where}"


def _plainly(verdict: str) -> str:
    return "the same" if verdict == "same" else verdict


def _at(c: Crossover, index: int) -> str:
    """A point of the axis; of targets with the one that it adds."""
    value = c.values[index]
    return f"{value} ({c.names[value - 1]})" if c.names else f"{value:,}"


def _room(c: Crossover, labels: tuple[str, str]) -> str:
    """How far the two fit into memory, as far as points were tried."""
    most = [sum(fits) for fits in (c.fits_a, c.fits_b)]
    if all(n == len(c.values) for n in most):
        return ""
    ends = [f"up to {_at(c, n - 1)}" if n else "nowhere" for n in most]
    return f"; in memory: {labels[0]} {ends[0]}, {labels[1]} {ends[1]} (of the values tried)"
