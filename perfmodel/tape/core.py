"""Tensors without data, the tape that records what is done with them, and the memory that they hold.

A tensor's memory lives exactly as long as the tensor does: a `Storage` that nobody refers to any more reports itself
freed, just as PyTorch's reference counting returns a block to the allocator. Forward passes are written with the local
variables of the original, so peak memory follows without any bookkeeping by hand.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

from .dims import Dim, Shape, contiguous_strides, product
from .dtypes import FLOATING, ITEMSIZE
from .op import Op, Part, Spec, Use

if TYPE_CHECKING:
    from .autograd import Node


class Storage:
    """A block of memory. `copies` > 1: the block stands for that many when it is freed outside its repeated part.

    `heir` is the block that stays in its place; it dies in further micro-batches only (`Tape.alike`).
    """

    __slots__ = ("__weakref__", "copies", "heir", "nbytes", "number", "tape")

    def __init__(self, nbytes: Dim, tape: "Tape | None") -> None:
        self.nbytes = nbytes
        self.tape = tape
        self.copies = 1
        self.heir: Storage | None = None
        self.number = next(_numbers)

    def inherited(self) -> "Storage":
        """Its heir, made on first use."""
        if self.heir is None:
            self.heir = Storage(self.nbytes, self.tape)
        return self.heir

    def __del__(self) -> None:
        if self.tape is not None:
            part = self.tape.part if self.heir is None else self.tape.part.later
            if part is not None:
                part.free(self.nbytes * self.copies)
            if self.tape.flow is not None:
                self.tape.flow.live.discard(self.number)


_numbers = count()


@dataclass
class Flow:
    """What a tape remembers of a pass forward and back for passes that rewrite its ops.

    Attributes:
        live: blocks of memory that are in use.
        carried: for each run of identical layers, by the id of its part, the blocks of its input and output.
        twins: for each backward part, by its id, the forward part whose ops it differentiates.
    """

    live: set[int] = field(default_factory=set)
    carried: dict[int, tuple[int, int]] = field(default_factory=dict)
    twins: dict[int, Part] = field(default_factory=dict)


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
    `passing` says that a forward pass makes it anew, so that no gradient of an earlier one is there.
    """

    __slots__ = ("accumulator", "count", "elements", "grad", "kind", "name", "part", "passing", "used")

    def __init__(self, name: str, shape: Shape, dtype: str, *, kind: str, trainable: bool) -> None:
        numel = product(shape)
        super().__init__(shape, dtype, contiguous_strides(shape), numel, Storage(0, None))
        self.name = name
        self.kind = kind
        self.requires_grad = trainable
        self.elements = numel
        self.count = 1
        self.grad: Tensor | None = None
        self.accumulator: weakref.ref[Node] | None = None
        self.part: Part | None = None
        self.passing = False
        self.used = False  # whether a gradient ever arrived

    def copy(self) -> "Parameter":
        """A parameter that has all that this one has."""
        made = Parameter.__new__(Parameter)
        for name in (*Tensor.__slots__, *Parameter.__slots__):
            setattr(made, name, getattr(self, name))
        return made


class Tape:
    """Records ops into parts. `device` is "cpu" or "cuda" (their dispatch differs in a few places); `capability` is the
    CUDA compute capability, which decides the attention kernel.

    `autocast` is the 16-bit dtype inside `torch.autocast`, or None. Everything that follows PyTorch's global state
    (grad mode, autocast's weight cache, checkpoint frames) lives here, and the training loop's variable `loss`, whose
    graph lives until the next forward pass has made another. `owner` and `recomputing` go onto every op. `on_gradient`
    takes every parameter's complete gradient away, as a hook that PyTorch runs after it is accumulated.

    `alike` says whether further micro-batches do the same as the one that is recorded, but for adding their gradients
    to those that are there: then its parts also get the ops that do, with the attribute `LATER`, and where no `flow` is
    followed, the memory of further micro-batches.
    """

    def __init__(self, device: str = "cuda", capability: str = "8.0", *, autocast: str | None = None) -> None:
        self.device = device
        self.capability = capability
        self.autocast_dtype = autocast
        self.autocast: str | None = None
        self.cast_cache: dict[int, tuple[Tensor, Tensor]] = {}
        self.grad_enabled = True
        self.loss: Tensor | None = None
        self.owner = "base"
        self.recomputing = False
        self.frames: list[Any] = []
        self.sequence = 0
        self.parts: list[Part] = []
        self.part = Part("start", "forward")
        self.twins: dict[int, Part] = {}
        self.flow: Flow | None = None
        self.on_gradient: Callable[[Parameter, Tensor], None] | None = None
        self.alike = False
        self.renewed: tuple[Part, Dim] | None = None  # the part that made the loss, and its peak before

    def renew(self, loss: Tensor) -> None:
        """`loss = …`: the graph of the last micro-batch dies here."""
        self.loss = loss
        later = self.part.later
        if later is not None:
            self.renewed = self.part, later.peak
            later.highest = later.delta

    def begin(self, name: str, phase: str) -> Part:
        """Start a new part."""
        self.part = Part(name, phase, later=self._later(name, phase))
        self.parts.append(self.part)
        return self.part

    def _later(self, name: str, phase: str) -> Part | None:
        return Part(name, phase) if self.alike and self.flow is None else None

    def backward_of(self, part: Part) -> None:
        """Switch to the part that holds the backward ops of a forward part."""
        if part.phase != "forward":
            return
        twin = self.twins.get(id(part))
        if twin is None:
            later = self._later(part.name, "backward")
            twin = Part(part.name, "backward", part.repeat, returns=part.weights, later=later)
            self.twins[id(part)] = twin
            self.parts.append(twin)
            if self.flow is not None:
                self.flow.twins[id(twin)] = part
        elif twin is not self.part and self.parts[-1] is not twin:
            raise AssertionError(f"backward returned to {part.name} after leaving it")
        self.part = twin

    @contextmanager
    def no_grad(self) -> Iterator[None]:
        """Record without building a graph."""
        before, self.grad_enabled = self.grad_enabled, False
        try:
            yield
        finally:
            self.grad_enabled = before

    @contextmanager
    def belonging_to(self, owner: str) -> Iterator[None]:
        """Record ops, forward and backward, on account of `owner`."""
        before, self.owner = self.owner, owner
        try:
            yield
        finally:
            self.owner = before

    @contextmanager
    def recomputation(self) -> Iterator[None]:
        """Record a block's forward again, in backward; its scopes say whose the ops are."""
        before, self.recomputing = self.recomputing, True
        try:
            with self.belonging_to("base"):
                yield
        finally:
            self.recomputing = before

    @contextmanager
    def autocasting(self) -> Iterator[None]:
        """`torch.autocast`: on leaving, the cached 16-bit weights are dropped."""
        before, self.autocast = self.autocast, self.autocast_dtype
        try:
            yield
        finally:
            self.autocast = before
            if before is None:
                self.drop_cast_cache(all_layers=True)

    def drop_cast_cache(self, *, all_layers: bool) -> None:
        """Forget the cached casts: those of all layers at the end of the forward, or those of one recomputed block."""
        held = [
            (cast, leaf.part if all_layers and isinstance(leaf, Parameter) else None)
            for leaf, cast in self.cast_cache.values()
        ]
        self.cast_cache.clear()
        release(held)


def release(held: list[tuple[Tensor, Part | None]]) -> None:
    """Let go of tensors that nobody else should need, each with the part that made it, and empty the list.

    Where this was the last reference, the copies of all layers of that part die here; what something else still holds
    (a graph saved it) dies later, layer by layer.
    """
    while held:
        t, part = held.pop()
        storage = t.storage
        storage.copies = part.repeat if part is not None else 1
        del t
        if _references(storage) > 1:
            storage.copies = 1
        del storage


def _references(storage: Storage) -> int:
    import sys

    return sys.getrefcount(storage) - 2  # the argument and this frame's own reference


_current: list[Tape] = []


def tape() -> Tape:
    """The tape that is recording."""
    return _current[-1]


@contextmanager
def recording(new: Tape) -> Iterator[Tape]:
    """Make a tape the current one."""
    _current.append(new)
    try:
        yield new
    finally:
        _current.pop()


def new_tensor(shape: Shape, dtype: str, strides: Shape | None = None) -> Tensor:
    """A freshly allocated tensor."""
    current = _current[-1]
    numel = product(shape)
    nbytes = numel * ITEMSIZE[dtype]
    current.part.allocate(nbytes)
    storage = Storage(nbytes, current)
    if current.flow is not None:
        current.flow.live.add(storage.number)
    return Tensor(shape, dtype, contiguous_strides(shape) if strides is None else strides, numel, storage)


def _distinct_bytes(tensors: Sequence[Tensor]) -> Dim:
    if len(tensors) == 1:
        return tensors[0].nbytes
    if len(tensors) == 2 and tensors[0] is not tensors[1]:
        return tensors[0].nbytes + tensors[1].nbytes
    return sum([t.nbytes for t in dict.fromkeys(tensors)])


def record(
    name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], attrs: tuple[Any, ...] = (), *, view: bool = False
) -> None:
    """Append an op to the current part."""
    op = Op(
        name,
        tuple([t._spec or t.spec for t in inputs]),
        tuple([t._spec or t.spec for t in outputs]),
        0 if view else _distinct_bytes(inputs),
        0 if view else outputs[0].nbytes if len(outputs) == 1 else sum([t.nbytes for t in outputs]),
        view=view,
        attrs=attrs,
    )
    append(op, inputs, outputs)


def append(op: Op, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Append an op that was made by hand (its specs stand for several tensors) to the current part."""
    current = _current[-1]
    op.owner, op.recompute = current.owner, current.recomputing
    if current.flow is not None:
        op.reads = tuple([t._use or t.use for t in inputs])
        op.writes = tuple([t._use or t.use for t in outputs])
    current.part.ops.append(op)


def emit(
    name: str,
    inputs: Sequence[Tensor],
    shape: Shape,
    dtype: str,
    *,
    strides: Shape | None = None,
    node: "Node | None" = None,
    attrs: tuple[Any, ...] = (),
) -> Tensor:
    """Record an op with one new output, which `node` (if any) will differentiate."""
    out = new_tensor(shape, dtype, strides)
    record(name, inputs, (out,), attrs)
    if node is not None:
        node.produces(out)
    return out
