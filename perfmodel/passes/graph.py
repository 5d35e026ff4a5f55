"""A micro-batch as a graph of values: runs of layers unrolled as far as they differ, writes in place undone.

A run of n identical layers becomes three copies, the first, the n - 2 in the middle and the last, so that what a
compiler does across the seam of two layers shows. The backward copies mirror them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..program.dims import Dim, decide
from ..program.dtypes import ITEMSIZE
from ..program.op import Op, Use
from ..program.part import Part
from ..tape.tensor import Flow
from .places import Key, Names, Place, places


class Value:
    """What one op makes and others read: `points` elements, `nbytes` bytes. Nobody makes inputs and parameters.

    `free` marks what is in memory anyway (parameters, buffers).
    """

    __slots__ = ("dtype", "free", "maker", "nbytes", "points")

    def __init__(self, dtype: str, points: Dim, maker: "Prim | None" = None, *, free: bool = False) -> None:
        self.dtype = dtype
        self.points = points
        self.nbytes = points * ITEMSIZE[dtype]
        self.maker = maker
        self.free = free


@dataclass(eq=False, slots=True)
class Prim:
    """One operation as Inductor sees it.

    Attributes:
        kind: "pointwise"; "rows" (sums along rows), "columns" (sums down columns); "scatter"; "extern" (an own kernel).
        reads: values with the bytes read of each.
        points, length: elements of the result, and elements summed for each (1 for pointwise).
        place: where it was recorded, an index of `Graph.places`.
        recomputable, fusible: what AOTAutograd's partitioner allows.
        op: the call itself, of an extern.
        at: behind how many ops of its part it was recorded.
        region: what is compiled with it: a region and a copy of its part; None where nothing is, it stays as it is.
        hook: what runs beside the model, of kind "hook".
    """

    name: str
    kind: str
    reads: list[tuple[Value, Dim]]
    points: Dim
    place: int
    backward: bool
    owner: str
    length: Dim = 1
    outs: list[Value] = field(default_factory=list)
    recompute: bool = False
    recomputable: bool = True
    fusible: bool = True
    op: Op | None = None
    at: int = 0
    region: tuple[int, int] | None = None
    hook: Part | None = None


@dataclass
class Graph:
    """The operations in order, and what must be there after them.

    Attributes:
        results: values that outlive the pass (loss, gradients, what modules keep).
        tail: accumulations into gradients that were there before: they run after the compiled backward.
        additions: the tail of further passes that do the same (`Tape.alike`).
        apart: whether regions are compiled one by one (`Flow.apart`).
    """

    places: list[Place]
    prims: list[Prim] = field(default_factory=list)
    results: set[Value] = field(default_factory=set)
    tail: list[Prim] = field(default_factory=list)
    additions: list[Prim] = field(default_factory=list)
    apart: bool = False

    @property
    def outside(self) -> set[Value]:
        """Values that must be there after the compiled programs."""
        return self.results | {value for prim in self.tail for value, _ in prim.reads}

    def copies(self, value: Value) -> int:
        """How many layers make the like of a value."""
        return 1 if value.maker is None else self.places[value.maker.place].repeat

    def later(self) -> "Graph":
        """A further pass: its gradients are added to those that are there, and gone after it."""
        added = {value for prim in self.additions for value, _ in prim.reads}
        return Graph(self.places, self.prims, self.results - added, self.additions, apart=self.apart)


class Builder:
    """Takes ops one by one, gives the graph; the meaning of each op is `lower`'s (`passes.lowering`)."""

    def __init__(self, parts: list[Part], flow: Flow, parameters: dict[int, Part | None]) -> None:
        self.graph = Graph(places(parts, flow), apart=flow.apart)
        self.names = Names(parts, flow, parameters)
        self.parameters = parameters
        self.flow = flow
        self.outlive: set[Value] = set()
        self.values: dict[Key, Value] = {}
        self.known: dict[Any, list[Value]] = {}
        self.walks: dict[Op, int] = {}
        self.numbers: dict[Any, int] = {}
        self.index, self.backward = 0, False
        self.keys: dict[int, Key] = {}  # of the blocks that the current place's ops use
        self.op = Op("", (), (), 0, 0)
        self.at = 0  # behind how many ops of its part it is

    @property
    def place(self) -> Place:
        """Where the current op runs."""
        return self.graph.places[self.index]

    def ops(self) -> Iterator[Op]:
        """Every op of every copy."""
        for index, place in enumerate(self.graph.places):
            self.index, self.keys, self.backward = index, {}, place.backward
            hooks = iter(self.flow.hooks.get(place.part, ()))
            following = next(hooks, None)
            for self.at, op in enumerate(place.part.ops):
                while following is not None and following[0] <= self.at:
                    self._beside(following[1])
                    following = next(hooks, None)
                if not op.view:
                    self.op = op
                    yield op
            self.at = len(place.part.ops)
            while following is not None:
                self._beside(following[1])
                following = next(hooks, None)

    @property
    def region(self) -> tuple[int, int] | None:
        """What the current op is compiled with, where regions are compiled one by one."""
        region = self.flow.regions.get(self.op)
        return None if region is None else (region, 0 if self.flow.cuts is not None else self.place.copy)

    def _beside(self, hook: Part) -> None:
        """A hook, which reads gradients of the model."""
        used = {self.key(use.storage): use for op in hook.ops for use in op.reads}
        reads = [(value, value.nbytes) for key in used if (value := self.values.get(key)) is not None and value.maker]
        prim = Prim("hook", "hook", reads, 0, self.index, self.backward, "base", at=self.at, hook=hook)
        prim.recomputable = prim.fusible = False
        self.graph.prims.append(prim)

    def key(self, storage: int) -> Key:
        """The name of a block of memory that the current op uses."""
        if storage not in self.keys:
            self.keys[storage] = self.names.key(storage, self.place)
        return self.keys[storage]

    def reads(self) -> list[tuple[Value, Dim]]:
        """What the current op reads: each tensor once, and of a block no more than it holds."""
        found = []
        for use, spec in zip(self.op.reads, self.op.inputs, strict=True):
            key, nbytes = self.key(use.storage), use.nbytes
            value = self.values.get(key)
            if value is None:
                value = self.values[key] = Value(spec.dtype, nbytes // ITEMSIZE[spec.dtype], free=True)
            found.append((value, _least(nbytes, value.nbytes)))
        return found

    def write(self, use: Use, value: Value) -> None:
        """A block of memory has new contents from here on; equal ones of two blocks that outlive the pass stay two."""
        key = self.key(use.storage)
        if use.storage in self.flow.live and self.values.get(key) is not value:
            if value in self.outlive:
                value = self._again(value)
            self.outlive.add(value)
        self.values[key] = value

    def _again(self, value: Value) -> Value:
        maker = value.maker
        if maker is None or len(maker.outs) > 1:
            return value
        prim = replace(maker, place=self.index, owner=self.op.owner, outs=[])
        prim.outs.append(Value(value.dtype, value.points, prim))
        self.graph.prims.append(prim)
        return prim.outs[0]

    def layouts(self) -> int:
        """A number that tells slices and permutations of one block apart: of how the current op walks over memory.

        The op of a run of layers comes once for every copy.
        """
        number = self.walks.get(self.op)
        if number is None:
            op = self.op
            walk = (op.attrs, op.recompute, *[use[2:] for use in (*op.reads, *op.writes)])  # shapes and strides
            number = self.walks[op] = self.numbers.setdefault(_frozen(walk), len(self.numbers))
        return number

    def existed(self, use: Use) -> bool:
        """Whether a block of memory was there before the pass and is none of its parameters."""
        return use.storage not in self.names.origin or self.key(use.storage) not in self.values

    def add(
        self,
        name: str,
        kind: str,
        reads: list[tuple[Value, Dim]],
        points: Dim,
        dtype: str,
        *,
        layouts: Any = (),
        holds: Dim | None = None,
        **more: Any,
    ) -> Value:
        """Append an operation with one result; an equal one that is there already stands for it.

        Args:
            layouts: what else must be equal; None if nothing is.
            holds: elements of the result, if not `points`.
        """
        known: list[Value] = []
        if layouts is not None:
            same_reads = tuple([(id(value), nbytes) for value, nbytes in reads])
            known = _entry(self.known, (name, kind, dtype, same_reads, points, self.op.recompute, layouts, self.region))
            if known:
                return known[0]
        prim = Prim(name, kind, reads, points, self.index, self.backward, self.op.owner, **more)
        prim.recompute, prim.at, prim.region = self.op.recompute, self.at, self.region
        value = Value(dtype, points if holds is None else holds, prim)
        prim.outs.append(value)
        self.graph.prims.append(prim)
        known.append(value)
        return value


class Numbering:
    """Numbers the values of a graph as they come: graphs of one signature are the same but for the names of values."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.number: dict[Value, int] = {}
        self.regions: dict[Any, int] = {None: 0}
        number = self.number
        for prim in graph.prims:
            for value, _ in prim.reads:
                if value not in number:
                    number[value] = len(number)
            for value in prim.outs:
                number[value] = len(number)

    def signature(self, outside: set[Value]) -> Any:
        """What decides what a compiler makes of the graph.

        Args:
            outside: values that must be there afterwards.
        """
        prims = tuple([self._of_prim(prim) for prim in self.graph.prims])
        values = tuple([(v.dtype, v.points, v.free, v in outside) for v in self.number])
        places = tuple([(place.copy, place.repeat, place.backward) for place in self.graph.places])
        return _frozen((prims, values, places, self.graph.apart))

    def _of_prim(self, p: Prim) -> Any:
        reads = tuple([(self.number[value], nbytes) for value, nbytes in p.reads])
        outs = tuple([self.number[value] for value in p.outs])
        call = (p.op.inputs, p.op.outputs, p.op.attrs) if p.op is not None else ()
        flags = p.backward, p.recompute, p.recomputable, p.fusible
        region = self.regions.setdefault(p.region, len(self.regions)), p.at if self.graph.apart else 0
        return p.name, p.kind, reads, outs, p.points, p.length, p.place, p.owner, flags, call, region

    def renamed(self, g: Graph, values: list[Value]) -> Graph:
        """Results and tail of the graph, or of one with its values, in the values of another of the same signature."""
        results = {values[self.number[value]] for value in g.results}
        tail = [replace(p, reads=[(values[self.number[value]], nbytes) for value, nbytes in p.reads]) for p in g.tail]
        return Graph(g.places, [], results, tail)


def _entry(known: dict[Any, list[Value]], key: Any) -> list[Value]:
    """The list under a key, an empty one if it is new."""
    try:
        return known.setdefault(key, [])
    except TypeError:
        return known.setdefault(_frozen(key), [])


def _frozen(x: Any) -> Any:
    """A hashable stand-in: arrays by their contents."""
    try:
        hash(x)
    except TypeError:
        return x.tobytes() if isinstance(x, np.ndarray) else tuple(map(_frozen, x))
    return x


def _least(a: Dim, b: Dim) -> Dim:
    if type(a) is int and type(b) is int:
        return a if a <= b else b
    return a if decide(a <= b) else b


__all__ = ["Builder", "Graph", "Numbering", "Place", "Prim", "Value"]
