"""Compiled kernels are written down as parts of calls, with the memory that they take."""

from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..program.dims import Dim, at, decide, summed
from ..program.op import Attrs, Op, Spec
from ..program.part import Part
from ..program.streams import Run
from .fusion import FusedKernel
from .graph import Graph, Place, Prim, Value

PADDED = ("mm", "addmm", "bmm")  # products that Inductor may pad


@dataclass(frozen=True)
class CompiledProgram:
    """The kernels of forward and backward, and the values of the graph in the order of `Numbering`."""

    forward: list[FusedKernel]
    backward: list[FusedKernel]
    values: list[Value]


class Emission:
    """Writes kernels down as parts, with the memory that they take."""

    def __init__(self, graph: Graph, program: CompiledProgram, *, captured: bool) -> None:
        self.graph = graph
        self.programs = ((program.forward, False), (program.backward, True))
        self.captured = captured
        self.tail = [FusedKernel([prim], dict(prim.reads)) for prim in graph.tail]
        self.parts: list[Part] = []
        self.schedule: list[tuple[Part, Place, FusedKernel]] = []

    def run(self) -> list[Part]:
        """Make the parts."""
        for kernels, backward in self.programs:
            self._program(kernels, backward=backward)
        self._accumulations()
        self._memory()
        return self.parts

    def _program(self, kernels: list[FusedKernel], *, backward: bool) -> None:
        """One graph: its kernels in the places where they were recorded."""
        first = True
        at: dict[int, list[FusedKernel]] = {}
        for kernel in kernels:
            at.setdefault(kernel.place, []).append(kernel)
        for index, place in enumerate(self.graph.places):
            if place.backward != backward:
                continue
            part = Part(place.part.name, place.part.phase, place.repeat, compiled=True, captured=self.captured)
            part.host.modules = place.part.host.modules
            for kernel in at.get(index, ()):
                part.ops += ops_of(kernel)
                self.schedule.append((part, place, kernel))
            if part.ops:
                part.host.graphs, first = int(first), False
                self.parts.append(part)

    def _accumulations(self) -> None:
        for index, place in enumerate(self.graph.places):
            part = Part("accumulation", "backward", place.repeat)
            for kernel in self.tail:
                if kernel.place == index:
                    part.ops += ops_of(kernel)
                    part.host.nodes += 1
                    self.schedule.append((part, place, kernel))
            if part.ops:
                self.parts.append(part)

    def _memory(self) -> None:
        """Values live from the kernel that writes them to the last one that reads them.

        An operation's values count in the layer that it belongs to, even where a kernel of the next one has taken it
        in: one layer of a run stands for many, whose kernels it does not all show.
        """
        at = {(id(place), part.compiled): part for part, place, _ in self.schedule}
        ends: dict[Value, tuple[int, int]] = {}  # the last kernel that has to do with a value, and the last place
        for i, (_, _, kernel) in enumerate(self.schedule):
            for prim in kernel.prims:
                for value in (*[value for value, _ in prim.reads], *prim.outs):
                    ends[value] = i, max(prim.place, ends.get(value, (0, 0))[1])
        handed: dict[tuple[Part, bool, bool], Any] = {}
        written: set[Value] = set()
        for i, (part, _, kernel) in enumerate(self.schedule):
            self._beside(part, kernel)
            for value in kernel.writes:
                if not value.free:
                    written.add(value)
                    at.get((id(self._home(value)), part.compiled), part).allocate(value.nbytes)
            for value in {*kernel.reads, *kernel.writes} & written:
                last, place = ends[value]
                if last != i or value in self.graph.results:
                    continue
                made, freed = self._home(value), self.graph.places[place]
                copies = 1 if made.run == freed.run or made.repeat == freed.repeat else made.repeat  # they waited
                at.get((id(freed), part.compiled), part).free(value.nbytes * copies)
                if made.run == freed.run and made.repeat != freed.repeat:
                    of = made.run, made.backward, freed.backward
                    handed[of] = handed.get(of, 0) + (value.nbytes if made.repeat > 1 else -value.nbytes)
        self._level(handed, at)

    def _beside(self, part: Part, kernel: FusedKernel) -> None:
        """What a hook takes in the place of a kernel: there is none in one graph."""

    def _home(self, value: Value) -> Place:
        assert value.maker is not None
        return self.graph.places[value.maker.place]

    def _level(self, handed: dict[tuple[Part, bool, bool], Dim], at: dict[tuple[int, bool], Part]) -> None:
        """The layer that stands for many hands on as much as it is handed, where fusion at either end differs."""
        for (run, made, freed), more in handed.items():
            first = next(p for p in self.graph.places if p.run == run and p.backward == made)
            middle = next(p for p in self.graph.places if p.run == run and p.backward == freed and p.repeat > 1)
            if (id(first), True) in at and (id(middle), True) in at:
                at[id(first), True].allocate(more)
                at[id(middle), True].free(more)


def ops_of(kernel: FusedKernel) -> list[Op]:
    """The call of a kernel; behind a collective the wait for it, which Inductor moves nowhere unless it is told to
    (`reorder_for_compute_comm_overlap`)."""
    op = call_of(kernel)
    if op.attrs.ranks is None:
        return [op]
    done = Run(after=(op.runs.on,))
    return [op, Op("_c10d_functional::wait_tensor", op.outputs, op.outputs, 0, 0, view=True, owner=op.owner, runs=done)]


def call_of(kernel: FusedKernel) -> Op:
    """The call of a kernel, as a device prices it."""
    if kernel.prims[0].kind == "eager":
        assert kernel.prims[0].op is not None
        return kernel.prims[0].op
    if kernel.op is None:
        kernel.op = _library(kernel.prims[0].op) if kernel.extern else _generated(kernel)
    return kernel.op


def _library(op: Op | None) -> Op:
    """A call that stays one; of some products Inductor pads the sides (`fx_passes/pad_mm.py`)."""
    assert op is not None
    if op.name not in PADDED:
        return op
    op = copy(op)
    op.attrs = op.attrs._replace(padded=True)
    return op


def _generated(kernel: FusedKernel) -> Op:
    kind, points, length = kernel.loops
    main = _main(kernel.prims)
    exponential = kind == "rows" and any("softmax" in prim.name or prim.name == "sum_exp" for prim in kernel.prims)
    reads = tuple([Spec(value.dtype, (value.points,)) for value in kernel.reads])
    return Op(
        f"inductor::{kind}",
        reads or (Spec(kernel.writes[0].dtype, ()),),
        tuple([Spec(value.dtype, (value.points,)) for value in kernel.writes]),
        summed(kernel.reads.values()),
        summed([value.nbytes for value in kernel.writes]),
        attrs=Attrs(loops=(points, length), exponential=exponential),
        owner=main.owner,
        recompute=main.recompute,
    )


def _main(prims: list[Prim]) -> Prim:
    """The operation that would move most bytes alone: it says whose the kernel is.

    Raises:
        MixedStructure: it is another's at some points of the grid.
    """
    if len({(prim.owner, prim.recompute) for prim in prims}) == 1:
        return prims[0]
    weights = [summed([*[nbytes for _, nbytes in prim.reads], *[out.nbytes for out in prim.outs]]) for prim in prims]
    first = max(range(len(prims)), key=lambda i: at(weights[i], 0))
    main = prims[first]
    for i, prim in enumerate(prims):
        if (prim.owner, prim.recompute) != (main.owner, main.recompute):
            decide((np.less if i < first else np.less_equal)(weights[i], weights[first]))
    return main
