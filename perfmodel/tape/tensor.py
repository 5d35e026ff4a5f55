"""Tensors without data, the memory that they hold, and the node of the graph that made them.

A tensor's memory lives exactly as long as the tensor does: a `Storage` that nobody refers to any more reports itself
freed, just as PyTorch's reference counting returns a block to the allocator.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

from ..program.dims import Dim, Shape, contiguous_strides, product
from ..program.dtypes import FLOATING, ITEMSIZE
from ..program.op import Op, Spec, Use
from ..program.part import Part

Grads = tuple["Tensor | None", ...]
Backward = Callable[["Node", Sequence["Tensor | None"]], Grads]
Edge = tuple["Node", int]  # where a gradient goes: a node, and which of its outputs the gradient is of


class RecordingTape(Protocol):
    """What memory and nodes need of the tape."""

    part: Part
    owner: str
    frames: list[Any]
    sequence: int
    flow: "Flow | None"
    entering: "dict[Part, LayerRunStart]"
    handed: dict[int, Part | None]
    lingering: "list[Storage]"
    graph_dies: bool


class Storage:
    """A block of memory. `copies` > 1: the block stands for that many when it is freed outside its repeated part.

    `home` is the part that made it. `heir` is the block that stays in its place; it dies in further micro-batches only
    (`Tape.alike`).
    """

    __slots__ = ("__weakref__", "copies", "heir", "home", "nbytes", "number", "tape")

    def __init__(self, nbytes: Dim, tape: "RecordingTape | None") -> None:
        self.nbytes = nbytes
        self.tape = tape
        self.copies = 1
        self.home = None if tape is None else tape.part
        self.heir: Storage | None = None
        self.number = next(_numbers)

    def inherited(self) -> "Storage":
        """Its heir, made on first use."""
        if self.heir is None:
            self.heir = Storage(self.nbytes, self.tape)
            self.heir.home = self.home
        return self.heir

    def __del__(self) -> None:
        tape = self.tape
        if tape is not None:
            part = tape.part if self.heir is None else tape.part.later
            if tape.flow is not None and tape.flow.apart:
                part = tape.flow.where_freed(self, tape.part)
            if part is not None and tape.part.repeat > 1 and self._of_all(tape.part):
                last = Storage(self.nbytes, tape)
                last.copies, last.heir, last.home, last.number = self.copies, self.heir, self.home, self.number
                tape.lingering.append(last)
            elif part is not None:
                part.free(self.nbytes * (self._held_by(tape) if tape.graph_dies else self.copies))
            if tape.flow is not None:
                tape.flow.live.discard(self.number)

    def _held_by(self, tape: "RecordingTape") -> Dim:
        """How many like this block die with a graph that holds it.

        What enters a run stands for the input of each of its layers, what leaves one for itself; any other block for
        one a layer of the part that made it.
        """
        run = tape.handed.get(self.number, self.home)
        return 1 if run is None else run.repeat

    def _of_all(self, part: Part) -> bool:
        """Whether all layers of a run hold this very block, so that it dies with the last of them, forward or back.

        Any other block that dies there stands for one a layer: what the layer made, and what its neighbour handed it.
        """
        run = self.tape.entering.get(part) if self.tape is not None else None
        home = self.home
        if run is None or home is None or home.repeat > 1:
            return False
        return self.number < run.first and self.number != run.input


class LayerRunStart(NamedTuple):
    """Where a run of identical layers begins: the block of its input, and the first one that is younger than it."""

    input: int
    first: int


_numbers = count()


class Cuts(Protocol):
    """What cuts a forward pass into regions."""

    runs: dict[Part, tuple[int, int]]

    @property
    def alone(self) -> frozenset[int]:
        """Blocks that are like no other."""

    def enter(self, layer: int | None, *, whole: bool = False) -> None:
        """A block begins, `whole` if it is one call; None: it has ended."""

    def use(self, t: "Tensor") -> None:
        """A call takes a tensor that needs a gradient."""


@dataclass(eq=False, repr=False)
class Flow:
    """What a tape remembers of a pass forward and back for passes that rewrite its ops.

    Attributes:
        live: blocks of memory that are in use.
        carried: for each run of identical layers, by its part, the blocks of its input and output.
        twins: for each backward part, the forward part whose ops it differentiates.
        apart: whether the model falls into regions that are compiled one by one, with eager calls between them.
        region: the one that is being recorded; regions: the one of each op, if it is in any.
        cuts: what begins a new one as parameters are used; None: a region is what runs inside of `core.region`.
        hooks: what runs beside the model in a part: behind how many of its ops, and what.
    """

    live: set[int] = field(default_factory=set)
    carried: dict[Part, tuple[int, int]] = field(default_factory=dict)
    twins: dict[Part, Part] = field(default_factory=dict)
    apart: bool = False
    region: int | None = None
    regions: dict[Op, int] = field(default_factory=dict)
    cuts: "Cuts | None" = None
    hooks: dict[Part, list[tuple[int, Part]]] = field(default_factory=dict)
    first: int = field(default_factory=lambda: next(_numbers))
    _of_hooks: set[Part] = field(default_factory=set)

    def carry(self, part: Part, blocks: tuple[int, int], period: int) -> None:
        """A run of layers is recorded, a pattern of so many: note the blocks of memory that it gets and gives."""
        self.carried[part] = blocks
        for _, beside in self.hooks.get(part, ()):
            beside.repeat = part.repeat
        if self.cuts is not None:
            self.cuts.runs[part] = period, part.repeat

    def hook(self, part: Part, at: int | None = None) -> Part:
        """A part for what runs beside the model, behind so many ops of a part; None: those that it has so far."""
        made = Part(part.name, part.phase, part.repeat)
        those = self.hooks.setdefault(part, [])
        those.append((len(part.ops) if at is None else at, made))
        those.sort(key=itemgetter(0))
        self._of_hooks.add(made)
        return made

    def where_freed(self, block: Storage, part: Part) -> Part | None:
        """The part in which the death of a block counts: of what hooks or a pass before have made in one of hooks.

        None where it is the model's and made in this pass: a compiled program has other blocks in its place.
        """
        if block.number > self.first and block.home not in self._of_hooks:
            return None
        return part if part in self._of_hooks else self.hook(part)


class Tensor:
    """Shape, strides (elements), dtype and autograd state; no data."""

    __slots__ = (
        "_spec",
        "_use",
        "dtype",
        "nbytes",
        "node",
        "numel",
        "requires_grad",
        "shape",
        "slot",
        "storage",
        "strides",
    )

    def __init__(self, shape: Shape, dtype: str, strides: Shape, numel: Dim, storage: Storage) -> None:
        self.shape = shape
        self.dtype = dtype
        self.strides = strides
        self.numel = numel
        self.nbytes = numel * ITEMSIZE[dtype]  # of the elements
        self.storage = storage
        self.requires_grad = False
        self.node: Node | None = None
        self.slot = 0
        self._spec: Spec | None = None
        self._use: Use | None = None

    @property
    def spec(self) -> Spec:
        """What an op sees of the tensor: made once, however many ops do."""
        if self._spec is None:
            self._spec = Spec(self.dtype, self.shape)
        return self._spec

    @property
    def use(self) -> Use:
        """How an op uses its memory, of which a tensor that ops have seen keeps its block."""
        if self._use is None:
            self._use = Use(self.storage.number, self.nbytes, self.shape, self.strides)
        return self._use

    @property
    def is_floating(self) -> bool:
        """Whether the dtype can carry gradients."""
        return self.dtype in FLOATING

    def alias(self) -> "Tensor":
        """The same memory, cut off from the graph (`detach`, a saved output)."""
        return Tensor(self.shape, self.dtype, self.strides, self.numel, self.storage)


class Parameter(Tensor):
    """A weight; `count` identical layers hold one each. `kind`: weight, bias, norm, embedding, adapter or scale.

    `elements` is how many parameters of the model it stands for: packed 4-bit weights hold two a byte, scales none.
    `embeds` says whether it is an `nn.Embedding`'s, as a copy of one that trains beside adapters is, too.
    `passing` says that a forward pass makes it anew, so that no gradient of an earlier one is there.
    `hosted` says that it lives in the host's memory. `arrived` is called with each gradient once it is added to those
    that are there. `placement` is how its gradient lies, where that is not as it does
    itself (`tape.packages.sequence`).
    """

    __slots__ = (
        "accumulator", "arrived", "count", "elements", "embeds", "grad", "hosted", "kind", "name", "part", "passing",
        "placement", "used",
    )  # fmt: skip

    def __init__(self, name: str, shape: Shape, dtype: str, *, kind: str, trainable: bool) -> None:
        numel = product(shape)
        super().__init__(shape, dtype, contiguous_strides(shape), numel, Storage(0, None))
        self.name = name
        self.kind = kind
        self.requires_grad = trainable
        self.elements = numel
        self.embeds = kind == "embedding"
        self.count = 1
        self.grad: Tensor | None = None
        self.accumulator: weakref.ref[Node] | None = None
        self.part: Part | None = None
        self.passing = False
        self.hosted = False
        self.arrived: Callable[[Tensor], Any] | None = None
        self.placement: Any = None
        self.used = False  # whether a gradient ever arrived

    def copy(self) -> "Parameter":
        """A parameter that has all that this one has."""
        made = Parameter.__new__(Parameter)
        for name in (*Tensor.__slots__, *Parameter.__slots__):
            setattr(made, name, getattr(self, name))
        return made


class Node:
    """One step of the reverse pass: which inputs need a gradient, what was saved, and the rule.

    Attributes:
        needs: for every input of the forward op, whether it needs a gradient.
        attrs: what the rule needs besides saved tensors (shapes, scalars).
        edges: for every input that does, the node that its gradient goes to and which of its outputs it is.
        owner: on whose account the forward op ran, and so the rule runs.
        frames: the checkpoints around the op (`tape.checkpoint`), innermost last.
        region: that of the op (`Flow.regions`).
    """

    __slots__ = (
        "__weakref__", "attrs", "backward", "edges", "frames", "name", "needs", "outputs", "owner", "part", "region",
        "saved", "sequence",
    )  # fmt: skip

    def __init__(
        self, name: str, needs: tuple[bool, ...], edges: tuple["Edge | None", ...], backward: Backward,
        attrs: tuple[Any, ...], tape: "RecordingTape",
    ) -> None:  # fmt: skip
        self.name = name
        self.backward = backward
        self.attrs = attrs
        self.needs = needs
        self.edges = edges
        self.outputs: list[tuple[Shape, str]] = []
        self.saved: list[Any] = []
        self.part: Part = tape.part
        self.owner = tape.owner
        self.frames = tape.frames
        self.region = tape.flow.region if tape.flow is not None else None
        tape.sequence += 1
        self.sequence: float = tape.sequence

    def save(self, *tensors: Tensor | None) -> None:
        """Keep tensors for the rule; call before the op runs for its inputs, after for its outputs."""
        frames = self.frames
        for t in tensors:
            if t is None:
                self.saved.append(None)
            elif frames:
                self.saved.append(frames[-1].pack(t))
            else:
                self.saved.append(t)

    def save_output(self, t: Tensor) -> None:
        """Keep an output of this very node (without a reference cycle)."""
        self.save(t.alias())

    def unpack(self) -> list[Any]:
        """The saved tensors, recomputed where a checkpoint dropped them."""
        return [s.unpack() if isinstance(s, Holder) else s for s in self.saved]

    def produces(self, *outputs: Tensor) -> None:
        """Declare the forward op's outputs."""
        for t in outputs:
            t.node, t.slot, t.requires_grad = self, len(self.outputs), True
            self.outputs.append((t.shape, t.dtype))


class Holder:
    """The place of a saved tensor that a checkpoint frame dropped."""

    __slots__ = ("__weakref__", "frame", "index")

    def __init__(self, frame: "Frame", index: int) -> None:
        self.frame = frame
        self.index = index

    def unpack(self) -> Tensor:
        """The recomputed tensor, given away once."""
        return self.frame.take(self.index)


class Frame(Protocol):
    """A checkpoint that gives dropped tensors back."""

    def take(self, index: int) -> Tensor:
        """The recomputed tensor of that place."""
