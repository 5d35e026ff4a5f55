"""Blocks that run the same program, as runs that are recorded once."""

from collections.abc import Hashable, Sequence
from typing import Protocol

LONGEST_PATTERN = 8  # layers until they come again alike (Jamba); a longer one is recorded layer by layer


class HasKinds(Protocol):
    """An architecture: how many blocks there are, and of what kind each is."""

    @property
    def layers(self) -> int: ...

    def layer_kind(self, layer: int) -> Hashable: ...


class HasKeys(Protocol):
    """A method, which treats blocks of equal keys alike."""

    def layer_key(self, layer: int) -> Hashable: ...


def runs_of_layers(architecture: HasKinds, method: HasKeys) -> list[tuple[int, int, int]]:
    """Layers that come again alike, in their order: (first layer, layers of a pattern, times that it comes in a row).

    The first block stands alone in any case: what all blocks share (its input, masks, rotary tables) is allocated
    before it and dies with its backward.
    """
    keys = [(architecture.layer_kind(i), method.layer_key(i)) for i in range(architecture.layers)]
    found = [(0, 1, 1)]
    first = 1
    while first < len(keys):
        period, times = next(
            ((p, n) for p in range(1, LONGEST_PATTERN + 1) if (n := _times(keys, first, p)) > 1), (1, 1)
        )
        found.append((first, period, times))
        first += period * times
    return found


def _times(keys: Sequence[Hashable], first: int, period: int) -> int:
    """How often the pattern of `period` keys from `first` on comes in a row."""
    pattern, times = keys[first : first + period], 1
    while keys[first + times * period : first + (times + 1) * period] == pattern:
        times += 1
    return times
