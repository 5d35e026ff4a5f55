"""DDP around a compiled model: the graph is cut where buckets end, and gradients come region by region.

Dynamo compiles what DDP's forward calls, and its DDPOptimizer cuts the graph: from the end on it counts the bytes of
the parameters that calls take, and before one that fills a bucket (1 MiB the first, 25 others) a new graph ends. To
autograd a graph is one node: all its gradients come behind its backward, so they are reduced beside the backward of the
graphs before it alone; a model that trains less than a bucket holds is one graph, and hides nothing. A block with
checkpoints is one call that takes all its parameters.

The gradients of a graph are ready at once, and what libstdc++'s heap makes of equals is the order in which they come.

Sources: torch 2.13, _dynamo/backends/distributed.py (`DDPOptimizer.compile_fn`), csrc/autograd/engine.cpp
(`CompareNodeTaskTime`), libstdc++ bits/stl_heap.h.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from ...program.dims import Dim, decide
from ...program.part import Part
from ...tape.core import tape
from ...tape.tensor import Flow, Parameter, Tensor
from .messages import LayerGradient

Place = tuple[int | None, int]  # a block, or None beside them, and which use of a trained parameter in it


class ParameterUse(NamedTuple):
    """A call takes a trained parameter; None: what an earlier region has made."""

    region: int
    part: Part
    place: Place
    parameter: Parameter | None


class Uses:
    """Follows a forward pass, and begins a new region where a graph is cut.

    Args:
        cuts: uses of parameters before which it is.

    Attributes:
        alone: blocks with a cut, which are like no other.
    """

    def __init__(self, cuts: frozenset[Place] = frozenset()) -> None:
        self.cuts = cuts
        self.alone = frozenset(layer for layer, _ in cuts if layer is not None)
        self.found: list[ParameterUse] = []
        self.runs: dict[Part, tuple[int, int]] = {}  # blocks of a pattern, and how often it comes
        self.layer: int | None = None
        self.counts: dict[int | None, int] = {}
        self.whole = False
        self.crossed: set[tuple[int, int, int]] = set()

    def enter(self, layer: int | None, *, whole: bool = False) -> None:
        """A block begins, `whole` if it is one call; None: it has ended."""
        self.layer, self.whole = layer, whole
        if layer is not None:
            self.counts[layer] = 0
        if whole:
            self._cut((layer, 0))

    def use(self, t: Tensor) -> None:
        """A call takes a tensor that needs a gradient."""
        current = tape()
        flow = current.flow
        if current.recomputing or flow is None:
            return
        if isinstance(t, Parameter):
            place = self.layer, self.counts.get(self.layer, 0)
            self.counts[self.layer] = place[1] + 1
            if not self.whole:
                self._cut(place)
            self.found.append(ParameterUse(flow.region or 0, current.part, (self.layer, 0) if self.whole else place, t))
        elif t.node is not None and t.node.region is not None and t.node.region != flow.region:
            known = id(t.node), t.slot, flow.region or 0
            if known not in self.crossed:
                self.crossed.add(known)
                self.found.append(ParameterUse(flow.region or 0, current.part, (self.layer, 0), None))

    def _cut(self, place: Place) -> None:
        flow = tape().flow
        if place in self.cuts and flow is not None and flow.region is not None:
            flow.region += 1


def unrolled(uses: Uses) -> Iterator[tuple[ParameterUse, int]]:
    """Uses of all layers in their order, each with the number of the layer among those of its part."""
    for _, those in groupby(uses.found, key=lambda use: use.part):
        of_part = list(those)
        for turn in range(of_part[0].part.repeat):
            yield from ((use, turn) for use in of_part)


def cuts_of(uses: Uses, first: int, others: int) -> frozenset[Place]:
    """Where DDPOptimizer cuts a graph.

    Args:
        first, others: bytes of a bucket.
    """
    calls: list[tuple[Place, Dim]] = []
    before: Parameter | None = None
    for use, turn in unrolled(uses):
        layer, n = use.place
        period = uses.runs.get(use.part, (1, 1))[0]
        place = (layer if layer is None else layer + turn * period), n
        assert use.parameter is not None
        if calls and (calls[-1][0] == place or (before is not None and _are_one_layer(before, use.parameter))):
            calls[-1] = calls[-1][0], calls[-1][1] + use.parameter.nbytes
        else:
            calls.append((place, use.parameter.nbytes))
        before = use.parameter
    found, filled = set[Place](), 0
    for place, nbytes in reversed(calls[1:]):  # nothing before the first one has parameters: it is no graph of its own
        filled = filled + nbytes
        if decide(filled >= (others if found else first)):
            found.add(place)
            filled = 0
    return frozenset(found)


def _are_one_layer(weight: Parameter, bias: Parameter) -> bool:
    """Whether a call takes both."""
    return bias.name.endswith(".bias") and weight.name == f"{bias.name.removesuffix('bias')}weight"


def gradients(uses: Uses) -> dict[int, list[LayerGradient]]:
    """The gradients of each region as they come, the last region first."""
    taken: dict[int, list[LayerGradient | None]] = {}
    seen: set[tuple[Parameter, int]] = set()
    for use, turn in unrolled(uses):
        p = use.parameter
        if p is None:
            those = taken.setdefault(use.region, [])
            if None in those:
                those.remove(None)
            those.append(None)
        elif (p, turn) not in seen:
            seen.add((p, turn))
            taken.setdefault(use.region, []).append(LayerGradient(p, turn))
    return {region: [c for c in heaped(taken[region]) if c is not None] for region in sorted(taken, reverse=True)}


def heaped(pushed: Sequence[LayerGradient | None]) -> list[LayerGradient | None]:
    """The order in which what is pushed onto a heap is taken from it: equals, but for one that is less (None)."""
    heap: list[LayerGradient | None] = []
    for item in pushed:
        heap.append(item)
        _rise(heap, len(heap) - 1, item)
    taken = []
    while heap:
        taken.append(heap[0])
        last = heap.pop()
        if heap:
            _sink(heap, last)
    return taken


def _rise(heap: list[LayerGradient | None], hole: int, item: LayerGradient | None) -> None:
    """`std::__push_heap`."""
    while hole and heap[(hole - 1) // 2] is None and item is not None:
        heap[hole] = heap[(hole - 1) // 2]
        hole = (hole - 1) // 2
    heap[hole] = item


def _sink(heap: list[LayerGradient | None], item: LayerGradient | None) -> None:
    """`std::__adjust_heap`: the hole goes down to a leaf, to the right among equals, and the item up from there."""
    hole = child = 0
    while child < (len(heap) - 1) // 2:
        child = 2 * (child + 1)
        if heap[child] is None and heap[child - 1] is not None:
            child -= 1
        heap[hole] = heap[child]
        hole = child
    if len(heap) % 2 == 0 and child == (len(heap) - 2) // 2:
        child = 2 * (child + 1)
        heap[hole] = heap[child - 1]
        hole = child - 1
    _rise(heap, hole, item)


def behind_regions(
    parts: list[Part],
    flow: Flow,
    arriving: dict[int, list[LayerGradient]],
    run: Callable[[Sequence[LayerGradient]], None],
) -> list[Part]:
    """Parts of a pass with hooks behind the backward of each region.

    Args:
        arriving: the gradients of each region.
        run: records what is done about them.
    """
    ends: dict[int, tuple[int, int]] = {}  # of each region the last part, and where in it
    for i, part in enumerate(parts):
        for at, op in enumerate(part.ops):
            if part.phase == "backward" and op in flow.regions:
                ends[flow.regions[op]] = i, at + 1
    current = tape()
    found, inside = list(parts), current.part
    for region, those in sorted(arriving.items()):  # from the end on, so that places stay what they are
        i, at = ends[region]
        if at < len(parts[i].ops):
            hook = flow.hook(parts[i], at)
        else:
            between = Part("exchange", "backward")
            found.insert(found.index(parts[i]) + 1, between)
            hook = flow.hook(between)
        current.part, current.beside = hook, True
        run(those)
        current.part, current.beside = inside, False
    return found
