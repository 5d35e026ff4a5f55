"""Blocks that run the same program, as runs that are recorded once."""

from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

from ..tape.core import tape
from ..tape.pointwise import cast
from ..tape.tensor import Tensor

LONGEST_PATTERN = 8  # layers until they come again alike (Jamba); a longer one is recorded layer by layer


class Stage(NamedTuple):
    """What a stage of a pipeline has of a model: some blocks, the first one also the embedding, the last one the head.

    Attributes:
        number, stages: which of how many stages it is.
        blocks: its own.
        given: whether what it receives needs a gradient.
    """

    number: int
    stages: int
    blocks: range
    given: bool = False

    @property
    def first(self) -> bool:
        """Whether it has the embedding."""
        return self.number == 0

    @property
    def last(self) -> bool:
        """Whether it has the head."""
        return self.number == self.stages - 1


class HasKinds(Protocol):
    """An architecture: how many blocks there are, and of what kind each is."""

    @property
    def layers(self) -> int: ...

    def layer_kind(self, layer: int) -> Hashable: ...


class HasKeys(Protocol):
    """A method, which treats blocks of equal keys alike."""

    def layer_key(self, layer: int) -> Hashable: ...


Run = tuple[int, int, int]


def runs_of_layers(
    architecture: HasKinds, method: HasKeys, blocks: range | None = None, *, ends_apart: bool = False,
    alone: frozenset[int] = frozenset(),
) -> list[Run]:  # fmt: skip
    """Layers that come again alike, in their order: (first layer, layers of a pattern, times that it comes in a row).

    The first block stands alone in any case: what all blocks share (its input, masks, rotary tables) is allocated
    before it and mostly dies with its backward.

    Args:
        blocks: those of a stage of a pipeline; None: all. So does the last block of one that is not the last: the
            gradient of its output comes from elsewhere.
        alone: blocks that are like no other.
        ends_apart: whether either end of a run is a run of its own, as hooks see what lies beyond.
    """
    blocks = range(architecture.layers) if blocks is None else blocks
    apart = blocks.stop < architecture.layers and len(blocks) > 1
    keys: list[Hashable] = [(architecture.layer_kind(i), method.layer_key(i)) for i in range(blocks.stop - apart)]
    for i in alone:
        keys[i] = i
    found = [(blocks.start, 1, 1)]
    first = blocks.start + 1
    while first < len(keys):
        period, times = next(
            ((p, n) for p in range(1, LONGEST_PATTERN + 1) if (n := times_in_a_row(keys, first, p)) > 1), (1, 1)
        )
        found.append((first, period, times))
        first += period * times
    found += [(first, 1, 1)] * apart
    return [part for run in found for part in _cut(*run)] if ends_apart else found


def _cut(first: int, period: int, times: int) -> list[Run]:
    bounds = sorted({0, 1, times - 1, times} if times > 1 else {0, 1})
    return [(first + period * start, period, end - start) for start, end in pairwise(bounds)]


def times_in_a_row(keys: Sequence[Hashable], first: int, period: int) -> int:
    """How often the pattern of `period` keys from `first` on comes in a row."""
    pattern, times = keys[first : first + period], 1
    while keys[first + times * period : first + (times + 1) * period] == pattern:
        times += 1
    return times


def given_to_block(x: Any) -> Any:
    """What all blocks share as one of them gets it: a float as FSDP2 casts it (`Tape.input_dtype`)."""
    dtype = tape().input_dtype
    return cast(x, dtype) if dtype is not None and isinstance(x, Tensor) and x.is_floating else x
