"""The graph that autograd builds beside the forward pass: who differentiates what, and where a leaf's gradient goes.

A leaf's first gradient is kept as it is, a later one added to it. Saved tensors die with the node that saved them.

Sources: torch/csrc/autograd/functions/accumulate_grad.h, torch/csrc/autograd/function.h.
"""

import weakref
from collections.abc import Sequence
from typing import Any

from ..program.dims import dense_order, is_one, same
from ..program.op import PLAIN, Attrs
from .core import new_tensor, record, tape
from .tensor import Backward, Edge, Grads, Node, Parameter, Tensor


def differentiate(name: str, inputs: Sequence[Tensor], backward: Backward, attrs: tuple[Any, ...] = ()) -> Node | None:
    """A node for an op, or None if nothing asks for a gradient."""
    if not tape().grad_enabled:
        return None
    for t in inputs:
        if t.requires_grad:
            needs = tuple([t.requires_grad for t in inputs])
            edges = tuple([_edge(t) if t.requires_grad else None for t in inputs])
            return Node(name, needs, edges, backward, attrs, tape())
    return None


def _edge(t: Tensor) -> Edge:
    flow = tape().flow
    if flow is not None and flow.cuts is not None:
        flow.cuts.use(t)
    if t.node is not None:
        return t.node, t.slot
    if isinstance(t, Parameter):
        known = t.accumulator() if t.accumulator is not None else None
        if known is None:
            known = node = Node("AccumulateGrad", (), (), _accumulate, (t,), tape())
            node.sequence = float("inf")  # the engine runs it as soon as its gradient is complete
            node.outputs.append((t.shape if t.placement is None else t.placement.shape(t.shape), t.dtype))
            if t.part is not None:
                node.part = t.part
            t.accumulator = weakref.ref(node)  # weak, as in PyTorch: the graph holds the node, the node its leaf
        return known, 0
    node = Node("AccumulateGrad", (), (), _keep, (t.alias(),), tape())  # holds its leaf, as PyTorch's does
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
    if parameter.arrived is not None and parameter.grad is not None:
        parameter.arrived(parameter.grad)
    if current.after_gradient is not None:
        current.after_gradient(parameter)
    return ()


def _foresee(parameter: Parameter, grad: Tensor, settled: Tensor) -> None:
    """What a further micro-batch does with a gradient that stays here: adds it to this one, and lets it go."""
    current = tape()
    current.alike &= settled is grad
    if current.alike:
        assert parameter.grad is not None
        _add_to(parameter.grad, grad, parameter.kind, Attrs(later=True))
        if current.flow is None:
            parameter.grad.storage = grad.storage.inherited()


def _add_to(sum: Tensor, grad: Tensor, kind: str, attrs: Attrs = PLAIN) -> None:
    with tape().belonging_to("adapter" if kind == "adapter" else "accumulation"):
        record("add_.Tensor", (sum, grad), (sum,), attrs)


def _settled(grad: Tensor, leaf: Tensor) -> Tensor:
    """The gradient as a leaf keeps it: copied unless it lies in memory as the leaf does, or is of more than it."""
    if isinstance(leaf, Parameter) and leaf.placement is not None:
        return grad
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
