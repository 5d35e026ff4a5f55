"""Ops that only adapters need, each with its backward rule beneath it (derivatives.yaml)."""

from collections.abc import Sequence

from ..program.dims import Dim
from ..program.op import ON_HOST, Attrs
from ..program.part import Part
from .autograd import differentiate
from .core import emit, record, tape
from .linalg import matmul
from .pointwise import _elementwise, autocast_fp32, mul, scale
from .shape import expand, t, unsqueeze, view, view_as
from .tensor import Backward, Grads, Node, Parameter, Storage, Tensor

Grad = Tensor | None


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


def eye(n: Dim, dtype: str) -> Tensor:
    """`torch.eye(n)`."""
    return emit("eye", (), (n, n), dtype)


def div(a: Tensor, b: Tensor | float) -> Tensor:
    """`a / b`."""
    if not isinstance(b, Tensor):
        return _elementwise("div.Tensor", (a,), differentiate("DivBackward0", (a,), _div_number_backward))
    node = differentiate("DivBackward0", (a, b), _div_backward)
    if node:
        node.save(a if node.needs[1] else None, b)
    return _elementwise("div.Tensor", (a, b), node)


def _div_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (a, b) = grads, node.unpack()
    assert g is not None
    grad_b = None
    grad_a = _elementwise("div.Tensor", (g, b)) if node.needs[0] else None
    if node.needs[1]:
        ratio = _elementwise("div.Tensor", (_elementwise("div.Tensor", (a, b)), b))
        grad_b = _elementwise("mul.Tensor", (_elementwise("neg", (g,)), ratio))
    return (grad_a, grad_b)


def _div_number_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,) = grads
    assert g is not None
    return (_elementwise("div.Tensor", (g,)),)


def cos(x: Tensor) -> Tensor:
    """`x.cos()`."""
    return _saving_input("cos", x, _cos_backward)


def _cos_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (x,) = grads, node.unpack()
    assert g is not None
    slope = _elementwise("neg", (_elementwise("sin", (x,)),))
    return (_elementwise("mul.Tensor", (g, slope)),)


def sin(x: Tensor) -> Tensor:
    """`x.sin()`."""
    return _saving_input("sin", x, _sin_backward)


def _sin_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (x,) = grads, node.unpack()
    assert g is not None
    return (_elementwise("mul.Tensor", (g, _elementwise("cos", (x,)))),)


def _saving_input(name: str, x: Tensor, backward: Backward) -> Tensor:
    node = differentiate(f"{name.capitalize()}Backward0", (x,), backward)
    if node:
        node.save(x)
    return _elementwise(name, (x,), node)


def row_norms(x: Tensor) -> Tensor:
    """`torch.linalg.norm(x, dim=1)` of a constant matrix."""
    return emit("linalg_vector_norm", (x,), (x.shape[0],), x.dtype, attrs=Attrs(dims=(1,)))


def coin() -> None:
    """`torch.rand(1) > p` as a condition: drawn and read on the host, where no device waits for it."""
    x = Tensor((1,), "fp32", (1,), 1, Storage(0, None))
    heads = Tensor((1,), "bool", (1,), 1, Storage(0, None))
    record("rand", (), (x,), ON_HOST)
    record("gt.Scalar", (x,), (heads,), ON_HOST)
    record("_local_scalar_dense", (heads,), (), ON_HOST)


def hadamard_weight(w1a: Tensor, w1b: Tensor, w2a: Tensor, w2b: Tensor) -> Tensor:
    """LoHa's `HadaWeight`: (w1a·w1b) ∘ (w2a·w2b) · scale; backward computes both products again."""
    inputs = (w1a, w1b, w2a, w2b)
    node = differentiate("HadaWeightBackward", inputs, _hadamard_backward)
    scale = Tensor((), "fp32", (), 1, Storage(0, None))
    with tape().no_grad():
        out = mul(mul(matmul(w1a, w1b), matmul(w2a, w2b)), scale)
    if node:
        node.save(*inputs, scale)
        node.produces(out)
    return out


def _hadamard_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (w1a, w1b, w2a, w2b, scale) = grads, node.unpack()
    assert g is not None
    g = mul(g, scale)
    temp = mul(g, matmul(w2a, w2b))
    grad_w1a = matmul(temp, t(w1b))
    grad_w1b = matmul(t(w1a), temp)
    temp = mul(g, matmul(w1a, w1b))
    grad_w2a = matmul(temp, t(w2b))
    return (grad_w1a, grad_w1b, grad_w2a, matmul(t(w2a), temp))


def kron(a: Tensor, b: Tensor) -> Tensor:
    """`torch.kron` of two matrices."""
    (p, q), (r, s) = a.shape, b.shape
    blocks = mul(view(a, (p, 1, q, 1)), view(b, (1, r, 1, s)))
    return view(blocks, (p * r, q * s), "_unsafe_view")


def sum_dim(x: Tensor, dim: int) -> Tensor:
    """`x.sum(dim)`."""
    x = autocast_fp32(x)
    dim = dim % len(x.shape)
    node = differentiate("SumBackward1", (x,), _sum_backward, (dim, x.shape))
    return emit(
        "sum.dim_IntList", (x,), (*x.shape[:dim], *x.shape[dim + 1 :]), x.dtype, node=node, attrs=Attrs(dims=(dim,))
    )


def _sum_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,) = grads
    assert g is not None
    dim, shape = node.attrs
    return (expand(unsqueeze(g, dim), shape),)


def pad_last(x: Tensor, more: Dim) -> Tensor:
    """`F.pad(x, (0, more))`."""
    node = differentiate("ConstantPadNdBackward0", (x,), _pad_backward, (x.shape,))
    return emit("constant_pad_nd", (x,), (*x.shape[:-1], x.shape[-1] + more), x.dtype, node=node)


def _pad_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,) = grads
    assert g is not None
    return (emit("constant_pad_nd", (g,), node.attrs[0], g.dtype),)


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
