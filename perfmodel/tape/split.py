"""Taking tensors apart along a dim and putting them together again, each with its backward rule beneath it."""

from collections.abc import Sequence

from .autograd import differentiate
from .core import emit
from .shape import clone, expand, unsqueeze, view, view_as
from .tensor import Grads, Node, Tensor

Grad = Tensor | None


def select(x: Tensor, dim: int) -> Tensor:
    """`x.select(dim, index)`: one slice, a view; its gradient is written into zeros of the whole."""
    dim = dim % len(x.shape)
    shape, strides = (*x.shape[:dim], *x.shape[dim + 1 :]), (*x.strides[:dim], *x.strides[dim + 1 :])
    node = differentiate("SelectBackward0", (x,), _select_backward, (x.shape,))
    return view_as("select.int", x, shape, strides, node)


def _select_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,) = grads
    assert g is not None
    return (emit("select_backward", (g,), node.attrs[0], g.dtype),)


def stack(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """`torch.stack` of tensors of one dtype."""
    shape = tensors[0].shape
    dim = dim % (len(shape) + 1)
    node = differentiate("StackBackward0", tensors, _stack_backward, (dim,))
    return emit("stack", tensors, (*shape[:dim], len(tensors), *shape[dim:]), tensors[0].dtype, node=node)


def _stack_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (dim,) = grads, node.attrs
    assert g is not None
    return tuple(select(g, dim) if needed else None for needed in node.needs)


def repeat_rows(x: Tensor, times: int) -> Tensor:
    """`x.repeat_interleave(times, dim=0)` of a matrix: every row `times` times in a row."""
    rows, width = x.shape
    copies = clone(expand(unsqueeze(x, 1), (rows, times, width)))
    return view(copies, (rows * times, width))
