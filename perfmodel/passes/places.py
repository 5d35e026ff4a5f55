"""Where ops run: runs of layers unrolled as far as they differ, and whose memory an op of a copy means."""

from dataclasses import dataclass

from ..program.dims import same
from ..program.op import Use
from ..program.part import Part
from ..tape.tensor import Flow


@dataclass
class Place:
    """A copy of a recorded part: it stands for `repeat` of them. `run` is the same forward and back."""

    part: Part
    copy: int
    repeat: int
    backward: bool
    run: Part


def places(parts: list[Part], flow: Flow) -> list[Place]:
    """The parts in the order in which they run, with runs of layers cut into copies."""
    found = []
    for part in parts:
        backward = part.phase == "backward"
        run = flow.twins.get(part, part)
        copies = [Place(part, i, repeat, backward, run) for i, repeat in enumerate(copies_of(part.repeat))]
        found += copies[::-1] if part in flow.twins else copies
    return found


def copies_of(repeat: int) -> list[int]:
    """How many layers each copy of a run of `repeat` stands for."""
    return [1] * repeat if repeat < 4 else [1, repeat - 2, 1]


def _summed(storage: int, part: Part) -> int:
    """Where a gradient is behind everything that a part adds to it."""
    for op in part.ops:
        if op.name == "add.Tensor" and any(use.storage == storage for use in op.reads):
            storage = op.writes[0].storage
    return storage


Key = tuple[int, int]  # a block of memory, and which copy's


class Names:
    """Which copy's memory an op of a copied part means."""

    def __init__(self, parts: list[Part], flow: Flow, parameters: dict[int, Part | None]) -> None:
        self.flow = flow
        self.parameters = parameters
        self.origin: dict[int, Part] = {}
        self.written: dict[int, set[Part]] = {}  # by which parts; a gradient may lie where an activation was
        for part in parts:
            for op in part.ops:
                for use in op.writes:
                    self.origin.setdefault(use.storage, part)
                    self.written.setdefault(use.storage, set()).add(part)
        self.order = {part: i for i, part in enumerate(parts)}
        self.pairs = {part: flow.twins.get(part, part) for part in parts}
        self.carried = {part: flow.carried.get(pair, (None, None)) for part, pair in self.pairs.items()}
        self.handed = {p: self._handed_on(p, parts) for p in parts if p in flow.twins and p.repeat > 1}

    def _handed_on(self, part: Part, parts: list[Part]) -> dict[int, int]:
        """Gradients that every layer of a backward part adds to: how they come into it, and how they leave it.

        That of the residual stream, and those of what all layers read (what an encoder made, positions' biases).
        """
        carried = self.flow.carried.get(self.flow.twins[part], ())
        sizes = [use.nbytes for op in self.flow.twins[part].ops for use in op.reads if use.storage in carried]
        here = self.order[part]
        coming = [use for op in part.ops for use in op.reads if self._comes_from(use, parts[:here])]
        leaving = [
            use for later in parts[here + 1 :] for op in later.ops for use in op.reads if self._comes_from(use, [part])
        ]
        stream = [
            next((use.storage for use in uses if sizes and same(use.nbytes, sizes[0])), None)
            for uses in (coming, leaving)
        ]
        left = {use.storage for use in leaving}
        sums = {storage: _summed(storage, part) for storage in {use.storage for use in coming}}
        found = {first: last for first, last in sums.items() if last != first and last in left}
        if stream[0] is not None and stream[1] is not None:
            found.setdefault(stream[0], stream[1])
        return found

    def _comes_from(self, use: Use, parts: list[Part]) -> bool:
        writers = self.written.get(use.storage, ())
        return any(part in writers and part in self.flow.twins for part in parts)

    def key(self, storage: int, place: Place) -> Key:
        """A name for a block of memory that is the same wherever it is meant."""
        part = place.part
        before, after = self.carried[part]
        if storage == before and after is not None and place.copy:
            return (after, place.copy - 1)
        handed = self.handed.get(part, {})
        if storage in handed and place.copy < len(copies_of(part.repeat)) - 1:
            return (handed[storage], place.copy + 1)
        home = self.parameters[storage] if storage in self.parameters else self.origin.get(storage)
        if home is None:
            return (storage, 0)
        if self.pairs.get(home, home) == self.pairs[part]:
            return (storage, place.copy)
        if home.repeat == part.repeat and storage != before and storage not in handed:
            return (storage, place.copy)  # what goes over the same layers again
        if home in self.flow.twins:  # of a backward part, the first layer comes last
            return (storage, 0)
        return (storage, 0 if storage in self.parameters else len(copies_of(home.repeat)) - 1)
