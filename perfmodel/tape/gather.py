"""Rows of a tensor by trained or computed indices, and the norms and bounds around them, with their gradients."""

from collections.abc import Sequence

from ..program.op import Attrs
from .autograd import differentiate
from .core import emit, new_tensor, record
from .pointwise import autocast_fp32, elementwise, fill
from .shape import unsqueeze
from .tensor import Grads, Node, Storage, Tensor
from .transfers import scalar

Grad = Tensor | None


def top_values(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`x.topk(k, dim=-1)`: values and int64 indices; the gradient is scattered into zeros."""
    node = differentiate("TopkBackward0", (x,), _top_values_backward, (x.shape,))
    shape = (*x.shape[:-1], k)
    values, indices = new_tensor(shape, x.dtype), new_tensor(shape, "i64")
    record("topk", (x,), (values, indices))
    if node:
        node.save(indices)
        node.produces(values)
    return values, indices


def _top_values_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (indices,) = grads, node.unpack()
    assert g is not None
    zeros = emit("new_zeros", (g,), node.attrs[0], g.dtype)
    return (emit("scatter.src", (zeros, indices, g), zeros.shape, g.dtype),)


def rows_of(bank: Tensor, indices: Tensor) -> Tensor:
    """`bank[indices]` of rows (or of the elements of a vector); the gradient adds up what each row received."""
    node = differentiate("IndexBackward0", (bank,), _picked_backward, (bank.shape,))
    if node:
        node.save(indices)
    return emit("index.Tensor", (bank, indices), (*indices.shape, *bank.shape[1:]), bank.dtype, node=node)


def picked(x: Tensor, *indices: Tensor) -> Tensor:
    """`x[i, …]` by int64 vectors for the first dims; the gradient is added to zeros of the whole."""
    node = differentiate("IndexBackward0", (x,), _picked_backward, (x.shape,))
    if node:
        node.save(*indices)
    return emit("index.Tensor", (x, *indices), (*indices[0].shape, *x.shape[len(indices) :]), x.dtype, node=node)


def _picked_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), indices = grads, node.unpack()
    assert g is not None
    zeros = emit("new_zeros", (g,), node.attrs[0], g.dtype)
    return (emit("index_put", (zeros, *indices, g), zeros.shape, g.dtype, attrs=Attrs(accumulate=True)),)


def take_one(x: Tensor, dim: int) -> Tensor:
    """`x[…, [i], …]`: a copy of one slice, whose place goes to the device; the gradient joins zeros of the whole."""
    dim = dim % len(x.shape)
    index = scalar("i64", (1,))  # a list of Python's
    node = differentiate("IndexBackward0", (x,), _picked_backward, (x.shape,))
    if node:
        node.save(index)
    return emit("index.Tensor", (x, index), (*x.shape[:dim], 1, *x.shape[dim + 1 :]), x.dtype, node=node)


def vector_norm(x: Tensor, dim: int) -> Tensor:
    """`x.norm(dim=dim)`."""
    x = autocast_fp32(x)
    dim = dim % len(x.shape)
    node = differentiate("LinalgVectorNormBackward0", (x,), _vector_norm_backward, (dim,))
    if node:
        node.save(x)
    out = emit(
        "linalg_vector_norm", (x,), (*x.shape[:dim], *x.shape[dim + 1 :]), x.dtype, node=node, attrs=Attrs(dims=(dim,))
    )
    if node:
        node.save_output(out)
    return out


def _vector_norm_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (x, norm), (dim,) = grads, node.unpack(), node.attrs
    assert g is not None
    g, norm = unsqueeze(g, dim), unsqueeze(norm, dim)
    direction = elementwise("div.Tensor", (x, norm))
    undefined = elementwise("eq.Scalar", (norm,), dtype="bool")
    record("masked_fill_.Scalar", (direction, undefined), (direction,))
    return (elementwise("mul.Tensor", (g, direction)),)


def mark(x: Tensor, indices: Tensor) -> None:
    """`x.scatter_(-1, indices, number)` on what needs no gradient."""
    record("scatter_.value", (x, indices), (x,))


def fill_where(x: Tensor, flags: Tensor) -> Tensor:
    """`x.masked_fill(flags, number)`; the gradient is 0 there."""
    node = differentiate("MaskedFillBackward0", (x,), _fill_where_backward)
    if node:
        node.save(flags)
    return elementwise("masked_fill.Scalar", (x, flags), node, dtype=x.dtype)


def _fill_where_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (flags,) = grads, node.unpack()
    assert g is not None
    return (elementwise("masked_fill.Scalar", (g, flags), dtype=g.dtype),)


def largest_last(x: Tensor, *, keep: bool = True) -> Tensor:
    """`x.max(dim=-1, keepdim=keep).values`; the gradient is scattered into zeros."""
    node = differentiate("MaxBackward0", (x,), _top_values_backward if keep else _largest_backward, (x.shape,))
    shape = (*x.shape[:-1], *((1,) if keep else ()))
    values, indices = new_tensor(shape, x.dtype), new_tensor(shape, "i64")
    record("max.dim", (x,), (values, indices), Attrs(dims=(len(x.shape) - 1,)))
    if node:
        node.save(indices)
        node.produces(values)
    return values


def _largest_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (indices,) = grads, node.unpack()
    assert g is not None
    g, indices = unsqueeze(g, -1), unsqueeze(indices, -1)
    zeros = emit("new_zeros", (g,), node.attrs[0], g.dtype)
    return (emit("scatter.src", (zeros, indices, g), zeros.shape, g.dtype),)


def clamp(x: Tensor, *, low: bool = False, high: bool = False) -> Tensor:
    """`torch.clamp(x, min=number, max=number)`, with those bounds that there are."""
    node = differentiate("ClampBackward1", (x,), _clamp_backward, (low, high))
    if node:
        node.save(x)
    return elementwise("clamp", (x,), node)


def _clamp_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (x,), (low, high) = grads, node.unpack(), node.attrs
    assert g is not None
    zero = fill("scalar_tensor", (), g.dtype)
    inside, *others = (elementwise(name, (x,), dtype="bool") for name in ["ge.Scalar"] * low + ["le.Scalar"] * high)
    for other in others:
        record("logical_and_", (inside, other), (inside,))
    return (elementwise("where.self", (inside, g, zero), dtype=g.dtype),)


def clamp_between(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`torch.clamp(x, low, high)` by bounds of x's shape that need no gradient."""
    node = differentiate("ClampBackward0", (x,), _clamp_between_backward)
    if node:
        node.save(x, low, high)
    return elementwise("clamp.Tensor", (x, low, high), node)


def _clamp_between_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (x, low, high) = grads, node.unpack()
    assert g is not None
    zero = fill("scalar_tensor", (), g.dtype)
    above, below = elementwise("ge.Tensor", (x, low), dtype="bool"), elementwise("le.Tensor", (x, high), dtype="bool")
    inside = elementwise("logical_and", (above, below), dtype="bool")
    return (elementwise("where.self", (inside, g, zero), dtype=g.dtype),)


def quotient(a: Tensor, b: Tensor) -> Tensor:
    """`a / b` where both have gradients."""
    node = differentiate("DivBackward0", (a, b), _quotient_backward)
    if node:
        node.save(a if node.needs[1] else None, b)
    return elementwise("div.Tensor", (a, b), node)


def _quotient_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (a, b) = grads, node.unpack()
    assert g is not None
    grad_a = elementwise("div.Tensor", (g, b)) if node.needs[0] else None
    if not node.needs[1]:
        return (grad_a, None)
    ratio = elementwise("div.Tensor", (elementwise("div.Tensor", (a, b)), b))
    return (grad_a, elementwise("mul.Tensor", (elementwise("neg", (g,)), ratio)))


def zeros_like(x: Tensor) -> Tensor:
    """`torch.zeros_like(x)`."""
    return emit("zeros_like", (x,), x.shape, x.dtype)


def any_infinite(x: Tensor) -> None:
    """`x.isinf().any()` as a condition: the host waits for the answer."""
    infinite = elementwise("isinf", (x,), dtype="bool")
    record("_local_scalar_dense", (emit("any", (infinite,), (), "bool"),), ())


def replace_rows(table: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """`table.index_copy(0, indices, rows)`: a copy of the whole table; only the rows have a gradient."""
    node = differentiate("IndexCopyBackward0", (rows,), _replace_rows_backward)
    if node:
        node.save(indices)
    return emit("index_copy", (table, indices, rows), table.shape, table.dtype, node=node)


def _replace_rows_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (indices,) = grads, node.unpack()
    assert g is not None
    return (emit("index_select", (g, indices), (*indices.shape, g.shape[1]), g.dtype),)


def index_put(matrix: Tensor, rows: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """`matrix[..., rows, columns] = values` on a matrix that needs no gradient yet; returns it with its new graph."""
    node = differentiate("IndexPutBackward0", (values,), _index_put_backward, (values.shape,))
    record("index_put_", (matrix, rows, columns, values), (matrix,))
    matrix = matrix.alias()
    if node:
        node.save(rows, columns)
        node.produces(matrix)
    return matrix


def _index_put_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (rows, columns) = grads, node.unpack()
    assert g is not None
    return (emit("index.Tensor", (g, rows, columns), node.attrs[0], g.dtype),)


def zero_where(x: Tensor, where: Tensor) -> None:
    """`x[where] = 0`, in place."""
    record("index_put_", (x, where, Tensor((), x.dtype, (), 1, Storage(0, None))), (x,))
