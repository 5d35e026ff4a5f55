"""Which values the forward pass saves and which the backward pass computes again.

AOTAutograd's `min_cut_rematerialization_partition` with its default bans: the saved values are a minimum cut between
what cannot be computed again (products, attention, reductions, random numbers, what backward needs in memory anyway)
and what backward does. Capacities are bytes, doubled for values that would else stay in registers, and growing by a
tenth with each step of distance from backward.

Not modelled: the ban on fusible chains of more than 100 calls, and views as values of their own (a slice may be saved
alone). Source: torch/_functorch/partitioners.py (`solve_min_cut`, PyTorch 2.13).
"""

import heapq
from dataclasses import dataclass, field, replace

import numpy as np

from ..program.dims import MixedStructure, at
from .graph import Graph, Prim, Value
from .mincut import INFINITE, Network

GROWTH, FARTHEST = 1.1, 100  # of a value's weight, by its distance from backward
TRIED = 32  # points of a large grid, at most, beside those where a value is least or most
REDUCTION = 4  # results that are so many times smaller than their operands are not computed again


@dataclass
class Halves:
    """The two compiled programs: forward, and backward with what it computes again; `saved` crosses between them."""

    forward: list[Prim]
    backward: list[Prim]
    saved: set[Value] = field(default_factory=set)


def partitioned(graph: Graph) -> Halves:
    """Split the joint graph.

    Raises:
        MixedStructure: some points of the grid are cut in another way than the first.
    """
    cut = _Cut(graph)
    saved = cut.saved(0)
    sizes = {id(v.nbytes): v.nbytes for v in cut.users if isinstance(v.nbytes, np.ndarray) and v.nbytes.size > 1}
    if sizes:
        size, tried = _tried(list(sizes.values()))
        alike = np.array([cut.saved(point) == saved for point in tried])
        if not alike.all():
            nearest = np.abs(size[:, None] - size[tried]).argmin(axis=1)
            nearest[tried] = np.arange(len(tried))
            raise MixedStructure(alike[nearest])
    return _split(graph, saved)


def _tried(sizes: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The size of each point of a grid, and the points to cut: all of few; of many, some, and each value's extremes."""
    size = np.asarray(sum(sizes), np.float64)
    some = np.linspace(0, len(size) - 1, min(len(size), TRIED)).astype(int)
    ends = [end for array in sizes for end in (array.argmin(), array.argmax())]
    return size, np.unique([0, *np.argsort(size, kind="stable")[some], *ends])


class _Cut:
    """The partitioner: what does not depend on sizes, then a run with those of one point of the grid."""

    def __init__(self, graph: Graph) -> None:
        self.point = 0
        self.prims = graph.prims
        self.users: dict[Value, list[Prim]] = {}
        for prim in self.prims:
            for value, _ in prim.reads:
                self.users.setdefault(value, []).append(prim)
        self.order = {prim: i for i, prim in enumerate(self.prims)}
        self.forward = self._required(graph.results)
        self.distance = self._distances()
        self.far = self._used_far_apart()

    def _bytes(self, value: Value) -> int:
        return at(value.nbytes, self.point)

    def _required(self, results: set[Value]) -> set[Prim]:
        """The forward operations that the results of forward need."""
        needed: set[Prim] = set()
        wanted = {value for value in results if value.maker and not value.maker.backward}
        for prim in reversed(self.prims):
            if not prim.backward and (not wanted.isdisjoint(prim.outs) or not prim.outs):
                needed.add(prim)
                wanted.update(value for value, _ in prim.reads)
        return needed

    def _distances(self) -> dict[Prim, int]:
        """Steps to the nearest use in backward."""
        found: dict[Prim, int] = {}
        for prim in reversed(self.prims):
            if prim not in self.forward:
                found[prim] = 0
                continue
            users = [user for out in prim.outs for user in self.users.get(out, ())]
            found[prim] = min((found[user] + 1 for user in users), default=INFINITE)
        return found

    def _banned(self, prim: Prim) -> bool:
        """Whether an operation must not run again in backward."""
        if not prim.recomputable:  # no call of a library is
            return True
        (out,) = prim.outs
        for user in self.users.get(out, ()):
            if user.backward and not _fusible(prim, user):
                return True
        return self._bytes(out) * REDUCTION < sum([self._bytes(value) for value, _ in prim.reads])

    def _used_far_apart(self) -> set[Prim]:
        """Fusible users of a value that come after a user that is not: computing them again would keep it alive."""
        banned: set[Prim] = set()
        values = {value for prim in self.prims for value, _ in prim.reads}
        for value in values:
            users = self.users[value]
            if len(users) < 2:
                continue
            users = [user for user in users if user in self.forward]
            if len(users) < 2:
                continue
            limit = self._first_unfusible(users, max(self.order[user] for user in users))
            maker = value.maker
            banned.update(
                user for user in users if self.order[user] > limit and (maker is None or _fusible(maker, user))
            )
        return banned

    def _first_unfusible(self, users: list[Prim], limit: int) -> int:
        waiting = [(self.order[user], True) for user in users]
        heapq.heapify(waiting)
        seen = set(waiting)
        while waiting:
            order, fusible = heapq.heappop(waiting)
            if not fusible:
                return order
            prim = self.prims[order]
            for user in (user for out in prim.outs for user in self.users.get(out, ())):
                entry = self.order[user], _fusible(prim, user)
                if user in self.forward and entry[0] <= limit and entry not in seen:
                    seen.add(entry)
                    heapq.heappush(waiting, entry)
        return limit

    def _weight(self, value: Value) -> int:
        users = self.users.get(value, ())
        maker = value.maker
        if maker is None:
            return 0 if value.free else self._bytes(value)
        steps = max(min(self.distance[maker], FARTHEST), 1)
        weight = int(self._bytes(value) * GROWTH**steps)
        return weight if not all(_fusible(maker, user) for user in users) else 2 * weight

    def saved(self, point: int) -> set[Value]:
        """The values of the minimum cut that forward makes."""
        self.point = point
        network = Network()
        source, sink = network.node(), network.node()
        wanted = {value for prim in self.prims if prim.backward for value, _ in prim.reads}
        enter: dict[Value, int] = {}
        leave: dict[Value, int] = {}

        def place(value: Value) -> None:
            if value not in enter:
                maker = value.maker
                given = maker is None or (maker in self.forward and (maker in self.far or self._banned(maker)))
                enter[value] = source if given else network.node()
                leave[value] = sink if value in wanted else network.node()
                network.edge(enter[value], leave[value], self._weight(value))

        for prim in self.prims:
            for value, _ in prim.reads:
                if value.maker is None or not value.maker.backward:
                    place(value)
            if not prim.backward:
                for out in prim.outs:
                    place(out)
                    for value, _ in prim.reads:
                        if enter[out] != source and leave[value] != sink:  # else it carries nothing
                            network.edge(leave[value], enter[out], INFINITE)
        near = network.source_side(source, sink)
        return {v for v in enter if v.maker is not None and enter[v] in near and leave[v] not in near}


def _fusible(a: Prim, b: Prim) -> bool:
    return b.name == "cat" or (a.fusible and b.fusible)


def _split(graph: Graph, saved: set[Value]) -> Halves:
    """Backward reads what was saved and runs the rest of what it needs again, each just before its first use."""
    halves = Halves([], [], set(saved))
    again: dict[Value, Value] = {}

    def available(value: Value, before: Prim) -> Value:
        maker = value.maker
        if maker is None or maker.backward or value in saved:
            return value
        if value not in again:
            reads = [(available(v, before), nbytes) for v, nbytes in maker.reads]
            copy = replace(maker, reads=reads, backward=True, place=before.place, at=before.at, outs=[])
            for out in maker.outs:
                again[out] = Value(out.dtype, out.points, copy)
                copy.outs.append(again[out])
            halves.backward.append(copy)
        return again[value]

    for prim in graph.prims:
        if not prim.backward:
            halves.forward.append(prim)
            continue
        prim.reads = [(available(value, prim), nbytes) for value, nbytes in prim.reads]
        halves.backward.append(prim)
    return halves
