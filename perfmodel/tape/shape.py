"""Views: they move no data, but they cost a dispatch and decide where a copy is needed."""

from collections.abc import Sequence

from ..program.dims import Dim, Shape, contiguous_strides, is_contiguous, product, same, same_shape, view_strides
from ..program.part import Part
from .autograd import differentiate
from .core import emit, record
from .tensor import Grads, Node, Parameter, Tensor

Grad = Tensor | None


OTHER_SIZE = ("expand", "slice.Tensor", "select.int")  # views of fewer elements, or of the same ones again and again


def view_as(name: str, x: Tensor, shape: Shape, strides: Shape, node: Node | None = None) -> Tensor:
    """A view of x's memory."""
    numel = product(shape) if name in OTHER_SIZE else x.numel
    out = Tensor(shape, x.dtype, strides, numel, x.storage)
    record(name, (x,), (out,), view=True)
    if node:
        node.produces(out)
    return out


def view(x: Tensor, shape: Shape, name: str = "view") -> Tensor:
    """`x.view(shape)`; the strides must allow it."""
    strides = view_strides(x.shape, x.strides, shape)
    if strides is None:
        raise ValueError(f"view of {x.shape} with strides {x.strides} as {shape} needs a copy")
    return view_as(name, x, shape, strides, differentiate("ViewBackward0", (x,), _reshape_backward, (x.shape,)))


def reshape(x: Tensor, shape: Shape) -> Tensor:
    """`x.reshape(shape)`: a view, or a contiguous clone where the strides do not allow one."""
    if same_shape(shape, x.shape):
        return x
    if view_strides(x.shape, x.strides, shape) is None:
        return view(clone(x), shape, "_unsafe_view")
    return view(x, shape)


def _reshape_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,) = grads
    assert g is not None
    return (reshape(g, node.attrs[0]),)


def clone(x: Tensor) -> Tensor:
    """A contiguous copy."""
    node = differentiate("CloneBackward0", (x,), _identity_backward)
    return emit("clone", (x,), x.shape, x.dtype, node=node)


def contiguous(x: Tensor) -> Tensor:
    """`x.contiguous()`."""
    return x if is_contiguous(x.shape, x.strides) else clone(x)


def _identity_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    return (grads[0],)


def transpose(x: Tensor, i: int, j: int) -> Tensor:
    """`x.transpose(i, j)`."""
    i, j = i % len(x.shape), j % len(x.shape)
    shape, strides = list(x.shape), list(x.strides)
    shape[i], shape[j] = shape[j], shape[i]
    strides[i], strides[j] = strides[j], strides[i]
    node = differentiate("TransposeBackward0", (x,), _transpose_backward, (i, j))
    return view_as("transpose.int", x, tuple(shape), tuple(strides), node)


def _transpose_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,) = grads
    assert g is not None
    return (transpose(g, *node.attrs),)


def t(x: Tensor) -> Tensor:
    """`x.t()` of a matrix."""
    node = differentiate("TBackward0", (x,), _t_backward)
    return view_as("t", x, (x.shape[1], x.shape[0]), (x.strides[1], x.strides[0]), node)


def _t_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,) = grads
    assert g is not None
    return (t(g),)


def unsqueeze(x: Tensor, dim: int) -> Tensor:
    """Insert a dim of size 1."""
    dim = dim % (len(x.shape) + 1)
    stride = x.shape[dim] * x.strides[dim] if dim < len(x.shape) else 1
    shape = (*x.shape[:dim], 1, *x.shape[dim:])
    node = differentiate("UnsqueezeBackward0", (x,), _squeeze_backward, (dim,))
    return view_as("unsqueeze", x, shape, (*x.strides[:dim], stride, *x.strides[dim:]), node)


def squeeze(x: Tensor, dim: int) -> Tensor:
    """Drop a dim of size 1."""
    dim = dim % len(x.shape)
    shape, strides = (*x.shape[:dim], *x.shape[dim + 1 :]), (*x.strides[:dim], *x.strides[dim + 1 :])
    return view_as(
        "squeeze.dim", x, shape, strides, differentiate("SqueezeBackward1", (x,), _unsqueeze_backward, (dim,))
    )


def _squeeze_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,) = grads
    assert g is not None
    return (squeeze(g, node.attrs[0]),)


def _unsqueeze_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,) = grads
    assert g is not None
    return (unsqueeze(g, node.attrs[0]),)


def expand(x: Tensor, shape: Shape) -> Tensor:
    """`x.expand(shape)`; its gradient is summed back by the engine."""
    lead = len(shape) - len(x.shape)
    if not lead and all(map(same, shape, x.shape)):
        return view_as("expand", x, shape, x.strides, differentiate("ExpandBackward0", (x,), _identity_backward))
    strides = (0,) * lead + tuple(
        s if same(d, shape[lead + i]) else 0 for i, (d, s) in enumerate(zip(x.shape, x.strides, strict=True))
    )
    return view_as("expand", x, shape, strides, differentiate("ExpandBackward0", (x,), _identity_backward))


def narrow(x: Tensor, dim: int, size: Dim, step: int = 1) -> Tensor:
    """`x[..., a:a+size·step:step, ...]` along one dim; the gradient is written into zeros of the full shape."""
    dim = dim % len(x.shape)
    shape = (*x.shape[:dim], size, *x.shape[dim + 1 :])
    strides = (*x.strides[:dim], x.strides[dim] * step, *x.strides[dim + 1 :])
    node = differentiate("SliceBackward0", (x,), _slice_backward, (x.shape,))
    return view_as("slice.Tensor", x, shape, strides, node)


def every_other(x: Tensor) -> Tensor:
    """`x[..., ::2]` or `x[..., 1::2]` of an even last dim."""
    node = differentiate("SliceBackward0", (x,), _slice_backward, (x.shape,))
    return view_as("slice.Tensor", x, (*x.shape[:-1], x.shape[-1] // 2), (*x.strides[:-1], 2 * x.strides[-1]), node)


def _slice_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,) = grads
    assert g is not None
    return (emit("slice_backward", (g,), node.attrs[0], g.dtype),)


def whole_slice(x: Tensor) -> Tensor:
    """`x[..., :size]` where that is all of it."""
    return view_as("alias", x, x.shape, x.strides, differentiate("AliasBackward0", (x,), _identity_backward))


def split(x: Tensor, sizes: Sequence[Dim], dim: int) -> list[Tensor]:
    """`x.split(sizes, dim)`; the gradients are concatenated."""
    dim = dim % len(x.shape)
    node = differentiate("SplitBackward0", (x,), _split_backward, (dim, tuple(sizes), x.shape))
    outs = []
    for size in sizes:
        shape = (*x.shape[:dim], size, *x.shape[dim + 1 :])
        outs.append(Tensor(shape, x.dtype, x.strides, product(shape), x.storage))
    record("split.Tensor", (x,), outs, view=True)
    if node:
        node.produces(*outs)
    return outs


def _split_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    dim, sizes, shape = node.attrs
    like = next(g for g in grads if g is not None)
    parts = []
    for g, size in zip(grads, sizes, strict=True):
        piece = (*shape[:dim], size, *shape[dim + 1 :])
        parts.append(emit("zeros", (), piece, like.dtype) if g is None else g)
    return (emit("cat", parts, shape, like.dtype, strides=contiguous_strides(shape)),)


def detach(x: Tensor) -> Tensor:
    """`x.detach()`: the same memory without the graph."""
    return x.alias()


def transposed_parameter(weight: Parameter, part: Part) -> Parameter:
    """`nn.Parameter(weight.T)`: a new leaf on the weight's memory that needs a gradient, whatever the weight does.

    Its gradient, which no optimizer knows, lives as long as the graph.
    """
    turned = t(weight)
    leaf = Parameter(weight.name + ".T", turned.shape, weight.dtype, kind=weight.kind, trainable=True)
    leaf.strides = turned.strides
    leaf.part, leaf.passing = part, True
    return leaf


def permute(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """`x.permute(order)`."""
    shape, strides = tuple(x.shape[i] for i in order), tuple(x.strides[i] for i in order)
    return view_as("permute", x, shape, strides, differentiate("PermuteBackward0", (x,), _permute_backward, (order,)))


def _permute_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,) = grads
    assert g is not None
    (order,) = node.attrs
    return (permute(g, tuple(order.index(i) for i in range(len(order)))),)


def repeat(x: Tensor, times: Dim) -> Tensor:
    """`x.repeat(times, 1, 1)` of a constant matrix."""
    return emit("repeat", (x,), (times, *x.shape), x.dtype)


def pad_last(x: Tensor, more: Dim) -> Tensor:
    """`F.pad(x, (0, more))`."""
    node = differentiate("ConstantPadNdBackward0", (x,), _pad_backward, (x.shape,))
    return emit("constant_pad_nd", (x,), (*x.shape[:-1], x.shape[-1] + more), x.dtype, node=node)


def _pad_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,) = grads
    assert g is not None
    return (emit("constant_pad_nd", (g,), node.attrs[0], g.dtype),)
