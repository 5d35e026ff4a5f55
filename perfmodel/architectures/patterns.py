"""Layers that come again alike, alone or in a pattern: each kind is recorded once."""

from collections.abc import Hashable, Sequence

LONGEST = 8  # layers until they come again alike (Jamba); a longer pattern is recorded layer by layer


def runs_of(keys: Sequence[Hashable]) -> list[tuple[int, int, int]]:
    """Runs of layers with equal keys, in their order: (first layer, layers of a pattern, times that it comes in a row).

    The first block stands alone in any case: what all blocks share (its input, masks, rotary tables) is allocated
    before it and dies with its backward.
    """
    found = [(0, 1, 1)]
    first = 1
    while first < len(keys):
        period, times = next(((p, n) for p in range(1, LONGEST + 1) if (n := _times(keys, first, p)) > 1), (1, 1))
        found.append((first, period, times))
        first += period * times
    return found


def _times(keys: Sequence[Hashable], first: int, period: int) -> int:
    """How often the pattern of `period` keys from `first` on comes in a row."""
    pattern, times = keys[first : first + period], 1
    while keys[first + times * period : first + (times + 1) * period] == pattern:
        times += 1
    return times
