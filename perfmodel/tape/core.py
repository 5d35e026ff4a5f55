"""The tape that records what is done with tensors, and the global state of PyTorch that it stands for.

Forward passes are written with the local variables of the original: since memory dies with its last tensor, peak memory
follows without any bookkeeping by hand.
"""

import sys
from _thread import RLock  # as functools has it: all of `threading` takes a millisecond of a cold start
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from itertools import count
from typing import Any, ParamSpec, Protocol, TypeVar

from ..program.dims import Dim, Shape, contiguous_strides, product
from ..program.dtypes import ITEMSIZE
from ..program.op import PLAIN, Attrs, Op, Spec
from ..program.part import HostWork, Part
from ..program.ranks import Ranks
from ..program.software import CURRENT, SoftwareStack
from ..program.streams import MAIN, Run
from .tensor import Flow, LayerRunStart, Node, Parameter, Storage, Tensor

P = ParamSpec("P")
R = TypeVar("R")
_regions = count()


class Wrapping(Protocol):
    """What runs around a model, its blocks, and its modules beside them: the hooks of a program of several GPUs."""

    @property
    def everyone(self) -> Ranks | None:
        """The GPUs that have samples of their own; None where nothing is exchanged."""

    @property
    def inside(self) -> bool:
        """Whether hooks are the modules' own, which a call of the model meets that is not wrapped."""
        return True

    @property
    def reference(self) -> "Wrapping | None":
        """The hooks around a frozen model beside the one that trains, None where it has none."""

    def begin(self) -> None:
        """Before a call of the model."""

    def end(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Behind a call of the model: what it gives, hooked."""
        return outputs

    def block(self, path: str, run: Callable[[Tensor], Any], x: Tensor) -> Any:
        """Run the block of that path between the hooks."""
        return run(x)

    def module(self, path: str, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Run the embedding of the words, a norm or the head."""
        return run(x)

    def weight(self, p: Parameter) -> Tensor:
        """What there is of a parameter that is about to be used beside its module: of an adapter, or of a head."""
        return p


class Tape:
    """Records ops into parts. `device` is "cpu" or "cuda" (their dispatch differs in a few places); `capability` is the
    CUDA compute capability and `stack` the versions of the software, which decide the attention kernel.

    `autocast` is the 16-bit dtype inside `torch.autocast`, or None. Everything that follows PyTorch's global state
    (grad mode, autocast's weight cache, checkpoint frames) lives here, and the training loop's variable `loss`, whose
    graph lives until the next forward pass has made another. `owner` and `recomputing` go onto every op. `on_gradient`
    takes every parameter's complete gradient away, as a hook that PyTorch runs after it is accumulated; one that leaves
    it there is `after_gradient`. `wrapping` runs around every block; then the lowest and the highest one of a run of
    like blocks are parts of their own. `buffer_dtype` is what modules keep their buffers in where it is not the dtype
    that their weights are used in; `buffers` are those that were seen. `input_dtype` is what floats that
    blocks are given are cast to (FSDP2's `cast_forward_inputs`), None: they stay. `view_replay` is how autograd treats
    a view that is changed in place: as for tensor subclasses (fake tensors), or plain tensors; fake ones also have a
    layer norm's statistics in another dtype.

    `alike` says whether further micro-batches do the same as the one that is recorded, but for adding their gradients
    to those that are there: then its parts also get the ops that do, marked `Attrs.later`, and where no `flow` is
    followed, the memory of further micro-batches.
    """

    def __init__(
        self,
        device: str = "cuda",
        capability: str = "8.0",
        stack: SoftwareStack = CURRENT,
        *,
        autocast: str | None = None,
        view_replay: bool = False,
    ) -> None:
        self.view_replay = view_replay
        self.device = device
        self.capability = capability
        self.stack = stack
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
        self.twins: dict[Part, Part] = {}
        self.flow: Flow | None = None
        self.beside = False  # whether a hook runs (`hooked`)
        self.on_gradient: Callable[[Parameter, Tensor], None] | None = None
        self.after_gradient: Callable[[Parameter], None] | None = None
        self.wrapping: Wrapping | None = None
        self.buffer_dtype: str | None = None
        self.input_dtype: str | None = None
        self.buffers: list[Spec] = []
        self.context: Any = None  # ranks that share a sequence (`tape.packages.ring`, `tape.packages.ulysses`)
        self.linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None  # in the place of `F.linear`
        self.alike, self.kept = False, dict[Any, Dim]()  # bytes that packages keep for good, by what they are of
        self.entering: dict[Part, LayerRunStart] = {}  # by a run of layers, forward or back
        self.handed: dict[int, Part | None] = {}  # block's number -> the run that it enters, None: that it left
        self.lingering: list[Storage] = []  # what all layers of the current run held
        self.graph_dies = False  # and with it what its nodes still hold, of all layers of repeated parts
        self.renewed: tuple[Part, Dim] | None = None  # the part that made the loss, and its peak before

    def renew(self, loss: Tensor) -> None:
        """`loss = …`: the graph of the last micro-batch dies here."""
        self.drop_graph(loss)
        later = self.part.later
        if later is not None:
            self.renewed = self.part, later.peak
            later.highest = later.delta

    def drop_graph(self, loss: Tensor | None) -> None:
        """Another takes the place of the variable `loss`, or none."""
        self.graph_dies = True
        self.loss = loss
        self.graph_dies = False

    def begin(self, name: str, phase: str) -> Part:
        """Start a new part."""
        self.part = Part(name, phase, later=self._later(name, phase))
        self.parts.append(self.part)
        self.lingering.clear()
        return self.part

    def _later(self, name: str, phase: str) -> Part | None:
        return Part(name, phase) if self.alike and self.flow is None else None

    @property
    def alone(self) -> frozenset[int]:
        """Blocks that are like no other to a compiler."""
        return frozenset() if self.flow is None or self.flow.cuts is None else self.flow.cuts.alone

    def enter_block(self, layer: int | None, *, whole: bool = False) -> None:
        """A block begins, to a compiler one call if it is `whole`; None: it has ended."""
        if self.flow is not None and self.flow.cuts is not None:
            self.flow.cuts.enter(layer, whole=whole)

    def enter(self, part: Part, x: Tensor) -> None:
        """A run of identical layers begins with its input."""
        self.entering[part] = LayerRunStart(x.storage.number, Storage(0, None).number)
        if self.flow is None:
            self.handed[x.storage.number] = part

    def leave(self, part: Part, x: Tensor, period: int) -> None:
        """A run of identical layers, or of patterns of `period` layers, ends with its output."""
        if self.flow is None:
            self.handed[x.storage.number] = None
        else:
            self.flow.carry(part, (self.entering[part].input, x.storage.number), period)

    def backward_of(self, part: Part) -> None:
        """Switch to the part that holds the backward ops of a forward part."""
        if part.phase != "forward":
            return
        twin = self.twins.get(part)
        if twin is None:
            later = self._later(part.name, "backward")
            twin = Part(part.name, "backward", part.repeat, host=HostWork(returns=part.host.weights), later=later)
            self.twins[part] = twin
            self.parts.append(twin)
            if part in self.entering:
                self.entering[twin] = self.entering[part]
            if self.flow is not None:
                self.flow.twins[twin] = part
        elif twin is not self.part and self.parts[-1] is not twin:
            raise AssertionError(f"backward returned to {part.name} after leaving it")
        if twin is not self.part:
            self.part = twin
            self.lingering.clear()

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
        if sys.getrefcount(storage) > 2:  # beside the argument and this frame's own
            storage.copies = 1
        del storage


def region(run: Callable[P, R]) -> Callable[P, R]:
    """A function that is compiled as a program of its own where a compiled model falls apart (`Flow.apart`)."""

    @wraps(run)
    def within(*args: P.args, **options: P.kwargs) -> R:
        flow = _current[-1].flow
        if flow is None or not flow.apart or flow.region is not None:
            return run(*args, **options)
        flow.region = next(_regions)
        try:
            return run(*args, **options)
        finally:
            flow.region = None

    return within


def begin_region() -> None:
    """From here on what is recorded is a program of its own where a compiled model falls apart, up to `end_region`."""
    if (flow := _current[-1].flow) is not None and flow.apart:
        flow.region = next(_regions)


def end_region() -> None:
    """What follows is of no such program."""
    if (flow := _current[-1].flow) is not None:
        flow.region = None


def hooked(run: Callable[P, R]) -> Callable[P, R]:
    """A function that is no part of the model: where that is compiled, it stays as it is, beside it (`Flow.hooks`)."""

    @wraps(run)
    def beside(*args: P.args, **options: P.kwargs) -> R:
        current = _current[-1]
        if current.flow is None or current.beside:
            return run(*args, **options)
        part, current.part, current.beside = current.part, current.flow.hook(current.part), True
        if part in current.entering:
            current.entering[current.part] = current.entering[part]
        region, current.flow.region = current.flow.region, None
        try:
            return run(*args, **options)
        finally:
            current.part, current.beside, current.flow.region = part, False, region

    return beside


# Held by the thread that records or traces, or has changed what a process has once (the cycle collector, PyTorch's
# modules), until all is as it was: others wait.
ONE_AT_A_TIME = RLock()
_current: list[Tape] = []


def tape() -> Tape:
    """The tape that is recording."""
    return _current[-1]


@contextmanager
def recording(new: Tape) -> Iterator[Tape]:
    """Make a tape the current one; a thread waits while another records."""
    with ONE_AT_A_TIME:
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
    name: str,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    attrs: Attrs = PLAIN,
    *,
    view: bool = False,
    runs: Run = MAIN,
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
        runs=runs,
    )
    append_op(op, inputs, outputs)


def append_op(op: Op, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Append an op that was made by hand (its specs stand for several tensors) to the current part."""
    current = _current[-1]
    op.owner, op.recompute = current.owner, current.recomputing
    if current.flow is not None:
        op.reads = tuple([t._use or t.use for t in inputs])
        op.writes = tuple([t._use or t.use for t in outputs])
        if current.flow.region is not None:
            current.flow.regions[op] = current.flow.region
    current.part.ops.append(op)


def emit(
    name: str,
    inputs: Sequence[Tensor],
    shape: Shape,
    dtype: str,
    *,
    strides: Shape | None = None,
    node: Node | None = None,
    attrs: Attrs = PLAIN,
) -> Tensor:
    """Record an op with one new output, which `node` (if any) will differentiate."""
    out = new_tensor(shape, dtype, strides)
    record(name, inputs, (out,), attrs)
    if node is not None:
        node.produces(out)
    return out
