"""In-place addition to what a linear layer returned, and how autograd differentiates it."""

from collections.abc import Callable, Sequence

from ..program.dims import product
from .autograd import differentiate
from .core import emit, new_tensor, record, tape
from .elementary import div, div_backward
from .pointwise import scale
from .shape import clone, expand, squeeze, view
from .tensor import Grads, Node, Storage, Tensor

Grad = Tensor | None
OWN_LINEAR = "LinearFunctionForZeroStage3Backward"


def add_to_output(x: Tensor, other: Tensor, *, viewed: bool) -> Tensor:
    """`x += other` for a layer's output x; `viewed` where x is a view of its matrix (a bias, or a Conv1D).

    What a Function has made in the place of `F.linear` is no view.
    """
    own = tape().linear is not None and (x.node is None or x.node.name == OWN_LINEAR)
    return _add_to_view(x, other) if viewed and len(x.shape) > 2 and not own else add_in_place(x, other)


def _add_to_view(x: Tensor, other: Tensor) -> Tensor:
    """The matrix gets a new history (`CopySlices`), and x is viewed from it again.

    The view's gradient passes through zeros of the matrix's memory (AsStridedBackward0). For tensor subclasses, the
    oracle's fake tensors among them, PyTorch replays the view instead (`Tape.view_replay`). Source:
    torch/csrc/autograd/variable.cpp, `VariableHooks::grad_fn`.
    """
    shape = x.shape
    record("add_.Tensor", (x, other), (x,))
    base = Tensor((product(shape[:-1]), shape[-1]), x.dtype, x.strides[-2:], x.numel, x.storage)
    if x.node is not None:
        edge = x.node.edges[0]
        assert edge is not None
        (base.node, base.slot), base.requires_grad = edge, True
    node = differentiate("CopySlices", (base, other), _copy_slices_backward, (shape,))
    base = base.alias()
    if node:
        node.produces(base)
    if tape().view_replay:
        return view(base, shape)
    x = x.alias()
    again = differentiate("AsStridedBackward0", (base,), _as_strided_backward, (base.shape,))
    if again:
        again.produces(x)
    return x


def _as_strided_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    """The gradient, without dims of one element, is written into zeros of the matrix's memory."""
    (g,), (base_shape,) = grads, node.attrs
    assert g is not None
    g = _without_ones(g)
    flat = new_tensor((g.numel,), g.dtype)
    record("new_zeros", (g,), (flat,))
    written = view(flat, g.shape)
    record("copy_", (written, g), (written,))
    return (view(flat, base_shape),)


def _copy_slices_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    """The matrix's gradient is copied, and the function (an addition) is applied to a clone of its view.

    Source: torch/csrc/autograd/functions/tensor.cpp, `CopySlices::apply_impl`.
    """
    (g,), (shape,) = grads, node.attrs
    assert g is not None
    result = new_tensor(g.shape, g.dtype)
    record("new_empty_strided", (g,), (result,))
    record("copy_", (result, g), (result,))
    grad_slice = view(result, shape)
    grad = clone(grad_slice)
    if node.needs[0]:
        record("copy_", (grad_slice, grad), (grad_slice,))
    return (result if node.needs[0] else None, grad)


def zero_in_view(x: Tensor, flags: Tensor) -> Tensor:
    """`x[flags] = 0` on a view that squeezed the last dim, or on what needs no gradient; returns x with its new graph.

    As `_add_to_view`, but that the gradient is put to zero where the flags are.
    """
    number = Tensor((), x.dtype, (), 1, Storage(0, None))
    record("index_put_", (x, flags, number), (x,))
    if x.node is None:
        return x
    (edge,) = x.node.edges
    assert edge is not None
    base = Tensor((*x.shape, 1), x.dtype, (*x.strides, 1), x.numel, x.storage)
    (base.node, base.slot), base.requires_grad = edge, True
    node = differentiate("CopySlices", (base,), _zeroed_backward)
    assert node is not None
    node.save(flags)
    base = base.alias()
    node.produces(base)
    if tape().view_replay:
        return squeeze(base, -1)
    x = x.alias()
    again = differentiate("AsStridedBackward0", (base,), _as_strided_backward, (base.shape,))
    assert again is not None
    again.produces(x)
    return x


def _zeroed_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (flags,) = grads, node.unpack()
    assert g is not None
    result = new_tensor(g.shape, g.dtype)
    record("new_empty_strided", (g,), (result,))
    record("copy_", (result, g), (result,))
    grad_slice = squeeze(result, -1)
    grad = clone(grad_slice)
    zeros = emit("zeros", (), (), grad.dtype)
    put = emit("index_put", (grad, flags, zeros), grad.shape, grad.dtype)
    record("copy_", (grad_slice, put), (grad_slice,))
    return (result,)


def divide_view(x: Tensor, part_of: Callable[[Tensor], Tensor]) -> Tensor:
    """`part /= number` on a part of x, a view of other sizes; returns the part with its new graph."""
    with tape().no_grad():
        part = part_of(x)
    record("div_.Tensor", (part,), (part,))
    node = differentiate("CopySlices", (x,), _divide_view_backward, (part_of,))
    if node is None:
        return part
    base = x.alias()
    node.produces(base)
    if tape().view_replay:
        return part_of(base)
    again = differentiate("AsStridedBackward0", (base,), _part_backward, (part_of, x.shape))
    assert again is not None
    part = part.alias()
    again.produces(part)
    return part


def put_in_part(x: Tensor, part_of: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """`part = value` on a part of x; returns x with its new graph."""
    with tape().no_grad():
        part = part_of(x)
    record("copy_", (part, value), (part,))
    node = differentiate("CopySlices", (x, value), _put_in_part_backward, (part_of,))
    if node is None:
        return x
    x = x.alias()
    node.produces(x)
    return x


def _put_in_part_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    """The gradient is copied, the value's is a clone of its part, which is put to zero (`CopyBackwards`)."""
    result, grad_slice = _copied(node, grads)
    grad = emit("clone", (grad_slice,), grad_slice.shape, result.dtype)
    if node.needs[0]:
        zeros = emit("zeros_like", (grad,), grad.shape, grad.dtype)
        record("copy_", (grad_slice, zeros), (grad_slice,))
    return (result if node.needs[0] else None, grad if node.needs[1] else None)


def _divide_view_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    result, grad_slice = _copied(node, grads)
    divided = div(emit("clone", (grad_slice,), grad_slice.shape, result.dtype), 1.0)
    record("copy_", (grad_slice, divided), (grad_slice,))
    return (result,)


def _copied(node: Node, grads: Sequence[Grad]) -> tuple[Tensor, Tensor]:
    """The copy of its gradient that `CopySlices` changes, and the part of it that was changed in forward."""
    (g,), (part_of,) = grads, node.attrs
    assert g is not None
    result = new_tensor(g.shape, g.dtype)
    record("new_empty_strided", (g,), (result,))
    record("copy_", (result, g), (result,))
    return result, part_of(result)


def _part_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    """The gradient is written into zeros of the whole."""
    (g,), (part_of, shape) = grads, node.attrs
    assert g is not None
    g = _without_ones(g)
    flat = new_tensor((product(shape),), g.dtype)
    record("new_zeros", (g,), (flat,))
    written = view(flat, shape)
    part = _without_ones(part_of(written))
    record("copy_", (part, g), (part,))
    return (written,)


def _without_ones(x: Tensor) -> Tensor:
    """x without its dims of one element."""
    wide = tuple(d for d in x.shape if not (isinstance(d, int) and d == 1))
    return view(x, wide) if len(wide) < len(x.shape) else x


def frobenius_norm(x: Tensor) -> Tensor:
    """`torch.norm(x, p="fro")` of a matrix."""
    node = differentiate("LinalgVectorNormBackward0", (x,), _norm_backward)
    if node:
        node.save(x)
    out = emit("linalg_vector_norm", (x,), (), x.dtype, node=node)
    if node:
        node.save_output(out)
    return out


def _norm_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    """g · (x / ‖x‖), 0 where the norm is 0."""
    (g,), (x, norm) = grads, node.unpack()
    assert g is not None
    direction = emit("div.Tensor", (x, norm), x.shape, x.dtype)
    zero = emit("eq.Scalar", (norm,), (), "bool")
    record("masked_fill_.Scalar", (direction, zero), (direction,))
    return (emit("mul.Tensor", (g, direction), x.shape, x.dtype),)


def add_in_place(x: Tensor, other: Tensor, *, doubled: bool = False) -> Tensor:
    """`x.add_(other, alpha=2 if doubled else 1)`; returns x with its new graph."""
    node = differentiate("AddBackward0", (x, other), _add_in_place_backward, (doubled,))
    record("add_.Tensor", (x, other), (x,))
    x = x.alias()
    if node:
        node.produces(x)
    return x


def _add_in_place_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (doubled,) = grads, node.attrs
    assert g is not None
    other = (scale(g) if doubled else g) if node.needs[1] else None
    return (g if node.needs[0] else None, other)


def add_rows(x: Tensor, places: Tensor, rows: Tensor, times: int) -> Tensor:
    """`x.index_add_(0, places, rows)`; returns x with its new graph, which keeps the rows for their shape.

    It ends a turn of a loop that runs `times` times in a row (`Part.take_turns`); in backward it begins it.
    """
    node = differentiate("IndexAddBackward0", (x, rows), _add_rows_backward, (times,))
    if node and node.needs[1]:
        node.save(places, rows)
    record("index_add_", (x, places, rows), (x,))
    x = x.alias()
    if node:
        node.produces(x)
    return x


def _add_rows_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (times,) = grads, node.attrs
    assert g is not None
    tape().part.take_turns(times)
    if not node.needs[1]:
        return (g, None)
    places, rows = node.unpack()
    own = expand(emit("index_select", (g, places), rows.shape, g.dtype), rows.shape)
    return (g if node.needs[0] else None, own)


def divide_in_place(x: Tensor, other: Tensor) -> Tensor:
    """`x /= other`; returns x with its new graph, for which x is copied before if `other` needs a gradient."""
    node = differentiate("DivBackward0", (x, other), div_backward)
    if node:
        before = emit("clone", (x,), x.shape, x.dtype) if node.needs[1] else None
        node.save(before, other)
    record("div_.Tensor", (x, other), (x,))
    x = x.alias()
    if node:
        node.produces(x)
    return x


def div_in_place(x: Tensor) -> Tensor:
    """`x /= number` of a tensor that is no view; returns x with its new graph."""
    node = differentiate("DivBackward0", (x,), _div_in_place_backward)
    record("div_.Tensor", (x,), (x,))
    x = x.alias()
    if node:
        node.produces(x)
    return x


def _div_in_place_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,) = grads
    assert g is not None
    return (div(g, 1.0),)
