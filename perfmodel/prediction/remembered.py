"""Steps that are kept from one prediction to the next, so that only what changed is done again.

Another device prices a step that is known already: what it asks of any device (`StepWork`), its calls sorted into
tables. At other sizes a step's numbers are worked out anew: it is recorded once with formulas in the place of its batch
and length (`program.formulas`), which also say where another program begins; there it is recorded as ever.

What is kept is found by the values of all that decides it: model, method, setup, kind of card. It holds numbers, no
ops, and the least recently used goes.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from threading import Lock
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from ..architectures.base import Architecture
from ..devices import price
from ..devices.profile import DeviceProfile
from ..devices.tables import CallRows, Places, Priced
from ..errors import UserError
from ..methods.parts.base import Method
from ..program.dims import MixedStructure
from ..program.formulas import Formula, Formulas, NotTraceable
from ..program.op import Op
from ..recording import record
from ..recording.reuse import Shared, hashable, of_card
from ..recording.step import Step
from ..setup import Setup
from ..values import once
from . import part_costs
from .contention import Seconds
from .work import CallCost, StepWork

MOST_PROGRAMS = 64  # programs of which something is kept
MOST_SIZES = 8  # sizes of each whose step is kept: 0.1 MB, or 0.3 MB of a grid
MOST_POINTS = 64  # points of a grid whose step is kept: its numbers are arrays
MOST_FORMS = 4  # formulas for one of them, each for sizes at which it is the same
WAIT = 4  # sizes at which it is recorded as it is before formulas, which take eight times as long, are worth it
# of a step, that vary with its sizes
FIGURES = ("total", "trainable", "active", "counted", "memory", "choices", "paged_bytes")
SIZES = ("batch", "seq")  # of a setup; the size of a method is its rank
RANK = "r"
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LruCache(OrderedDict[K, V], Generic[K, V]):
    """The most recently used of what was put in; used by several threads."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.lock = Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process begins with an empty one."""
        return LruCache, (self.most,)

    def recall(self, key: K) -> V | None:
        """What is kept under a key, or None."""
        with self.lock:
            found = self.pop(key, None)
            if found is not None:
                self[key] = found
            return found

    def keep(self, key: K, value: V) -> None:
        """Put something in; what was used least recently may go."""
        with self.lock:
            self[key] = value
            self.move_to_end(key)
            while len(self) > self.most:
                self.popitem(last=False)


class BuildArguments(NamedTuple):
    """What a step is recorded of; arguments of `recording.record.build`."""

    architecture: Architecture
    method: Method
    setup: Setup
    kind: str
    capability: str

    def record(self) -> Step:
        """Record it; errors as of `build`."""
        return record.build(*self)

    @property
    def sizes(self) -> tuple[Any, ...]:
        """Batch, length and, of a method that has one, rank: a program's numbers are made of them."""
        rank = getattr(self.method, RANK, None)
        of_setup = tuple([getattr(self.setup, name) for name in SIZES])
        return of_setup if rank is None else (*of_setup, rank)

    def at(self, sizes: Sequence[Any]) -> "BuildArguments":
        """The same at other sizes."""
        of_setup: dict[str, Any] = dict(zip(SIZES, sizes, strict=False))
        asked = self._replace(setup=replace(self.setup, **of_setup))
        rank: dict[str, Any] = dict(zip((RANK,), sizes[len(SIZES) :], strict=False))
        return asked._replace(method=replace(self.method, **rank)) if rank else asked

    def with_symbols(self, formulas: Formulas) -> list[Any]:
        """Formulas in the place of sizes; a size of 1 stays what it is, and so do programs."""
        return [1 if size == 1 else symbol for size, symbol in zip(self.sizes, formulas.symbols(), strict=True)]

    @property
    def program(self) -> Any:
        """What decides its program, but for sizes above 1."""
        sizes = (*SIZES, RANK, "architecture")
        of_method, of_setup = (
            tuple([getattr(values, f.name) for f in fields(values) if f.name not in sizes])
            for values in (self.method, self.setup)
        )
        ones = tuple([type(size) is int and size == 1 for size in self.sizes])
        by_card = of_card(self.setup, self.kind, self.capability)
        return self.architecture, type(self.method), of_method, of_setup, ones, self.kind, by_card


class DeviceCalls(NamedTuple):
    """What a GPU is asked to price in a step all of whose ops run on the compute stream.

    Attributes:
        sheets, places: of its distinct ops (`price.sorted_into_tables`).
        order: of each op its place among them.
        bounds: where each part's ops lie among all.
    """

    sheets: list[Priced]
    places: Places
    order: np.ndarray
    bounds: list[slice]

    def durations(self, on: DeviceProfile) -> list[Seconds]:
        """The device seconds of every part's ops."""
        seconds = price.from_tables(self.sheets, self.places, on)[self.order]
        return [Seconds(part, part) for part in map(seconds.__getitem__, self.bounds)]


class KnownStep(NamedTuple):
    """A step that is known.

    Attributes:
        calls: what a GPU prices; None where that takes the step itself.
        step: the step, where it is at hand; else `make` records it.
    """

    work: StepWork
    calls: DeviceCalls | None
    step: Step | None
    make: Callable[[], Step] | None = None

    def durations(self, on: DeviceProfile) -> list[Seconds]:
        """The device seconds of every part's ops."""
        if self.calls is not None:
            return self.calls.durations(on)
        assert self.step is not None
        return part_costs.part_durations(self.step, on)


class StepOnDemand:
    """The step that a prediction is of, and the seconds of its ops; recorded when somebody looks at them.

    Attributes:
        method: as the step was recorded with it.
        durations: for each of its parts the device seconds of its ops.
    """

    def __init__(self, known: KnownStep, durations: list[Seconds]) -> None:
        self.method = known.work.method
        self.durations = durations
        self._known = known

    @once
    def step(self) -> Step:
        """The step, with its ops."""
        if self._known.step is not None:
            return self._known.step
        assert self._known.make is not None
        return self._known.make()


class Sorted(NamedTuple):
    """A step's work and its distinct ops in tables, in which formulas may stand for numbers."""

    work: StepWork
    sheets: list[CallRows]
    places: Places
    order: np.ndarray
    bounds: list[slice]

    @classmethod
    def of(cls, built: Step) -> "Sorted":
        """Look at a step; equal ops are looked at once, where no dim varies."""
        parts = [part for part, _ in built.parts()]
        ops = [op for part in parts for op in part.ops]
        distinct, index = _distinct(ops)
        costs = [CallCost.of(op) for op in distinct]
        bounds = []
        shared, start = Shared(), 0
        for part in parts:
            bounds.append(slice(start, start + len(part.ops)))
            shared.calls[part] = [costs[i] for i in index[bounds[-1]]]
            start = bounds[-1].stop
        work = StepWork.of(built, shared)
        return cls(work, *price.sorted_into_tables(distinct), np.array(index, dtype=np.intp), bounds)

    @property
    def calls(self) -> DeviceCalls:
        """What a GPU prices; all numbers are there."""
        sheets: list[Priced] = [(sheet.model, sheet.key, sheet.columns) for sheet in self.sheets]
        return DeviceCalls(sheets, self.places, self.order, self.bounds)


def _distinct(ops: list[Op]) -> tuple[list[Op], list[int]]:
    """Ops that call something different, and for each op its place among them."""
    first: dict[Any, tuple[int, Op]] = {}  # by what they call; views are all alike
    try:
        index = [first.setdefault(None if op.view else op.call, (len(first), op))[0] for op in ops]
    except TypeError:
        return ops, list(range(len(ops)))
    return [op for _, op in first.values()], index


class SymbolicStep:
    """A program recorded with formulas in the place of its sizes.

    Args:
        formulas: what is made of the sizes.
        built: the step, its numbers formulas.

    Raises:
        NotTraceable: it is not the same at other sizes.
    """

    def __init__(self, formulas: Formulas, built: Step) -> None:
        dims = {dim.number: dim for _, op, _ in built.ops() for dim in _dims(op)}
        # the tape takes a dim of 1 or 0 for what it is only where it is a number (`program.dims`)
        same = all(np.greater(dim, 1) for dim in dims.values())
        if not (same and _on_one_stream(built)) or any(_dims(op) for op in _periodic_ops(built)):
            raise NotTraceable("dims of 1, several streams, or periodic work that goes by sizes")
        found = Sorted.of(built)
        self.formulas = formulas
        self.found = found._replace(work=found.work.without_ops(), sheets=[])
        self.shapes = [(sheet.model, sheet.key, len(sheet.rows[0]), len(sheet.rows)) for sheet in found.sheets]
        cells = [x for sheet in found.sheets for column in zip(*sheet.rows, strict=True) for x in column]
        varies = [i for i, x in enumerate(cells) if type(x) is Formula]
        self.varies = np.array(varies, dtype=np.intp)
        self.numbers = [cells[i].number for i in varies]
        self.cells = np.array([0.0 if type(x) is Formula else x for x in cells], dtype=np.float64)
        self.figures = {name: getattr(found.work, name) for name in FIGURES}
        formulas.close([*self.numbers, *_numbers(list(self.figures.values()))])

    def at(self, asked: BuildArguments) -> KnownStep | None:
        """The step at the sizes that are asked for; None where it is another program."""
        values = self.formulas.at(asked.sizes)
        if values is None:
            return None
        cells = self.cells.copy()
        cells[self.varies] = [values[number] for number in self.numbers]
        sheets: list[Priced] = []
        start = 0
        for model, key, columns, rows in self.shapes:
            end = start + columns * rows
            sheets.append((model, key, tuple(cells[start:end].reshape(columns, rows))))
            start = end
        of = self.found.work
        own = asked._replace(method=of.method, setup=of.setup).at(asked.sizes)
        figures = {name: _settled(x, values) for name, x in self.figures.items()}
        work = replace(of, setup=own.setup, method=own.method, **figures)
        return KnownStep(work, DeviceCalls(sheets, *self.found[2:]), None, asked.record)


def _dims(op: Op) -> list[Formula]:
    """The formulas among the dims that an op sees."""
    return [dim for spec in (*op.inputs, *op.outputs) for dim in spec.shape if type(dim) is Formula]


def _periodic_ops(built: Step) -> Iterator[Op]:
    return (op for work in built.periodic for part in work.group.parts for op in part.ops)


def _numbers(value: Any) -> Iterator[int]:
    """The formulas in plain values, dicts, lists and dataclasses."""
    if type(value) is Formula:
        yield value.number
    elif isinstance(value, dict):
        yield from _numbers(list(value.values()))
    elif isinstance(value, list):
        for x in value:
            yield from _numbers(x)
    elif is_dataclass(value):
        yield from _numbers([getattr(value, f.name) for f in fields(value)])


def _settled(value: Any, values: list[Any]) -> Any:
    """The same with numbers in the place of formulas."""
    if type(value) is Formula:
        return values[value.number]
    if isinstance(value, dict):
        return {name: _settled(x, values) for name, x in value.items()}
    if isinstance(value, list):
        return [_settled(x, values) for x in value]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _settled(getattr(value, f.name), values) for f in fields(value)})
    return value


class KnownProgram:
    """What is known of a program: the steps of the sizes that were asked for last, and formulas for any size.

    Attributes:
        recorded: at how many sizes it was recorded as it is.
        tries: how often it was recorded with formulas.
    """

    def __init__(self) -> None:
        self.steps: LruCache[Any, KnownStep | MixedStructure] = LruCache(MOST_SIZES)
        self.formulated: tuple[SymbolicStep, ...] = ()
        self.recorded = self.tries = 0

    def at_other_sizes(self, asked: BuildArguments) -> KnownStep | None:
        """A step whose program was recorded with formulas, or is now; None where it has to be recorded as it is."""
        if any(isinstance(size, np.ndarray) for size in asked.sizes):
            return None
        for formulated in self.formulated:
            if (known := formulated.at(asked)) is not None:
                return known
        if self.recorded < WAIT * (1 + self.tries) or self.tries == MOST_FORMS:
            return None
        self.tries += 1
        formulas = Formulas(asked.sizes)
        try:
            formulated = SymbolicStep(formulas, asked.at(asked.with_symbols(formulas)).record())
        except (NotTraceable, UserError, TypeError, AttributeError, ValueError):
            self.tries = MOST_FORMS
            return None
        self.formulated += (formulated,)
        return formulated.at(asked)


class Steps:
    """Steps that predictions have asked for.

    Args:
        whole: keep steps themselves, too, also those that a GPU alone or one stream cannot price; for a search whose
            end is the end of them.
    """

    def __init__(self, *, whole: bool = False) -> None:
        self.whole = whole
        self.programs: LruCache[Any, KnownProgram] = LruCache(MOST_PROGRAMS)

    def find(self, asked: BuildArguments) -> KnownStep:
        """A step, recorded if it is not known; errors as of `BuildArguments.record`."""
        key = asked.program
        try:
            program = self.programs.recall(key)
        except TypeError:  # an array: a grid along something else than sizes
            return self._recorded(KnownProgram(), (), asked)
        if program is None:
            self.programs.keep(key, program := KnownProgram())
        sizes = tuple(map(hashable, asked.sizes))
        known = program.steps.recall(sizes)
        if isinstance(known, MixedStructure):
            raise MixedStructure(known.mask)
        if known is not None:
            return known
        known = None if self.whole else program.at_other_sizes(asked)
        if known is None:
            return self._recorded(program, sizes, asked)
        program.steps.keep(sizes, known)
        return known

    def _recorded(self, program: KnownProgram, sizes: Any, asked: BuildArguments) -> KnownStep:
        """A step that is recorded as it is."""
        program.recorded += 1
        try:
            built = asked.record()
        except MixedStructure as mixed:
            program.steps.keep(sizes, MixedStructure(mixed.mask))
            raise
        found = Sorted.of(built)
        known = KnownStep(found.work, found.calls if _on_one_stream(built) else None, built)
        if self.whole:
            program.steps.keep(sizes, known)
        elif known.calls is not None and max(map(np.size, asked.sizes)) <= MOST_POINTS:
            program.steps.keep(sizes, KnownStep(found.work.without_ops(), known.calls, None, asked.record))
        return known


def _on_one_stream(built: Step) -> bool:
    """Whether a GPU can price its calls one by one."""
    return built.device == "cuda" and all(part.runs is None for part, _ in built.parts())


REMEMBERED = Steps()
