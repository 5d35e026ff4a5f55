"""A traced program's calls as parts: of each micro-batch forward, and backward."""

from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise

from ..calls import costs
from ..program.marks import BLOCKS, END, is_mark, marking, with_live
from ..program.op import Op, Spec
from ..program.part import Part
from ..program.polynomials import Size
from ..recording.program import Program
from ..tape.tensor import Parameter
from .calls import Calls, Key, Place
from .growth import Term, Whole

Paths = Mapping[str, Sequence[str]]  # of the lists of blocks that run side by side, by their stack


def program_of(
    made: Whole, parameters: list[Parameter], buffers: tuple[Spec, ...], paths: Paths, micro_batches: int,
    size: Size | None,
) -> Program:  # fmt: skip
    """The traced calls as parts: of each micro-batch forward, and backward."""
    first, *later = (
        tuple(part for phase in ("forward", "backward") for part in _in_order(made, paths, (micro, phase)))
        for micro in range(micro_batches)
    )
    return Program(
        first=first, later=later[0] if later else (), parameters=tuple(parameters), live=made.live,
        buffers=buffers, traced=made.traced, blocks=made.blocks, at=size,
    )  # fmt: skip


def _in_order(made: Whole, paths: Paths, place: Place) -> list[Part]:
    """The parts of one phase as they run: further blocks among the calls of the first term, if that is known."""
    first, *blocks = made.terms
    if first.order is None or any(term.order is None for term in blocks):
        terms = made.terms if place[1] == "forward" else made.terms[::-1]
        return [part for term in terms for part in _parts(term, made.calls, place)]
    cuts = sorted({term.behind.get(place, 0) for term in blocks})
    found: list[Part] = []
    for cut, piece in zip([*cuts, None], _pieces(first, made.calls, place, cuts), strict=True):
        found += piece
        for term in blocks:
            if term.behind.get(place, 0) == cut:
                parts = _parts(term, made.calls, place)
                parts[0].ops[:0] = _said(term, paths)
                found += parts
                if passing := term.passing.get(place):  # what dies between two blocks
                    live = passing[-1][0]
                    parts[-1].ops.append(with_live(marking(END), live, live))
    found[0].ops[:0] = _said(first, paths)
    return found


def _said(term: Term, paths: Paths) -> list[Op]:
    """Marks that say which blocks the calls of a term are of."""
    numbers = ((paths[name], ",".join(map(str, those))) for name, those in term.blocks.items())
    return [marking(BLOCKS, f"{','.join(f'{path}.*' for path in lists)} {those}") for lists, those in numbers]


def spread(ops: list[Op]) -> list[Op]:
    """Calls whose order is not known, with those for which the host waits at even distances among the others."""
    waits = [op for op in ops if costs.synchronises(op)]
    others = [op for op in ops if not costs.synchronises(op)]
    found: list[Op] = []
    for i, op in enumerate(waits):
        found += [*others[i * len(others) // len(waits) : (i + 1) * len(others) // len(waits)], op]
    return found or others


def _parts(term: Term, calls: Calls, place: Place) -> list[Part]:
    """The ops of one phase of a term, as a part that repeats; what turns in a loop is a part of its own."""
    if term.order is not None:
        return _pieces(term, calls, place, ())[0]
    counted = [(key, n) for key, n in term.counts.items() if key[:2] == place]
    ops = spread([op for key, n in counted if key not in calls.turns for op in [calls.ops[key]] * n])
    straight = Part("traced", place[1], term.times, ops)
    turning = [_turning(calls, key, n * term.times) for key, n in counted if key in calls.turns]
    _share(term, place, [straight], turning)
    return [straight, *turning]


def _pieces(term: Term, calls: Calls, place: Place, cuts: Sequence[int]) -> list[list[Part]]:
    """The same, in pieces: up to each of `cuts`, as many calls of the phase, and what is left."""
    assert term.order is not None
    keys = [key for key in term.order if key[:2] == place]
    passing = iter(term.passing.get(place, ()))
    pieces: list[list[Part]] = []
    straight: list[Part] = []
    turning: list[Part] = []
    for start, end in pairwise([0, *cuts, len(keys)]):
        piece = [Part("traced", place[1], term.times)]
        for key, alike in groupby(keys[start:end]):
            n = len(list(alike))
            if key in calls.turns:
                turning.append(_turning(calls, key, n * term.times))
                piece += [turning[-1], Part("traced", place[1], term.times)]
            elif is_mark(calls.ops[key].name):
                piece[-1].ops += [with_live(calls.ops[key], *next(passing, (0, 0, None))) for _ in range(n)]
            else:
                piece[-1].ops += [calls.ops[key]] * n
        straight += piece[::2]
        pieces.append(piece)
    _share(term, place, straight, turning)
    return [[part for part in piece if part.ops or part is straight[0]] for piece in pieces]


def _turning(calls: Calls, key: Key, times: int) -> Part:
    return Part("traced", key[1], times, list(calls.turns[key]))


def _share(term: Term, place: Place, straight: list[Part], turning: list[Part]) -> None:
    """Give parts their shares of a term's host work, by their calls; of modules and adapters loops' turns have none."""
    outside = sum(map(_calls_in, straight))
    calls = outside * term.times + sum(len(part.ops) * part.repeat for part in turning)
    for (where, what), n in term.host.items():
        if where != place:
            continue
        if what in ("nodes", "hooks"):
            for part in turning:
                each = n * term.times * len(part.ops) // max(1, calls)
                setattr(part.host, what, each)
                n -= each * part.repeat // term.times
        done = given = 0
        for part in straight:
            done += _calls_in(part)
            until = n * done // outside if outside else n
            setattr(part.host, what, until - given)
            given = until


def _calls_in(part: Part) -> int:
    return sum(not is_mark(op.name) for op in part.ops)
