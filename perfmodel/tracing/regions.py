"""Which sizes share one program, and which of them to trace; needs no torch.

Programs change with the size at a few known places: a batch of one, a window that begins to bind, a table of positions
that ends. A `Region` lies between them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..program.dims import decide, is_one
from ..program.polynomials import NoPolynomial
from ..setup import Setup

BATCHES = (2, 3)
FAR = 4099  # the longest sample that is traced to solve for others, or four times the shortest
WINDOWS = re.compile(r"window|chunk|local|block_size")
TABLES = re.compile(r"max_position|n_positions|n_ctx|max_seq|max_sequence|max_source|max_target")


@dataclass(frozen=True)
class Region:
    """Sizes that share one program: a batch of one or any other, and lengths from `low` to below `high`.

    Attributes:
        high: None: there is no end.
    """

    single: bool
    low: int
    high: int | None

    def sizes(self, *, lengths: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Batches and lengths to trace; no lengths where the program does not look at the length.

        Raises:
            NoPolynomial: too few lengths to solve from.
        """
        batches = (1,) if self.single else BATCHES
        if not lengths:
            return batches, ()
        low, far = max(self.low, 2), max(4 * self.low, FAR)
        top = far if self.high is None else min(self.high - 1, far)
        spread = (low + (top - low) // 50, low + (top - low) // 3, top)
        odd = dict.fromkeys(s - 1 | 1 if s - 1 | 1 >= low else s | 1 for s in spread)
        found = tuple(s for s in odd if s <= top)
        if len(found) < len(spread):
            raise NoPolynomial(f"there are few lengths from {low} to {top}")
        return batches, found


def bounds(config: dict[str, Any]) -> tuple[int, ...]:
    """Lengths at which the program of a config.json may change: from each on it may be another."""
    return tuple(sorted({1, 2, *_bounds(config)}))


def _bounds(config: dict[str, Any]) -> Iterator[int]:
    for key, entry in config.items():
        if isinstance(entry, dict):
            yield from _bounds(entry)
        elif isinstance(entry, int) and not isinstance(entry, bool) and entry > 1 and "layer" not in key:
            if WINDOWS.search(key):
                yield entry
            elif TABLES.search(key):
                yield entry + 1


def region_of(setup: Setup, limits: tuple[int, ...]) -> Region:
    """The sizes that share a program with those of a setup.

    Args:
        limits: lengths from which on the program may be another, ascending.

    Raises:
        MixedStructure: those of a grid do not share one.
    """
    low, high = 1, None
    for limit in limits:
        if not decide(setup.seq >= limit):
            high = limit
            break
        low = limit
    return Region(is_one(setup.batch), low, high)
