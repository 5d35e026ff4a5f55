"""In which order NeuSight's boards ran their GEMMs, and which clock that left each of them.

A board whose power limit is below what its boost clock draws (T4 and L4: 70 W) runs a product at any clock between the
two, by what it ran before: neighbouring batch sizes differ by a factor of 1.9. NeuSight's programs tell what that was
(https://github.com/sitar-lab/NeuSight, neusight/Dataset/dims.py and collect.py): the shapes of a campaign in a fixed
order, each run 25 times and once under the profiler, its latency the mean of the five fastest. A shape that does not
fit into memory fails and gives the board a pause, in which its clock recovers. So a campaign is replayed, shape by
shape, with predicted times, those of shapes that are not in the published files included.
"""

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from perfmodel.program.dims import Array

RUNS, FASTEST = 26, 5  # of a shape: in all, and those that its latency is the mean of
POOL = 0.9  # share of the memory that operands and result can take
# How fast the power control moves the clock between boost and sustained, fitted to the rows of T4 and L4 that are not
# left out. A pause is the time from shape to shape.
REACTION = 0.09  # seconds of load in which 63 % of the way down are gone: the board's, where it can be fitted
RECOVERY = 6.0  # pauses in which 63 % of the way up are gone
FAILURE = 22.0  # pauses that a shape which does not fit is worth
FILLING = 2.0  # pauses that filling A and B is worth, per second of writing them at the datasheet's bandwidth
Shape = tuple[int, int, int, int]  # products in one launch, rows of C, elements summed over, columns of C


@dataclass(frozen=True)
class Campaign:
    """Shapes in the order in which they were run.

    Attributes:
        batch, m, k, n: of every shape.
        fails: whether it does not fit into the board's memory.
        filling: seconds that writing its operands takes at the datasheet's bandwidth.
    """

    batch: Array
    m: Array
    k: Array
    n: Array
    fails: NDArray[np.bool_]
    filling: Array


@lru_cache(maxsize=64)
def board_campaign(name: str, memory_bytes: float, memory_bandwidth: float) -> Campaign:
    """What a board ran in the campaign `bmm`, `linear` or `collected`."""
    batch, m, k, n = np.array(order(name), dtype=np.float64).T
    a, c = 4.0 * batch * m * k, 4.0 * batch * m * n
    b = 4.0 * k * n * (batch if name == "bmm" else 1.0)
    return Campaign(batch, m, k, n, a + b + c > POOL * memory_bytes, (a + b) / memory_bandwidth)


@lru_cache(maxsize=4)
def order(name: str) -> list[Shape]:
    """The shapes of a campaign in the order in which they were run."""
    return {"bmm": _bmm, "linear": _linear, "collected": _collected}[name]()


def _bmm() -> list[Shape]:
    """Products of attention, forward and backward, without duplicates: in the order of a Python set."""
    grid = product(
        (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
        (12, 16, 20, 40, 96, 128),
        (196, 384, 512, 1024, 2048, 3072, 4096),
        (64, 96, 128, 256),
    )
    forward = [(b * heads, s, x, y) for b, heads, s, hidden in grid for x, y in ((hidden, s), (s, hidden))]
    return list(set(_backward(forward)))


def _linear() -> list[Shape]:
    """Linear layers of GPTs and BERTs, forward and backward, without duplicates: in the order of a Python set."""
    grid = list(product((1, 2, 4, 8, 16, 32), (12, 16, 20, 32), (512, 1024, 2048), (64, 80, 128)))
    forward: list[Shape] = []
    for b, heads, s, hidden in grid:
        rows, width = b * s, heads * hidden
        forward += [(1, rows, width, 3 * width), (1, rows, width, width)]
        forward += [(1, rows, width, 4 * width), (1, rows, 4 * width, width)]
    forward += [(1, b * s, h * d, vocabulary) for b, h, s, d in grid for vocabulary in (50272, 30522)]
    return list(set(forward + _backward(forward)))


def _backward(forward: Iterable[Shape]) -> list[Shape]:
    """Each product and its two gradients."""
    return [y for b, m, k, n in forward for y in ((b, m, k, n), (b, m, n, k), (b, k, m, n))]


def _collected() -> list[Shape]:
    """Random linear layers, from small to large."""
    draw = random.Random(42).randint
    edges = [0, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]
    cells = [*product(range(6), range(6), range(9)), *product(range(6), range(6, 9), range(6))]
    return [
        (1, *(draw(edges[i] + 1, edges[i + 1] + 1) for i in cell))  # type: ignore[misc]
        for cell in cells
        for _ in range(15)
    ]


def entries(name: str, shapes: list[Shape]) -> list[int]:
    """Where the measured shapes stand in the campaign; -1 for all if they were not run in this order."""
    at = {shape: i for i, shape in enumerate(order(name))}
    found = [at.get(shape, -1) for shape in shapes]
    return found if all(a < b for a, b in zip([-1, *found], found, strict=False)) else [-1] * len(shapes)


def boosts(run: Campaign, sustained: Array, gain: float, reaction: float) -> Array:
    """How far from the sustained (0) to the boost clock (1) the board was while each shape was timed.

    Args:
        run: the campaign.
        sustained: seconds of one product of every shape at the sustained clock.
        gain: ln of the boost over the sustained clock.
        reaction: seconds of load in which 63 % of the way down are gone.
    """
    failure = math.exp(-FAILURE / RECOVERY)
    rest = np.exp((-1.0 - FILLING * run.filling) / RECOVERY)
    out = np.zeros(len(sustained))
    boost = 0.0
    for i, (fails, kept, seconds) in enumerate(zip(run.fails.tolist(), rest.tolist(), sustained.tolist(), strict=True)):
        if fails:
            boost = 1.0 - (1.0 - boost) * failure
            continue
        boost = 1.0 - (1.0 - boost) * kept
        work = seconds / reaction
        out[i] = _mean_boost(boost, FASTEST * work, gain)[0]
        boost *= math.exp(-_mean_boost(boost, RUNS * work, gain)[1])
    return out


def _mean_boost(start: float, work: float, gain: float) -> tuple[float, float]:
    """The mean over some work, and how long it takes; work and time at the sustained clock in reaction times."""
    mean, time = start, work
    for _ in range(2):
        time = work * math.exp(-gain * mean)
        mean = start * -math.expm1(-time) / time
    return mean, time
