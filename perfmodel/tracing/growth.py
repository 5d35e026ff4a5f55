"""A whole model's calls from traces of the model with few of its blocks.

Blocks of one kind (see `stacks`) run the same program, so a model with more of them makes more of the same calls: its
counts are linear in the number of blocks of each kind. The smallest model keeps the first block of every kind; one more
block of a kind shows what it adds; and a model with two more of every kind, the second being the last that there is,
must make, call for call, what the others say (that block has never run before, so work that a block does only once
shows too). Where it does not, or where little would be saved, the whole model is traced.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from ..program.marks import BEFORE, IN, is_mark
from ..program.polynomials import NoPolynomial, highest
from ..recording.program import LiveBytes, Numbers
from .calls import Calls, Key, Place
from .programs.stacks import Stack

Record = Callable[[bool], Calls]  # of whether the program ran before
Kept = dict[str, list[int]]  # blocks by the path of their stack


@dataclass(frozen=True)
class Term:
    """`times` the calls of `counts`, with their host work.

    Attributes:
        order: the calls as they ran; None if that is not known.
        behind: by micro-batch and phase, how many calls of the first term run before these.
        blocks: which blocks of each stack make them.
        passing: live bytes at the marks among them (`Calls.passing`), by micro-batch and phase.
    """

    times: int
    counts: Counter[Key]
    host: Counter[Any]
    order: Sequence[Key] | None = None
    behind: Mapping[Place, int] = field(default_factory=dict)
    blocks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    passing: Mapping[Place, Sequence[tuple[Any, Any, int | None]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Whole:
    """The calls of a whole model.

    Attributes:
        terms: the smallest traced model, and what the further blocks of each kind add.
        calls: a call of each key.
        live: most bytes that are live above weights and buffers.
        traced, blocks: of how many blocks the largest trace was made, and how many the model has.
    """

    terms: list[Term]
    calls: Calls
    live: LiveBytes
    traced: int
    blocks: int

    @property
    def extrapolated(self) -> bool:
        """Whether not all blocks were traced."""
        return self.traced < self.blocks


class NotLinear(Exception):
    """The traces of the cut models do not add up, or one of them does not run."""


def whole(stacks: Sequence[Stack], record: Record) -> Whole:
    """Trace a model as cheaply as is exact.

    Args:
        record: traces the model as it stands.
    """
    blocks = sum(len(stack) for stack in stacks)
    plan = _Plan(stacks)
    if plan.cost < blocks:
        try:
            return _grown(plan, record, blocks)
        except NotLinear:
            pass
    calls = record(False)
    every = {stack_name(stack): tuple(range(len(stack))) for stack in stacks}
    term = Term(1, calls.counts, calls.host, calls.order, blocks=every, passing=_passing(calls))
    return Whole([term], calls, LiveBytes(_highest(calls)), blocks, blocks)


class _Plan:
    """Which blocks each of the traces keeps."""

    def __init__(self, stacks: Sequence[Stack]) -> None:
        self.stacks = stacks
        self.of_kind: dict[Hashable, list[tuple[str, int]]] = {}
        for stack in stacks:
            for i, kind in enumerate(stack.kinds):
                self.of_kind.setdefault((stack.path, len(stack), kind), []).append((stack_name(stack), i))
        self.base = {places[0] for places in self.of_kind.values()}
        # blocks that the smallest model lacks, by kind
        self.spare = {kind: places[1:] for kind, places in self.of_kind.items() if len(places) > 1}

    @property
    def check(self) -> set[tuple[str, int]]:
        """The blocks of the trace that the others must predict."""
        return self.base | {place for places in self.spare.values() for place in (places[0], places[-1])}

    @property
    def cost(self) -> int:
        """Blocks that all traces run together."""
        more = len(self.spare)
        return len(self.base) * (1 + more) + more + len(self.check)


def stack_name(stack: Stack) -> str:
    """What tells a stack from others."""
    return f"{stack.path}[{len(stack)}]"


def _grown(plan: _Plan, record: Record, blocks: int) -> Whole:
    base = _traced(plan, plan.base, record, warm=False)
    first = Term(1, base.counts, base.host, base.order, blocks=_by_stack(plan.base), passing=_passing(base))
    terms, traces = [first], [base]
    expected, expected_host = Counter(base.counts), Counter(base.host)
    ops = Calls(ops=dict(base.ops), turns=dict(base.turns))
    for places in plan.spare.values():
        more = _traced(plan, plan.base | {places[0]}, record)
        ops.ops.update(more.ops)
        ops.turns.update(more.turns)
        adds, host = difference(more.counts, base.counts), difference(more.host, base.host)
        number = sum(name == places[0][0] for name, _ in plan.base)
        below = sum(place < places[0] for place in plan.base if place[0] == places[0][0])
        order, behind = _inserted(more.order, base.order, adds, below, number - below)
        lengths = Counter(key[:2] for key in order or ())
        passing = _passing(more, {place: (start, start + lengths[place]) for place, start in behind.items()})
        terms.append(Term(len(places), adds, host, order, behind, _by_stack(places), passing))
        traces.append(more)
        for total, part in ((expected, adds), (expected_host, host)):
            _add(total, part, min(2, len(places)))
    check = _traced(plan, plan.check, record)
    if difference(check.counts, expected) or difference(check.host, expected_host):
        raise NotLinear
    return Whole(_positive(terms), ops, _live(check, traces, terms), len(plan.check), blocks)


def _passing(
    calls: Calls, within: Mapping[Place, tuple[int, int]] | None = None
) -> dict[Place, list[tuple[Any, Any, int | None]]]:
    """Live bytes at the marks of a trace by micro-batch and phase; within some of its calls those, and at the next."""
    found: dict[Place, list[tuple[Any, Any, int | None]]] = {}
    numbers: Counter[Place] = Counter()
    passing, closed = iter(calls.passing), set[Place]()
    for key in calls.order:
        place: Place = key[:2]
        if is_mark(_called(key)) and (live := next(passing, None)) is not None:
            start, end = (within or {}).get(place, (0, len(calls.order)))
            if start <= numbers[place] and not (numbers[place] >= end and place in closed):
                found.setdefault(place, []).append(live)
                closed |= {place} if numbers[place] >= end else set()
        numbers[place] += 1
    return found


def _by_stack(places: Iterable[tuple[str, int]]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for name, i in sorted(places):
        found[name] = (*found.get(name, ()), i)
    return found


def _called(key: Key) -> str:
    """The name of a call; empty where it stands for a loop's turn."""
    return str(key[2][0]) if isinstance(key[2], tuple) else ""


def _inserted(
    more: Sequence[Key], base: Sequence[Key], adds: Counter[Key], below: int, above: int
) -> tuple[list[Key] | None, dict[Place, int]]:
    """The calls of a further block in their order, and behind how many others: in each phase they stand together.

    Args:
        below, above: how many blocks of its stack run before it and behind it.
    """
    found: list[Key] = []
    behind: dict[Place, int] = {}
    begins = {what: next((name for name in map(_called, adds) if is_mark(name, what)), "") for what in (IN, BEFORE)}
    for place in dict.fromkeys(key[:2] for key in more):
        all_of, others = ([key for key in keys if key[:2] == place] for keys in (more, base))
        length = len(all_of) - len(others)
        name, rank = (begins[IN], below) if place[1] == "forward" else (begins[BEFORE], above)
        marks = [i for i, key in enumerate(all_of) if name and _called(key) == name]
        start = marks[rank] if rank < len(marks) else 0
        if all_of[:start] + all_of[start + length :] != others:
            start = next((i for i, (a, b) in enumerate(zip(all_of, others, strict=False)) if a != b), len(others))
        found += all_of[start : start + length]
        behind[place] = start
    return found if Counter(found) == adds else None, behind


def _live(check: Calls, traces: list[Calls], terms: list[Term]) -> LiveBytes:
    least, *more = map(_highest, traces)
    return LiveBytes(_highest(check), least, tuple(more), tuple(term.times for term in terms[1:]))


def _highest(calls: Calls) -> tuple[Numbers, Numbers]:
    early, late = (tuple(highest([0, *half])) for half in calls.live)
    return early, late


def _traced(plan: _Plan, keep: set[tuple[str, int]], record: Record, *, warm: bool = True) -> Calls:
    with ExitStack() as cuts:
        for stack in plan.stacks:
            cuts.enter_context(stack.cut(sorted(i for name, i in keep if name == stack_name(stack))))
        try:
            return record(warm)
        except NoPolynomial:
            raise
        except Exception as error:  # a program of others; whether it runs with all of its blocks is seen next
            raise NotLinear from error


def _positive(terms: list[Term]) -> list[Term]:
    """Calls that further blocks save (a gradient that need not be filled with zeros) leave the first term.

    Raises:
        NotLinear: the whole model would make some call less than no times.
    """
    first = Counter(terms[0].counts)
    rest = []
    for term in terms[1:]:
        saved = Counter({key: n for key, n in term.counts.items() if n < 0})
        _add(first, saved, term.times)
        counts = Counter({k: n for k, n in term.counts.items() if n > 0})
        rest.append(replace(term, counts=counts))
    if min(first.values(), default=0) < 0:
        raise NotLinear
    order = terms[0].order if first == terms[0].counts else None
    return [replace(terms[0], counts=first, order=order), *rest]


def _add(total: Counter[Any], part: Counter[Any], times: int) -> None:
    for key, n in part.items():
        total[key] += n * times


def difference(a: Counter[Any], b: Counter[Any]) -> Counter[Any]:
    """a - b, negative counts kept, zeros left out."""
    found = Counter({key: n - b.get(key, 0) for key, n in a.items()})
    found.update({key: -n for key, n in b.items() if key not in a})
    return Counter({key: n for key, n in found.items() if n})
