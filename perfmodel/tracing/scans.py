"""Programs that go over a sample token by token: what they do at any length, from traces of a few short samples.

Such a loop makes the same calls turn by turn, but for a few turns at its ends. So the calls of a trace are folded into
stretches of equal turns. Short samples of several lengths must fold alike; how often a stretch turns, every dim, and
what is live then follow as polynomials in the length, and are checked at one more length, call by call.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from itertools import count, groupby, islice
from typing import Any, NamedTuple

from ..program.op import Op, Spec
from ..program.polynomials import NoPolynomial, Size, solver, value
from ..recording.program import Evaluated
from .calls import Calls, Key, key_of
from .sizes import LIVE, solved_call

SHORTEST = 5  # tokens of the samples that are solved: more than their convolutions reach
LONGEST = 32  # tokens of a sample that is traced as it is
LEAST = SHORTEST - 2  # turns of a stretch: its ends, the first and the last token, may have others
LONGEST_TURN = 96  # calls
LISTS = ("cat", "stack")  # calls that take a tensor for each token; of others equal specs are several operands
NOTE = "its loop over tokens is that of a few short samples, one of them to check, in more turns"


class Stretch(NamedTuple):
    """The calls of a turn, and how often they are made one after another."""

    keys: tuple[Key, ...]
    times: Any


@dataclass(eq=False, frozen=True)
class Turn:
    """Calls that a loop makes again and again, as one call of its own among the others (`Calls.turns`)."""

    keys: tuple[Key, ...]


@dataclass
class Scans:
    """Programs at one size, each solved from its short samples; equal turns of all of them are one.

    The first of them is checked; those of a model with further blocks are by the trace that they must predict
    (`growth`).

    Attributes:
        others: numbers of tokens to keep away from: sizes of the model, which would make dims alike that are not.
    """

    size: Size
    others: Collection[int] = ()
    checked: bool = False
    turns: dict[tuple[Key, ...], Turn] = field(default_factory=dict)

    def solved(self, trace: Callable[[Size], Calls]) -> Calls:
        """The program at the size, `trace` giving it at others.

        Raises:
            NoPolynomial: it does not follow from short samples.
        """
        batch, seq = self.size
        *few, further = islice((n for n in count(SHORTEST) if n not in self.others), 4)
        short = [_compact(trace((batch, length))) for length in few]
        solve = solver((batch,), few)
        stretches = [list(stretches_of(calls.order)) for calls in short]
        rows = _alike(stretches)
        live = [_live(calls, found) for calls, found in zip(short, stretches, strict=True)]
        program = _Solved(
            [_solved_stretch(row, short, solve) for row in rows],
            [(half, solve(numbers, whole=False)) for half, numbers in _rows(live)],
            {what: solve(tuple(calls.host[what] for calls in short)) for what in short[-1].host},
        )
        if not self.checked:
            _check(self._at(program, (batch, further)), _compact(trace((batch, further))))
            self.checked = True
        return self._at(program, (batch, seq))

    def _at(self, program: "_Solved", size: Size) -> Calls:
        made, at = Calls(), Evaluated(*size)
        for ops, times in program.stretches:
            found = [(key_of(place, op), op) for place, op in [(place, at.op(op)) for place, op in ops]]
            n = int(value(times, *size))
            if times == 1:
                made.add(*found[0])
                continue
            keys = tuple(key for key, _ in found)
            turn = (*keys[0][:2], self.turns.setdefault(keys, Turn(keys)))
            made.turns[turn] = tuple(op for _, op in found)
            made.order += [turn] * n
            made.counts[turn] += n
        for half, number in program.live:
            made.live[half].append(int(value(number, *size)))
        made.host.update({what: int(value(number, *size)) for what, number in program.host.items()})
        return made


class _Solved(NamedTuple):
    """Stretches as ops with their places and the number of turns, live bytes with their half, and host work."""

    stretches: list[tuple[list[tuple[Any, Op]], Any]]
    live: list[tuple[int, Any]]
    host: dict[Any, Any]


def stretches_of(order: Sequence[Key]) -> Iterator[Stretch]:
    """Calls as stretches of equal turns; what does not repeat is a stretch of one call.

    >>> [(len(s.keys), s.times) for s in stretches_of(["a", *"xyxyxyxyxy", "b"])]
    [(1, 1), (2, 5), (1, 1)]
    """
    numbers: dict[Key, int] = {}
    ids = [numbers.setdefault(key, len(numbers)) for key in order]
    at = 0
    while at < len(ids):
        period, times = next(
            ((p, n) for p in range(1, LONGEST_TURN) if (n := _turns(ids, at, p)) >= LEAST), (1, 1)
        )  # fmt: skip
        yield Stretch(tuple(order[at : at + period]), times)
        at += period * times


def _turns(ids: list[int], at: int, period: int) -> int:
    """How often the calls from a place on follow themselves."""
    turn, n = ids[at : at + period], 1
    while ids[at + n * period : at + (n + 1) * period] == turn:
        n += 1
    return n


def _compact(calls: Calls) -> Calls:
    """The calls with one spec for each run of equal ones: a list has as many tensors as the sample has tokens."""
    made = copy(calls)
    known: dict[Key, tuple[Key, Op]] = {}
    made.counts, made.ops, made.order = Counter(), {}, []
    for key in calls.order:
        if key not in known:
            op = copy(calls.ops[key])
            if op.name in LISTS and len(op.inputs) >= LEAST:
                op.inputs = _merged(op.inputs)
            known[key] = key_of(key[:2], op), op
        made.add(*known[key])
    return made


def _merged(specs: Sequence[Spec]) -> tuple[Spec, ...]:
    return tuple(spec._replace(copies=sum(s.copies for s in alike)) for spec, alike in groupby(specs))


def _alike(stretches: list[list[Stretch]]) -> list[tuple[Stretch, ...]]:
    """The stretches of all lengths side by side."""
    if len({tuple(len(s.keys) for s in found) for found in stretches}) > 1:
        raise NoPolynomial("a short sample makes other calls in a turn")
    return list(zip(*stretches, strict=True))


def _solved_stretch(row: tuple[Stretch, ...], traces: list[Calls], solve: Any) -> tuple[list[tuple[Any, Op]], Any]:
    ops = []
    for keys in zip(*(stretch.keys for stretch in row), strict=True):
        _, op = solved_call(keys, [trace.ops[key] for trace, key in zip(traces, keys, strict=True)], solve)
        ops.append((keys[0][:2], op))
    return ops, solve(tuple(stretch.times for stretch in row))


def _live(calls: Calls, stretches: list[Stretch]) -> list[tuple[int, int]]:
    """The half and the live bytes of each call, of a stretch in its first and its last turn: the others lie between."""
    after = _by_call(calls)
    found, at = [], 0
    for keys, times in stretches:
        n = sum(not _is_view(key) for key in keys)
        found += after[at : at + n]
        if times > 1:
            found += after[at + (times - 1) * n : at + times * n]
        at += times * n
    return found


def _by_call(calls: Calls) -> list[tuple[int, int]]:
    """`Calls.live` in the order of the calls that are no views."""
    places = [key[:2] for key in calls.order if not _is_view(key)]
    halves = tuple(map(iter, calls.live))
    found = []
    for _, micro in groupby(places, key=lambda place: place[0]):
        phases = [phase for _, phase in micro]
        middle = (phases.count("forward") + len(phases)) // 2
        found += [(int(i >= middle), next(halves[i >= middle])) for i in range(len(phases))]
    return found


def _is_view(key: Key) -> bool:
    return bool(key[2][4])


def _rows(live: list[list[tuple[int, int]]]) -> Iterator[tuple[int, tuple[int, ...]]]:
    """The numbers of all lengths side by side, each with the half of the longest."""
    for row in zip(*live, strict=True):
        yield row[-1][0], tuple(nbytes for _, nbytes in row)


def _check(made: Calls, real: Calls) -> None:
    """Raise `NoPolynomial` unless solved calls are those of a trace, turn by turn."""
    order = [key for one in made.order for key in (one[2].keys if one in made.turns else (one,))]
    if order != real.order or made.host != real.host:
        raise NoPolynomial("a sample does not follow from shorter ones")
    known, seen = (max(map(max, filter(None, calls.live)), default=0) for calls in (made, real))
    if abs(known - seen) > LIVE * max(1, seen):  # of both halves: the middle may lie within a loop
        raise NoPolynomial("live bytes do not follow from shorter samples")
