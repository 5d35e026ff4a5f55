"""In-place addition to a view: autograd rewrites the history of the base, and pays for it with copies in backward.

`F.linear` with a bias and GPT-2's Conv1D return such views of an addmm. Sources: torch/csrc/autograd, functions/
tensor.cpp (`CopySlices`), variable.cpp (the view's new grad_fn), FunctionsManual.cpp (`as_strided_backward`).
"""

from collections.abc import Sequence

from .autograd import Grads, Node, differentiate
from .core import Tensor, new_tensor, record
from .dims import Shape, contiguous_strides
from .shape import clone, view

Grad = Tensor | None


def add_to_view(x: Tensor, other: Tensor, base_shape: Shape) -> Tensor:
    """`x += other` where x is a view of a contiguous tensor of `base_shape`; returns x with its new graph."""
    base = _base(x, base_shape)
    if x.node is not None and x.node.edges[0] is not None:
        base.node, base.slot = x.node.edges[0]
        base.requires_grad = True
    node = differentiate("CopySlices", (base, other), _copy_slices, (x.shape,))
    record("add_.Tensor", (x, other), (x,))
    x = x.alias()
    if node:
        base = _base(x, base_shape)
        node.produces(base)
        again = differentiate("AsStridedBackward0", (base,), _as_strided_backward, (base_shape,))
        assert again is not None
        again.produces(x)
    return x


def _base(x: Tensor, shape: Shape) -> Tensor:
    return Tensor(shape, x.dtype, contiguous_strides(shape), x.numel, x.storage)


def _as_strided_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    """The gradient is written into zeros of the base's memory."""
    (g,), (base_shape,) = grads, node.attrs
    assert g is not None
    flat = new_tensor((g.numel,), g.dtype)
    record("new_zeros", (g,), (flat,))
    written = view(flat, g.shape)
    record("copy_", (written, g), (written,))
    return (view(flat, base_shape),)


def _copy_slices(node: Node, grads: Sequence[Grad]) -> Grads:
    """The base's gradient is copied, and the view's part of it cloned for the operation and written back."""
    (g,), (view_shape,) = grads, node.attrs
    assert g is not None
    result = new_tensor(g.shape, g.dtype)
    record("new_empty_strided", (g,), (result,))
    record("copy_", (result, g), (result,))
    part = view(result, view_shape)
    passed = clone(part)
    if node.needs[0]:
        record("copy_", (part, passed), (part,))
    return (result if node.needs[0] else None, passed if node.needs[1] else None)
