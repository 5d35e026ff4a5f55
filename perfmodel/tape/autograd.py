"""Reverse pass with the semantics of PyTorch's engine.

Nodes run in reverse order of their creation as soon as all their gradients have arrived; a second gradient for the same
place is added at once; a gradient is reduced to its tensor's shape and cast to its dtype (`validate_outputs`); a leaf's
first gradient is kept as it is, a later one added to it. Saved tensors die with the node that saved them.

Sources: torch/csrc/autograd/engine.cpp, input_buffer.cpp, functions/accumulate_grad.h, torch/utils/checkpoint.py.
"""

import heapq
import weakref
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

from .core import Parameter, Tensor, new_tensor, record, tape
from .dims import Shape, dense_order, is_one, same, same_shape
from .op import LATER, Part

Grads = tuple[Tensor | None, ...]
Backward = Callable[["Node", Sequence[Tensor | None]], Grads]


class Node:
    """One step of the reverse pass: which inputs need a gradient, what was saved, and the rule.

    Attributes:
        needs: for every input of the forward op, whether it needs a gradient.
        attrs: what the rule needs besides saved tensors (shapes, scalars).
        owner: on whose account the forward op ran, and so the rule runs.
    """

    __slots__ = (
        "__weakref__", "attrs", "backward", "edges", "name", "needs", "outputs", "owner", "part", "saved", "sequence",
    )  # fmt: skip

    def __init__(self, name: str, inputs: Sequence[Tensor], backward: Backward, attrs: tuple[Any, ...]) -> None:
        current = tape()
        self.name = name
        self.backward = backward
        self.attrs = attrs
        self.needs = tuple([t.requires_grad for t in inputs])
        self.edges = tuple([_edge(t) if t.requires_grad else None for t in inputs])
        self.outputs: list[tuple[Shape, str]] = []
        self.saved: list[Any] = []
        self.part: Part = current.part
        self.owner = current.owner
        current.sequence += 1
        self.sequence: float = current.sequence

    def save(self, *tensors: Tensor | None) -> None:
        """Keep tensors for the rule; call before the op runs for its inputs, after for its outputs."""
        frames = tape().frames
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


def differentiate(name: str, inputs: Sequence[Tensor], backward: Backward, attrs: tuple[Any, ...] = ()) -> Node | None:
    """A node for an op, or None if nothing asks for a gradient."""
    if not tape().grad_enabled:
        return None
    for t in inputs:
        if t.requires_grad:
            return Node(name, inputs, backward, attrs)
    return None


def _edge(t: Tensor) -> tuple[Node, int]:
    if t.node is not None:
        return t.node, t.slot
    if isinstance(t, Parameter):
        known = t.accumulator() if t.accumulator is not None else None
        if known is None:
            known = node = Node("AccumulateGrad", (), _accumulate, (t,))
            node.sequence = float("inf")  # the engine runs it as soon as its gradient is complete
            node.outputs.append((t.shape, t.dtype))
            if t.part is not None:
                node.part = t.part
            t.accumulator = weakref.ref(node)  # weak, as in PyTorch: the graph holds the node, the node its leaf
        return known, 0
    node = Node("AccumulateGrad", (), _keep, (t.alias(),))  # holds its leaf, as PyTorch's does
    node.sequence = float("inf")
    node.outputs.append((t.shape, t.dtype))
    t.node = node
    return node, 0


def _accumulate(node: Node, grads: Sequence[Tensor | None]) -> Grads:
    (parameter,) = node.attrs
    (grad,) = grads
    assert grad is not None
    parameter.used = True
    current = tape()
    if current.on_gradient is not None:
        current.on_gradient(parameter, _settled(grad, parameter))
    elif parameter.grad is None:
        settled = _settled(grad, parameter)
        parameter.grad = settled.alias()
        if not parameter.passing:
            _foresee(parameter, grad, settled)
        if parameter.part is not None:  # one of as many as there are identical layers
            parameter.grad.storage.copies = parameter.part.repeat
    else:
        current.alike = False  # more than one gradient in a micro-batch
        _add_to(parameter.grad, grad, parameter.kind)
    return ()


def _foresee(parameter: Parameter, grad: Tensor, settled: Tensor) -> None:
    """What a further micro-batch does with a gradient that stays here: adds it to this one, and lets it go."""
    current = tape()
    current.alike &= settled is grad
    if current.alike:
        assert parameter.grad is not None
        _add_to(parameter.grad, grad, parameter.kind, LATER)
        if current.flow is None:
            parameter.grad.storage = grad.storage.inherited()


def _add_to(sum: Tensor, grad: Tensor, kind: str, *attrs: str) -> None:
    with tape().belonging_to("adapter" if kind == "adapter" else "accumulation"):
        record("add_.Tensor", (sum, grad), (sum,), attrs)


def _settled(grad: Tensor, leaf: Tensor) -> Tensor:
    """The gradient as a leaf keeps it: copied unless it lies in memory as the leaf does."""
    alike = dense_order(grad.shape, grad.strides) is not None and all(
        is_one(d) or same(a, b) for d, a, b in zip(grad.shape, grad.strides, leaf.strides, strict=True)
    )
    return grad if alike else copy(grad)


def _keep(node: Node, grads: Sequence[Tensor | None]) -> Grads:
    (leaf,), (grad,) = node.attrs, grads
    assert grad is not None
    node.saved.append(_settled(grad, leaf))
    return ()


def copy(grad: Tensor) -> Tensor:
    """A contiguous copy as C++ code of autograd makes it."""
    made = new_tensor(grad.shape, grad.dtype)
    record("new_empty_strided", (grad,), (made,))
    record("copy_", (made, grad), (made,))
    return made


def _validate(grads: list[Tensor | None], i: int, shape: Shape, dtype: str) -> None:
    """Give a gradient its tensor's shape and dtype, in place: the unreduced one dies at once."""
    grad = grads[i]
    if grad is None or (grad.shape is shape and grad.dtype == dtype):
        return
    if not same_shape(grad.shape, shape):
        from .pointwise import sum_to

        grads[i] = grad = sum_to(grad, shape)
    if grad.dtype != dtype:
        from .pointwise import cast

        grads[i] = cast(grad, dtype)


def run_backward(root: Tensor, grad: Tensor) -> None:
    """Propagate a gradient from `root` to every leaf that needs one."""
    assert root.node is not None
    dependencies: dict[int, int] = {}
    seen = {id(root.node)}
    stack = [root.node]
    while stack:
        for edge in stack.pop().edges:
            if edge is None:
                continue
            dependencies[id(edge[0])] = dependencies.get(id(edge[0]), 0) + 1
            if id(edge[0]) not in seen:
                seen.add(id(edge[0]))
                stack.append(edge[0])

    buffers = Buffers()
    ready: list[tuple[float, int, Node]] = []
    buffers.deliver(root.node, root.slot, grad)
    del grad, stack
    arrivals = count()
    heapq.heappush(ready, (-root.node.sequence, -next(arrivals), root.node))
    current = tape()
    with current.no_grad(), current.belonging_to(current.owner):
        while ready:
            node = heapq.heappop(ready)[2]
            if node.name != "AccumulateGrad":  # runs where the last of its gradient arrives
                current.backward_of(node.part)
            current.owner = node.owner
            current.part.nodes += 1
            outputs = _call(node, buffers.take(node))
            for i, edge in enumerate(node.edges):
                if edge is None:
                    continue
                target, slot = edge
                out = outputs[i]
                outputs[i] = None
                if out is not None:
                    buffers.deliver(target, slot, out)
                    del out
                dependencies[id(target)] -= 1
                if dependencies[id(target)] == 0 and id(target) in buffers.grads:
                    heapq.heappush(ready, (-target.sequence, -next(arrivals), target))
            del outputs


def _call(node: Node, grads: list[Tensor | None]) -> list[Tensor | None]:
    outputs = list(node.backward(node, grads))
    for i, edge in enumerate(node.edges):
        if edge is None:
            outputs[i] = None
        else:
            _validate(outputs, i, *edge[0].outputs[edge[1]])
    if node.name != "AccumulateGrad":
        node.saved = []  # only now, as in `evaluate_function`
    return outputs


class Buffers:
    """Gradients on their way to nodes; a sum that would not be there without an adapter is the adapter's."""

    def __init__(self) -> None:
        self.grads: dict[int, list[Tensor | None]] = {}
        self.adapters_only: set[tuple[int, int]] = set()  # places where only gradients of adapters wait

    def deliver(self, target: Node, slot: int, grad: Tensor) -> None:
        """Keep a gradient for an output of `target`, or add it to the one that waits there."""
        current, place = tape(), (id(target), slot)
        buffer = self.grads.setdefault(id(target), [None] * len(target.outputs))
        waiting = buffer[slot]
        if waiting is None:
            buffer[slot] = grad
            if current.owner == "adapter":
                self.adapters_only.add(place)
            return
        from .pointwise import add

        with current.belonging_to("adapter" if place in self.adapters_only else current.owner):
            buffer[slot] = add(waiting, grad)
        if current.owner != "adapter":
            self.adapters_only.discard(place)

    def take(self, node: Node) -> list[Tensor | None]:
        """Hand a node its gradients."""
        grads = self.grads.pop(id(node))
        if self.adapters_only:
            self.adapters_only.difference_update([(id(node), slot) for slot in range(len(grads))])
        return grads


class StopRecompute(Exception):
    """All saved tensors of a checkpoint are back: the rest of its forward is not needed."""


class Holder:
    """The place of a saved tensor that a checkpoint frame dropped."""

    __slots__ = ("__weakref__", "frame", "index")

    def __init__(self, frame: "CheckpointFrame", index: int) -> None:
        self.frame = frame
        self.index = index

    def unpack(self) -> Tensor:
        """The recomputed tensor, given away once."""
        return self.frame.take(self.index)


class CheckpointFrame:
    """Non-reentrant checkpoint: remembers the inputs, recomputes on first use, stops at the last saved tensor."""

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor], *, autocast: str | None) -> None:
        self.function = function
        self.inputs = inputs  # held until the last of its saved tensors is released
        self.autocast = autocast
        self.holders: list[weakref.ref[Holder]] = []  # a graph that nobody kept takes its saved tensors along
        self.values: dict[int, Tensor] | None = None

    def pack(self, t: Tensor) -> Holder:
        """Forward: count a saved tensor and let it go."""
        holder = Holder(self, len(self.holders))
        self.holders.append(weakref.ref(holder))
        tape().part.hooks += 1
        return holder

    def take(self, index: int) -> Tensor:
        """Backward: hand a recomputed tensor over."""
        if self.values is None:
            self.values = self._recompute()
        tape().part.hooks += 1
        return self.values.pop(index)

    def _recompute(self) -> dict[int, Tensor]:
        current = tape()
        recorder = _Recomputation([holder() is not None for holder in self.holders])
        current.frames.append(recorder)
        before = current.grad_enabled, current.autocast
        current.grad_enabled, current.autocast = True, self.autocast
        try:
            with current.recomputation():
                self.function(*self.inputs)
        except StopRecompute as stop:
            stop.__traceback__ = None  # its frames hold the block's local tensors
        finally:
            current.grad_enabled, current.autocast = before
            current.frames.pop()
            if current.autocast is None:
                current.drop_cast_cache(all_layers=False)
        return recorder.values


class _Recomputation:
    """Collects what the recomputed forward saves and backward still asks for."""

    def __init__(self, wanted: list[bool]) -> None:
        self.wanted = wanted
        self.seen = 0
        self.values: dict[int, Tensor] = {}

    def pack(self, t: Tensor) -> Tensor:
        tape().part.hooks += 1
        if self.wanted[self.seen]:
            self.values[self.seen] = t.alias()
        self.seen += 1
        if self.seen == len(self.wanted):
            raise StopRecompute
        return t


def _detached(t: Tensor) -> Tensor:
    if isinstance(t, Parameter):
        return t
    copy = t.alias()
    copy.requires_grad = t.requires_grad
    return copy


def checkpoint(function: Callable[..., Tensor], *inputs: Tensor, reentrant: bool = False) -> Tensor:
    """`torch.utils.checkpoint.checkpoint` of a function of tensors with one output."""
    current = tape()
    current.part.checkpoints += 1
    if reentrant:
        return _reentrant(function, inputs)
    frame = CheckpointFrame(function, inputs, autocast=current.autocast)
    current.frames.append(frame)
    try:
        return function(*inputs)
    finally:
        current.frames.pop()


def _reentrant(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
    current = tape()
    node = differentiate("CheckpointFunctionBackward", inputs, _reentrant_backward, (function, current.autocast))
    with current.no_grad():
        out = function(*inputs)
    if node is not None:
        node.save(*inputs)
        node.produces(out)
    return out


def _reentrant_backward(node: Node, grads: Sequence[Tensor | None]) -> Grads:
    function, autocast = node.attrs
    inputs = [_detached(t) for t in node.unpack()]
    current = tape()
    before = current.grad_enabled, current.autocast
    current.grad_enabled, current.autocast = True, autocast
    try:
        with current.recomputation():
            out = function(*inputs)
    finally:
        current.grad_enabled, current.autocast = before
        if current.autocast is None:
            current.drop_cast_cache(all_layers=False)
    (grad,) = grads
    assert grad is not None
    run_backward(out, grad)
    return tuple(t.node.saved.pop() if t.node is not None and t.node.saved else None for t in inputs)
