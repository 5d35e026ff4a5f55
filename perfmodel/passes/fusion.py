"""Which operations share a kernel: Inductor's lowering and scheduler in small.

Pointwise operations are computed where they are read, again for every reader, unless their result must be in memory: a
library's kernel or the outside reads it, or several readers would each have to read more than four tensors. What is in
memory is a node of the scheduler. Nodes that share memory then fuse, the pair that saves most bytes first, if their
loops agree and no third node stands between them:

- pointwise with pointwise over as many elements;
- sums along rows with sums along the same rows, and with pointwise over the rows' elements or over the rows;
- sums down columns with sums down the same columns, and with pointwise over the sums.

Source: torch/_inductor/ir.py (`should_realize_on_reuse`), scheduler.py (`fuse_nodes`, `score_fusion_memory`),
codegen/simd.py (`SIMDScheduling.can_fuse`), PyTorch 2.13.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from operator import itemgetter
from typing import Any

import numpy as np

from ..program.dims import Dim, MixedStructure, at, larger, same, summed
from ..program.op import Op
from .graph import Prim, Value

READS_ON_REUSE = 4  # config.realize_reads_threshold
READS = 8  # config.realize_acc_reads_threshold
ROUNDS = 10  # of fusion, at most (scheduler.fuse_nodes)
_Size = tuple[int, tuple[int, ...]]  # a sum of sizes by its parts


@dataclass(eq=False, slots=True)
class FusedKernel:
    """One kernel: fused loops, or a library's.

    Attributes:
        prims: what it computes, in order.
        reads: bytes read of each value in memory; of its own results none.
        writes: the values that it leaves in memory.
        op: its call, once it was written down (`passes.compile`).
    """

    prims: list[Prim]
    reads: dict[Value, Dim] = field(default_factory=dict)
    writes: list[Value] = field(default_factory=list)
    loops: tuple[Any, ...] = ()
    op: Op | None = None

    @property
    def extern(self) -> bool:
        """Whether a library brings it."""
        return self.prims[0].kind == "extern"

    @property
    def what(self) -> tuple[frozenset[Any], ...]:
        """What it computes, reads and writes."""
        return frozenset(self.prims), frozenset(self.reads), frozenset(self.writes)

    @property
    def place(self) -> int:
        """Where it runs: with the last of what it computes."""
        return max([prim.place for prim in self.prims])


def fused_kernels(prims: list[Prim], results: set[Value]) -> list[FusedKernel]:
    """The kernels of one compiled program, in an order in which they can run.

    Args:
        results: values that must be in memory afterwards.

    Raises:
        MixedStructure: they are others at some points of the grid.
    """
    kernels, alike = _fused(prims, results, 0)
    while not np.all(alike):
        others, further = _fused(prims, results, int(np.argmin(alike)))
        if [kernel.what for kernel in others] != [kernel.what for kernel in kernels]:
            raise MixedStructure(alike)
        alike = alike | further
    return kernels


def _fused(prims: list[Prim], results: set[Value], point: int) -> tuple[list[FusedKernel], Any]:
    """The kernels at one point of the grid, and the points where pairs come in the same order: they have the same."""
    kernels = _nodes(_without_dead_code(prims, results), results)
    alike: Any = True
    for _ in range(ROUNDS):
        before = len(kernels)
        one = _Round(kernels, point)
        kernels, alike = one.run(), alike & one.alike
        if len(kernels) == before:
            break
    _drop_internal(kernels, results)
    return kernels, alike


def _without_dead_code(prims: list[Prim], results: set[Value]) -> list[Prim]:
    needed, kept = set(results), []
    for prim in reversed(prims):
        if not prim.outs or not needed.isdisjoint(prim.outs):
            kept.append(prim)
            needed.update([value for value, _ in prim.reads])
    return kept[::-1]


def _nodes(prims: list[Prim], results: set[Value]) -> list[FusedKernel]:
    """Operations whose results are in memory, with those that are computed where they are read."""
    uses: dict[Value, list[Prim]] = {}
    for prim in prims:
        for value in dict.fromkeys([value for value, _ in prim.reads]):
            uses.setdefault(value, []).append(prim)
    inlined: dict[Value, FusedKernel] = {}
    nodes = []
    for prim in prims:
        node = FusedKernel([], {}, list(prim.outs), _loops(prim))
        for value, nbytes in prim.reads:
            _take(node, value, nbytes, inlined)
        node.prims.append(prim)
        if prim.kind == "pointwise" and not _in_memory(prim, node, uses.get(prim.outs[0], []), results):
            inlined[prim.outs[0]] = node
        else:
            nodes.append(node)
    return nodes


def _take(node: FusedKernel, value: Value, nbytes: Dim, inlined: dict[Value, FusedKernel]) -> None:
    """Read a value, or compute it (of a slice, the part that is read)."""
    source = inlined.get(value)
    if source is None:
        node.reads[value] = larger(node.reads.get(value, 0), nbytes)
        return
    reads = source.reads
    if not same(nbytes, value.nbytes):
        reads = {other: _share(size, nbytes, value.nbytes) for other, size in reads.items()}
    if node.reads:
        reads = {other: larger(node.reads.get(other, 0), size) for other, size in reads.items()}
    node.reads.update(reads)
    node.prims = list(dict.fromkeys(node.prims + source.prims)) if node.prims else source.prims.copy()


def _share(size: Dim, part: Dim, whole: Dim) -> Dim:
    """size · part / whole, rounded down; in small steps, for arrays of 64 bits."""
    common = np.gcd(part, whole)
    share = size * (part // common) // (whole // common)
    return share if isinstance(share, np.ndarray) else int(share)


def _in_memory(prim: Prim, node: FusedKernel, users: list[Prim], results: set[Value]) -> bool:
    value = prim.outs[0]
    if value in results:
        return True
    for user in users:
        if _wants_memory(user, value):
            return True
    reads = len(node.reads)
    return reads > READS or (len(users) > 1 and reads > READS_ON_REUSE)


def _wants_memory(user: Prim, value: Value) -> bool:
    """Whether a value must be in memory for its user: operands of kernels, and what a scatter adds to (its last)."""
    return user.kind == "extern" or (user.kind == "scatter" and user.reads[-1][0] is value)


def _loops(prim: Prim) -> tuple[Any, ...]:
    return (prim.kind, prim.points, prim.length)


def _agree(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The loops of two nodes in one kernel, or None."""
    if a[0] == "extern" or b[0] == "extern":
        return None
    kinds = {"pointwise" if loops[0] == "scatter" else loops[0] for loops in (a, b)}
    if kinds == {"pointwise"} or len(kinds) == 1:
        return a if same(a[1], b[1]) and same(a[2], b[2]) else None
    if kinds == {"columns", "pointwise"}:
        columns, points = (a, b) if a[0] == "columns" else (b, a)
        return columns if same(points[1], columns[1]) else None
    if kinds != {"rows", "pointwise"}:
        return None
    rows, points = (a, b) if a[0] == "rows" else (b, a)
    return rows if same(points[1], rows[1] * rows[2]) or same(points[1], rows[1]) else None


class _Round:
    """One pass over the pairs of nodes that share memory, in the order that they have at one point of a grid.

    `alike` says at which points they have the same.
    """

    def __init__(self, kernels: list[FusedKernel], point: int) -> None:
        self.kernels = kernels
        self.point = point
        self.alike: Any = True
        self.maker = {value: kernel for kernel in kernels for value in kernel.writes}
        self.group = {kernel: kernel for kernel in kernels}
        self.nodes = {kernel: [kernel] for kernel in kernels}  # of each group
        self.position = {kernel: i for i, kernel in enumerate(kernels)}  # of its first node
        self.last = dict(self.position)  # of its last node
        self.bits = {kernel: 1 << i for i, kernel in enumerate(kernels)}  # of its nodes
        self.above: dict[FusedKernel, int] = {}  # of each group, bits of all nodes that it needs, directly or not
        for kernel in kernels:
            above = 0
            for need in self._needs(kernel):
                above |= self.bits[need] | self.above[need]
            self.above[kernel] = above

    def run(self) -> list[FusedKernel]:
        """Fuse what may, the pairs with most shared bytes first; the new kernels in order."""
        for _, _, a, b in sorted(self._pairs(), key=itemgetter(0, 1)):
            first, second = self.group[a], self.group[b]
            if first is second:
                continue
            loops = _agree(first.loops, second.loops)
            if loops is not None and not self._between(first, second) and not self._between(second, first):
                self._fuse(first, second, loops)
        return self._sorted()

    def _pairs(self) -> Iterable[tuple[int, int, FusedKernel, FusedKernel]]:
        """(-shared bytes, distance) of the nodes that use the same memory."""
        users: dict[Value, list[FusedKernel]] = {}
        for kernel in self.kernels:
            if not kernel.extern:
                for value in (*kernel.writes, *kernel.reads):
                    users.setdefault(value, []).append(kernel)
        shared: dict[tuple[int, int], list[Dim]] = {}
        for value, kernels in users.items():
            for pair in combinations([self.position[kernel] for kernel in kernels], 2):
                shared.setdefault(pair, []).append(value.nbytes)
        sizes = {pair: _added(found) for pair, found in shared.items()}
        totals = {size: summed(shared[pair]) for pair, size in sizes.items()}
        here = {size: at(total, self.point) for size, total in totals.items()}
        self._note_order(sorted((here[size], size) for size in totals), totals)
        for (i, j), size in sizes.items():
            yield -here[size], abs(i - j), self.kernels[i], self.kernels[j]

    def _note_order(self, ordered: list[tuple[int, _Size]], totals: dict[_Size, Dim]) -> None:
        """Where in the grid sums of bytes compare as they do here."""
        for (low, a), (high, b) in pairwise(ordered):
            self.alike = self.alike & (np.less if low < high else np.equal)(totals[a], totals[b])

    def _needs(self, kernel: FusedKernel) -> set[FusedKernel]:
        maker, group = self.maker, self.group
        return {group[maker[value]] for value in kernel.reads if value in maker} - {kernel}

    def _between(self, early: FusedKernel, late: FusedKernel) -> bool:
        """Whether `late` needs `early` by way of another kernel."""
        bits = self.bits[early]
        if not self.above[late] & bits:
            return False
        return any(self.above[need] & bits for need in self._needs(late) if need is not early)

    def _fuse(self, a: FusedKernel, b: FusedKernel, loops: tuple[Any, ...]) -> None:
        first, second = sorted((a, b), key=self.position.__getitem__)
        made = FusedKernel(list(dict.fromkeys(first.prims + second.prims)), dict(first.reads))
        made.writes, made.loops = first.writes + second.writes, loops
        for value, nbytes in second.reads.items():
            made.reads[value] = larger(made.reads.get(value, 0), nbytes)
        for value in made.writes:
            made.reads.pop(value, None)
        self.position[made] = self.position[first]
        self.last[made] = max(self.last[first], self.last[second])
        self.bits[made] = self.bits[first] | self.bits[second]
        self.nodes[made] = self.nodes.pop(first) + self.nodes.pop(second)
        for node in (made, *self.nodes[made]):
            self.group[node] = made
        bits = self.bits[made]
        above = (self.above.pop(first) | self.above.pop(second)) & ~bits
        for group, needed in self.above.items():
            if needed & bits:
                self.above[group] = needed | bits | above
        self.above[made] = above

    def _sorted(self) -> list[FusedKernel]:
        """The kernels by their last node, each after what it needs."""
        order: dict[FusedKernel, None] = {}
        present = sorted(self.nodes, key=self.last.__getitem__)
        for kernel in present:
            waiting = [kernel]
            while waiting:
                top = waiting[-1]
                missing = [need for need in self._needs(top) if need not in order]
                if missing:
                    waiting += sorted(missing, key=self.last.__getitem__, reverse=True)[:1]
                    continue
                waiting.pop()
                order[top] = None
        return list(order)


def _added(sizes: list[Dim]) -> _Size:
    """A name for a sum of sizes: its numbers together, and the arrays, of which there are few."""
    arrays = [id(size) for size in sizes if isinstance(size, np.ndarray)]
    return sum(size for size in sizes if not isinstance(size, np.ndarray)), tuple(sorted(arrays))


def _drop_internal(kernels: list[FusedKernel], results: set[Value]) -> None:
    """What only its own kernel reads never reaches memory."""
    read = {value for kernel in kernels for value in kernel.reads}
    for kernel in kernels:
        if not kernel.extern:
            kernel.writes = [value for value in kernel.writes if value in results or value in read]
