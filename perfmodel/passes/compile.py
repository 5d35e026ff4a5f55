"""`torch.compile` of the model: forward and backward become two programs of fused kernels.

What transformers' `torch_compile` compiles is the model: its forward and the backward that follows from it. Clipping
and the optimizer stay eager, and so does the sum of gradients over micro-batches. One graph without breaks is assumed.

The pass goes the way of the compiler: the recorded calls become a graph (`graph`, `lowering`), AOTAutograd decides what
is saved (`partition`), Inductor what shares a kernel (`fusion`). Each kernel reads each tensor in memory once and
writes what others need; what only it needs is never there. FLOPs stay what they were: products and attention are never
run again, nor left out. Products whose sides stand in the way of wide loads are priced padded where that pays, but the
copies count as no kernels. Not modelled: kernels that autotuning would choose for products, fusion of attention written
out, and the second order of loops that lets row and column sums share a kernel.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..program.dims import Dim, at, decide, summed
from ..program.op import Attrs, Op, Spec
from ..program.part import Part
from ..setup import Setup
from ..tape.tensor import Flow, Parameter
from .fusion import FusedKernel, fused_kernels
from .graph import Graph, Numbering, Place, Prim, Value
from .lowering import lowered
from .partition import partitioned

PADDED = ("mm", "addmm", "bmm")  # products that Inductor may pad


@dataclass(frozen=True)
class CompiledProgram:
    """The kernels of forward and backward, and the values of the graph in the order of `Numbering`."""

    forward: list[FusedKernel]
    backward: list[FusedKernel]
    values: list[Value]


Programs = dict[Any, CompiledProgram]  # by what decides them


def compiled_parts(
    setup: Setup, parameters: Sequence[Parameter], parts: list[Part], flow: Flow, known: Programs, *, alike: bool
) -> tuple[list[Part], list[Part]]:
    """The parts of a micro-batch as `torch.compile` runs them; if further ones are alike (`Tape.alike`), theirs too.

    Args:
        parameters: of the model, as the parts use them.
        known: what was compiled before and receives what is compiled here: a program that only adds its gradients to
            others, or that another optimizer follows, is the same.

    Raises:
        MixedStructure: the points of a grid do not compile to one program.
    """
    graph = lowered(parameters, parts, flow)
    numbering = Numbering(graph)
    outside = graph.outside
    signature = numbering.signature(outside)
    program = known.get(signature)
    if program is None:
        halves = partitioned(graph)
        forward = fused_kernels(halves.forward, halves.saved | {v for v in outside if v.maker and not v.maker.backward})
        backward = fused_kernels(halves.backward, {v for v in outside if v.maker and v.maker.backward})
        program = known[signature] = CompiledProgram(forward, backward, list(numbering.number))
    captured = setup.compile == "reduce-overhead"

    def emitted(g: Graph) -> list[Part]:
        return _Emission(numbering.renamed(g, program.values), program, captured=captured).run()

    if not alike:
        return emitted(graph), []
    further = graph.later()
    later = emitted(further)
    later[-1].free(summed([value.nbytes for value in further.results]))  # they replace those of the pass before
    return emitted(graph), later


class _Emission:
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
                part.ops.append(_call(kernel))
                self.schedule.append((part, place, kernel))
            if part.ops:
                part.host.graphs, first = int(first), False
                self.parts.append(part)

    def _accumulations(self) -> None:
        for index, place in enumerate(self.graph.places):
            part = Part("accumulation", "backward", place.repeat)
            for kernel in self.tail:
                if kernel.place == index:
                    part.ops.append(_call(kernel))
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
        handed: dict[tuple[int, bool, bool], Any] = {}
        written: set[Value] = set()
        for i, (part, _, kernel) in enumerate(self.schedule):
            for value in kernel.writes:
                if not value.free:
                    written.add(value)
                    at.get((id(self._home(value)), part.compiled), part).allocate(value.nbytes)
            for value in {*kernel.reads, *kernel.writes} & written - self.graph.results:
                last, place = ends[value]
                if last != i:
                    continue
                made, freed = self._home(value), self.graph.places[place]
                copies = 1 if made.run == freed.run or made.repeat == freed.repeat else made.repeat  # they waited
                at.get((id(freed), part.compiled), part).free(value.nbytes * copies)
                if made.run == freed.run and made.repeat != freed.repeat:
                    of = made.run, made.backward, freed.backward
                    handed[of] = handed.get(of, 0) + (value.nbytes if made.repeat > 1 else -value.nbytes)
        self._level(handed, at)

    def _home(self, value: Value) -> Place:
        assert value.maker is not None
        return self.graph.places[value.maker.place]

    def _level(self, handed: dict[tuple[int, bool, bool], Dim], at: dict[tuple[int, bool], Part]) -> None:
        """The layer that stands for many hands on as much as it is handed, where fusion at either end differs."""
        for (run, made, freed), more in handed.items():
            first = next(p for p in self.graph.places if p.run == run and p.backward == made)
            middle = next(p for p in self.graph.places if p.run == run and p.backward == freed and p.repeat > 1)
            if (id(first), True) in at and (id(middle), True) in at:
                at[id(first), True].allocate(more)
                at[id(middle), True].free(more)


def _call(kernel: FusedKernel) -> Op:
    """The call of a kernel, as a device prices it."""
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


__all__ = ["compiled_parts"]
