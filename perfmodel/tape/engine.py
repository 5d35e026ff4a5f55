"""Reverse pass with the semantics of PyTorch's engine.

Nodes run in reverse order of their creation as soon as all their gradients have arrived, or none will, leaves at once,
in order of their edges; a second gradient for the same place is added at once; a gradient is reduced to its tensor's
shape and cast to its dtype (`validate_outputs`).

Sources: torch/csrc/autograd/engine.cpp, input_buffer.cpp.
"""

import heapq
from itertools import count

from ..program.dims import Shape, same_shape
from .core import tape
from .pointwise import add, cast, sum_to
from .tensor import Node, Tensor


def _validate(grads: list[Tensor | None], i: int, shape: Shape, dtype: str) -> None:
    """Give a gradient its tensor's shape and dtype, in place: the unreduced one dies at once."""
    grad = grads[i]
    if grad is None or (grad.shape is shape and grad.dtype == dtype):
        return
    if not same_shape(grad.shape, shape):
        grads[i] = grad = sum_to(grad, shape)
    if grad.dtype != dtype:
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
    heapq.heappush(ready, (-root.node.sequence, next(arrivals), root.node))
    current = tape()
    with current.no_grad(), current.belonging_to(current.owner):
        while ready:
            node = heapq.heappop(ready)[2]
            if node.name != "AccumulateGrad":  # runs where the last of its gradient arrives
                current.backward_of(node.part)
                if current.flow is not None:
                    current.flow.region = node.region
            current.owner = node.owner
            current.part.host.nodes += 1
            outputs = _call(node, buffers.take(node)) if id(node) in buffers.grads else _nothing(node)
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
                if dependencies[id(target)] == 0:
                    heapq.heappush(ready, (-target.sequence, next(arrivals), target))
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


def _nothing(node: Node) -> list[Tensor | None]:
    """What a node hands down to which no gradient came, of an output that nobody used."""
    node.saved = []
    return [None] * len(node.edges)


class Buffers:
    """Gradients on their way to nodes; a sum that would not be there without an adapter is the adapter's."""

    def __init__(self) -> None:
        self.grads: dict[int, list[Tensor | None]] = {}
        self.adapters_only: set[tuple[int, int]] = set()  # places where only gradients of adapters wait
        self.regions: dict[tuple[int, int], int | None] = {}  # of the gradients that wait (`Flow.regions`)

    def deliver(self, target: Node, slot: int, grad: Tensor) -> None:
        """Keep a gradient for an output of `target`, or add it to the one that waits there."""
        current, place = tape(), (id(target), slot)
        buffer = self.grads.setdefault(id(target), [None] * len(target.outputs))
        waiting = buffer[slot]
        if waiting is None:
            buffer[slot] = grad
            if current.flow is not None:
                self.regions[place] = current.flow.region
            if current.owner == "adapter":
                self.adapters_only.add(place)
            return
        with current.belonging_to("adapter" if place in self.adapters_only else current.owner):
            if current.flow is None:
                buffer[slot] = add(waiting, grad)
            else:
                here, current.flow.region = current.flow.region, self._region(place, target, current.flow.region)
                buffer[slot] = add(waiting, grad)
                current.flow.region = here
        if current.owner != "adapter":
            self.adapters_only.discard(place)

    def _region(self, place: tuple[int, int], target: Node, here: int | None) -> int | None:
        """That of a sum: where both come from one region it is made there, else where the tensor was, or in neither."""
        if self.regions[place] == here:
            return here
        return here if target.region == here and target.name != "AccumulateGrad" else None

    def take(self, node: Node) -> list[Tensor | None]:
        """Hand a node its gradients."""
        grads = self.grads.pop(id(node))
        if self.adapters_only:
            self.adapters_only.difference_update([(id(node), slot) for slot in range(len(grads))])
        return grads
