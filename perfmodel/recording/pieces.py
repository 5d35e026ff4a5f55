"""A recorded program cut at its marks: pieces of calls, forward and backward, as modules and blocks make them."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise

from ..errors import UserError
from ..program.dims import Dim
from ..program.marks import BEFORE, BEHIND, BLOCKS, IN, OUT, OUTPUTS, is_mark, read_mark, with_live
from ..program.op import Op, Spec
from ..program.part import HostWork, Part

_BLOCK = re.compile(r"\.(\*|\d+)\.$")
Lists = tuple[str, ...]  # of blocks that run side by side: their paths, with a star behind


@dataclass(eq=False)
class Piece:
    """Calls between two marks.

    Attributes:
        path: of the module that makes them, a star for a block's number; empty beside the modules that are marked.
        number: of a block.
        forward, backward: its calls, and marks among them, which tell how live bytes have risen since the last one.
        gives, receives: whether its output has a gradient, and its input.
        outputs: what the model gives behind it; None where its call goes on, or has ended before.
        works: what the host does besides, by phase.
    """

    path: str = ""
    number: int | None = None
    forward: list[Op] = field(default_factory=list)
    backward: list[Op] = field(default_factory=list)
    gives: bool = False
    receives: bool = False
    outputs: tuple[Spec, ...] | None = None
    works: dict[str, HostWork] = field(default_factory=dict)

    @property
    def trains(self) -> bool:
        """Whether it has a backward pass."""
        return any(not is_mark(op.name) for op in self.backward)

    @property
    def block(self) -> bool:
        """Whether it is a block's."""
        return bool(_BLOCK.search(self.path))

    @property
    def row(self) -> str:
        """The list that its block is in; empty where it stands for itself."""
        return self.path.removesuffix(".") if self.path.endswith(".*.") else ""

    @property
    def name(self) -> str:
        """Its path with the block's number."""
        return self.path.replace("*", str(self.number)) if self.row else self.path


@dataclass(eq=False)
class Series:
    """Pieces one after another, of the model once or of so many identical blocks.

    Attributes:
        numbers: of the blocks, by the lists that they are in.
    """

    repeat: int
    numbers: dict[Lists, list[int]]
    pieces: list[Piece]

    def ends_apart(self) -> Iterator["Series"]:
        """This one with either end of a run of blocks as a run of its own, as hooks see what lies beyond."""
        if self.repeat == 1:
            yield self
            return
        for start, end in pairwise(sorted({0, 1, self.repeat - 1, self.repeat})):
            numbers = {lists: those[start:end] for lists, those in self.numbers.items()}
            first = {lists[0]: those[0] for lists, those in numbers.items()}
            yield Series(end - start, numbers, [replace(s, number=first.get(s.row)) for s in self.pieces])


def series_of(parts: Sequence[Part], name: str) -> tuple[list[Series], Dim]:
    """The series of a micro-batch in the order of its forward pass, and the bytes that its graph holds at the end.

    Raises:
        UserError: the program is not a row of modules.
    """
    lists: dict[str, Lists] = {}
    live: list[Dim] = [0]
    try:
        found = [_forward(part, lists, live) for part in parts if part.phase == "forward"]
        _go_back(found, [part for part in parts if part.phase == "backward"], live)
    except (IndexError, LookupError, StopIteration, ValueError):
        raise UserError(
            f"gpus: several are not modelled by a trace of {name}: its program is no row of blocks, forward and "
            "backward; use --gpus 1"
        ) from None
    return [each for series in found for each in series.ends_apart()], live[0]


def _forward(part: Part, lists: dict[str, Lists], live: list[Dim]) -> Series:
    """A part cut at its marks.

    Args:
        lists: that blocks are in side by side, by the first.
        live: bytes that are live there, of the model once; of blocks that repeat the first mark tells.
    """
    said, ops = _said(part)
    if part.repeat > 1 and ops and not said:  # a loop within a block
        raise ValueError
    if part.repeat > 1:
        live = []  # the first mark tells
    lists |= {those[0]: those for those in said}
    current = Piece()
    found = [current]
    numbers: dict[Lists, list[int]] = {}
    for op in ops:
        mark = read_mark(op)
        if mark is not None:
            op = _risen(op, live)
        current.forward.append(op)
        if mark is None:
            continue
        if mark.what == IN and not current.path:
            current = Piece(mark.of)
            if current.row and part.repeat == 1:
                of_row = numbers.setdefault(lists[current.row], [])
                if mark.number is None or mark.number in of_row:  # it runs again
                    raise ValueError
                current.number = mark.number
                of_row.append(mark.number)
            found.append(current)
        elif mark.what == OUT and mark.of == current.path:
            current = Piece()
            found.append(current)
        elif mark.what == OUTPUTS:
            if current.path or any(s.outputs is not None for s in found):
                raise ValueError
            current.outputs = op.inputs
            current = Piece()
            found.append(current)
    _share(part.host, "forward", [(s, sum(not is_mark(op.name) for op in s.forward)) for s in found])
    return Series(part.repeat, said if part.repeat > 1 else numbers, found)


def _said(part: Part) -> tuple[dict[Lists, list[int]], list[Op]]:
    """Which blocks a part's calls are of, as its first marks say, and the rest."""
    found: dict[Lists, list[int]] = {}
    for i, op in enumerate(part.ops):
        mark = read_mark(op)
        if mark is None or mark.what != BLOCKS:
            return found, part.ops[i:]
        paths, _, those = mark.of.partition(" ")
        found[tuple(paths.split(","))] = [int(n) for n in those.split(",")]
    return found, []


def _risen(op: Op, live: list[Dim]) -> Op:
    """A mark with what live bytes have risen by since the one before, and by how much at the most."""
    now, most = op.bytes_read, op.bytes_written
    before = live[0] if live else None
    live[:] = [now]
    return with_live(op, 0, 0) if before is None else with_live(op, now - before, most - before)


def _go_back(series: list[Series], parts: Sequence[Part], live: list[Dim]) -> None:
    """Give pieces their calls of the backward pass."""
    once = [s for each in series if each.repeat == 1 for s in each.pieces]
    place = len(once) - 1
    for part in parts:
        said, ops = _said(part)
        if part.repeat == 1:
            place = _backward(ops, once, place, part.host, live)
        else:
            same = next(each for each in series if each.repeat == part.repeat and each.numbers == said)
            _backward(ops, same.pieces, len(same.pieces) - 1, part.host, [])


def _backward(ops: Sequence[Op], pieces: list[Piece], place: int, host: HostWork, live: list[Dim]) -> int:
    """Calls go to the piece whose backward pass runs, from a place on down; returns where that ended."""
    counted: dict[int, int] = {}
    for op in ops:
        mark = read_mark(op)
        if mark is not None:
            op = _risen(op, live)
        pieces[place].backward.append(op)
        counted[place] = counted.get(place, 0) + (mark is None)
        if mark is not None and mark.what == BEFORE:  # the model's own has no name
            place = next(
                i
                for i in range(place, -1, -1)
                if (pieces[i].path == mark.of if mark.of else pieces[i].outputs is not None)
            )
            pieces[place].gives = True
        elif mark is not None and mark.what == BEHIND:
            if pieces[place].path != mark.of:
                raise ValueError
            pieces[place].receives = True
            place -= 1
    _share(host, "backward", [(pieces[i], n) for i, n in counted.items()])
    return place


def _share(host: HostWork, phase: str, shares: Sequence[tuple[Piece, int]]) -> None:
    """What the host does besides calls, by calls."""
    total, done, given = sum(n for _, n in shares), 0, HostWork()
    for piece, n in shares:
        done += n
        work = piece.works.setdefault(phase, HostWork())
        for one in fields(HostWork):
            until = getattr(host, one.name) * done // max(1, total)
            setattr(work, one.name, getattr(work, one.name) + until - getattr(given, one.name))
            setattr(given, one.name, until)
