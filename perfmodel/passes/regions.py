"""A model that falls apart: its regions are compiled one by one, what is between them stays as it was recorded.

Where FSDP2 hooks its units, Dynamo ends a graph: each block is a program of its own, forward and backward, and so are
the last norm, the rotary tables, the mask and the loss. Seen from inside, what comes into a region is an input like any
other: it may be saved. `nn.Embedding`, `nn.Linear` and `nn.LayerNorm` beside the blocks run as they are, since Dynamo
skips frames of `torch.nn`. Under DDP regions are the graphs into which one is cut (`recording.parallel.ddp_compiled`).

With checkpoints a block is one operator to Dynamo, reentrant or not: its graph's backward runs it again. What one graph
over several blocks would recompute of the last of them besides, for what reads its output, is not modelled.

Source: torch 2.13, _fully_shard/_fsdp_common.py (`_dynamo_disable`), _dynamo/trace_rules.py;
what falls into which graph was looked at (`validate/oracle/compiled.py`).
"""

from collections.abc import Iterator
from contextlib import contextmanager

from ..program.part import Part
from .emission import CompiledProgram, Emission, ops_of
from .fusion import FusedKernel, fused_kernels
from .graph import Graph, Place, Prim, Value
from .partition import partitioned

Region = tuple[int, int]


def compiled_regions(graph: Graph) -> tuple[list[FusedKernel], list[FusedKernel]]:
    """The kernels of forward and backward: those of each region, and single calls and hooks.

    Raises:
        MixedStructure: the points of a grid do not compile to one program.
    """
    of_region: dict[Region, list[Prim]] = {}
    for prim in graph.prims:
        if prim.region is not None:
            of_region.setdefault(prim.region, []).append(prim)
    needed = _needed_outside(graph)
    halves = tuple(
        [FusedKernel([prim], dict(prim.reads), list(prim.outs)) for prim in graph.prims if prim.region is None
         and prim.backward == backward]
        for backward in (False, True)
    )  # fmt: skip
    for prims in of_region.values():
        made = {value for prim in prims for value in prim.outs}
        with _as_inputs(value for prim in prims for value, _ in prim.reads if value not in made):
            cut = partitioned(Graph(graph.places, prims, made & needed))
            forward, backward = ({v for v in made & needed if v.maker and v.maker.backward == b} for b in (False, True))
            halves[0].extend(fused_kernels(cut.forward, cut.saved | forward))
            halves[1].extend(fused_kernels(cut.backward, backward))
    return halves[0], halves[1]


def _needed_outside(graph: Graph) -> set[Value]:
    """What must be in memory behind the region that makes it."""
    home = {value: prim.region for prim in graph.prims for value in prim.outs}
    return graph.outside | {
        value for prim in graph.prims for value, _ in prim.reads if home.get(value, prim.region) != prim.region
    }


@contextmanager
def _as_inputs(values: Iterator[Value]) -> Iterator[None]:
    """Nobody makes what comes into a region, as long as that is compiled."""
    makers = {value: value.maker for value in values}
    for value in makers:
        value.maker = None
    try:
        yield
    finally:
        for value, maker in makers.items():
            value.maker = maker


class RegionalEmission(Emission):
    """Kernels of regions, single calls and hooks, in the places and in the order in which they were recorded.

    Hooks stand beside the kernels of a block in one part, as that repeats; elsewhere compiled and eager calls are parts
    of their own, whose host work differs.

    Args:
        hooks: of the graph, in order: a program that was known may have those of another.
    """

    def __init__(self, graph: Graph, program: CompiledProgram, hooks: list[Part], *, captured: bool) -> None:
        super().__init__(graph, program, captured=captured)
        kernels = [*program.forward, *program.backward]
        those = [kernel for kernel in kernels if kernel.prims[0].kind == "hook"]
        self.hooks = dict(zip(map(id, those), hooks, strict=True))
        self.entered: set[tuple[Region, bool]] = set()
        self.starts: dict[tuple[Region | None, int], int] = {}
        for kernel in kernels:
            where = kernel.prims[0].region, kernel.place
            first = min(prim.at for prim in kernel.prims if prim.place == kernel.place)
            self.starts[where] = min(first, self.starts.get(where, first))

    def run(self) -> list[Part]:
        """Make the parts."""
        at: dict[int, list[FusedKernel]] = {}
        for kernels, _ in self.programs:
            for kernel in kernels:
                at.setdefault(kernel.place, []).append(kernel)
        for index, place in enumerate(self.graph.places):
            self._place(place, sorted(at.get(index, ()), key=self._position))
        self._memory()
        return self.parts

    def _position(self, kernel: FusedKernel) -> int:
        prim = kernel.prims[0]
        return prim.at if prim.region is None else self.starts[prim.region, kernel.place]

    def _place(self, place: Place, kernels: list[FusedKernel]) -> None:
        """The parts of one place."""
        part, guarded = None, False
        whole = place.part.name == "blocks"
        for kernel in kernels:
            region, hook = kernel.prims[0].region, self.hooks.get(id(kernel))
            compiled = whole or region is not None
            enters = region is not None and (region, place.backward) not in self.entered
            if part is None or (hook is None and part.compiled != compiled):
                part = Part(place.part.name, place.part.phase, place.repeat, compiled=compiled)
                part.captured = compiled and self.captured
                part.host.modules = place.part.host.modules if compiled and not guarded else 0
                guarded |= compiled
                self.parts.append(part)
            if hook is not None:
                part.ops += hook.ops
                part.host.units += hook.host.units
                part.host.gradients += hook.host.gradients
                part.host.searched += hook.host.searched
            else:
                part.ops += ops_of(kernel)
                part.host.graphs += enters
                part.host.nodes += region is None and place.backward
                if region is not None:
                    self.entered.add((region, place.backward))
            self.schedule.append((part, place, kernel))

    def _beside(self, part: Part, kernel: FusedKernel) -> None:
        if id(kernel) in self.hooks:
            part.passes_through(self.hooks[id(kernel)])
