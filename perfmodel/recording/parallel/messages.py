"""Messages that gradients make as they come: where each of them goes among the ops of a backward pass."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ...program.dims import Dim, larger
from ...program.op import Op
from ...program.part import Part
from ...tape.tensor import Parameter

M = TypeVar("M", bound=Hashable)
L = TypeVar("L")


class ReadyGradient(NamedTuple):
    """A gradient that is complete: in which part, behind how many of its ops what it sets off would go, and how many
    bytes are live there beyond the part's start.
    """

    part: Part
    ops: int
    parameter: Parameter
    live: Dim = 0


class LayerGradient(NamedTuple):
    """A gradient in the order in which all come; `layer` counts a parameter's layers from the lowest."""

    parameter: Parameter
    layer: int


def gradients_in_order(parts: Sequence[Part], ready: Sequence[ReadyGradient]) -> list[LayerGradient]:
    """All gradients of a backward pass, layer by layer: in a part that repeats the highest layer comes first."""
    by_part = _by_part(ready)
    return [
        LayerGradient(r.parameter, part.repeat - 1 - k)
        for part in parts
        for k in range(part.repeat)
        for r in by_part.get(part, ())
    ]


def interleaved(
    parts: Sequence[Part], ready: Sequence[ReadyGradient], sent: Mapping[int, Sequence[M]],
    ops_of: Callable[[M], Sequence[Op]],
    room_of: Callable[[M], Dim] = lambda message: 0, left_of: Callable[[M], Dim] = lambda message: 0,
) -> Iterator[Part]:  # fmt: skip
    """Parts with the messages that go out at each gradient, by its number among all that come.

    A part that repeats becomes as many parts as there are runs of layers in a row that send the same.

    Args:
        room_of: bytes that a message takes while its ops run.
        left_of: bytes that stay behind it.
    """
    by_part, done = _by_part(ready), 0
    for part in parts:
        of_part, layouts = by_part.get(part, []), []
        for _ in range(part.repeat):
            layouts.append(tuple((r.ops, r.live, m) for i, r in enumerate(of_part, done) for m in sent.get(i, ())))
            done += len(of_part)
        for layout, times in _in_a_row(layouts):
            ops, highest, left = list(part.ops), part.peak, 0
            for _, live, message in layout:
                highest = larger(highest, live + left + room_of(message))
                left = left + left_of(message)
            for place, _, message in reversed(layout):
                ops[place:place] = ops_of(message)
            yield replace(part, repeat=times, ops=ops, delta=part.delta + left, highest=highest)


def _in_a_row(layouts: Sequence[L]) -> Iterator[tuple[L, int]]:
    """Layouts that are alike in a row, once each, with how many there are."""
    start = 0
    for i in range(1, len(layouts) + 1):
        if i == len(layouts) or not _alike(layouts[start], layouts[i]):
            yield layouts[start], i - start
            start = i


def _alike(a: Any, b: Any) -> bool:
    """Whether two things are equal, their arrays over a grid element by element."""
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_alike, a, b))
    return a is b or bool(np.all(np.equal(a, b)) if isinstance(a, np.ndarray) or isinstance(b, np.ndarray) else a == b)


def _by_part(ready: Sequence[ReadyGradient]) -> dict[Part, list[ReadyGradient]]:
    return {part: list(those) for part, those in groupby(ready, key=lambda r: r.part)}
