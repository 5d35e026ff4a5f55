"""Division, cosine and sine, sums and norms along a dim, each with its backward rule beneath it (derivatives.yaml)."""

from collections.abc import Sequence

from ..program.dims import Dim
from ..program.op import Attrs
from .autograd import differentiate
from .core import emit, tape
from .pointwise import elementwise
from .shape import expand, unsqueeze
from .tensor import Backward, Grads, Node, Tensor

Grad = Tensor | None


def eye(n: Dim, dtype: str) -> Tensor:
    """`torch.eye(n)`."""
    return emit("eye", (), (n, n), dtype)


def div(a: Tensor, b: Tensor | float) -> Tensor:
    """`a / b`."""
    if not isinstance(b, Tensor):
        return elementwise("div.Tensor", (a,), differentiate("DivBackward0", (a,), _div_number_backward))
    node = differentiate("DivBackward0", (a, b), div_backward)
    if node:
        node.save(a if node.needs[1] else None, b)
    return elementwise("div.Tensor", (a, b), node)


def div_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    """The gradients of a quotient, in place or not."""
    (g,), (a, b) = grads, node.unpack()
    assert g is not None
    grad_b = None
    grad_a = elementwise("div.Tensor", (g, b)) if node.needs[0] else None
    if node.needs[1]:
        ratio = elementwise("div.Tensor", (elementwise("div.Tensor", (a, b)), b))
        grad_b = elementwise("mul.Tensor", (elementwise("neg", (g,)), ratio))
    return (grad_a, grad_b)


def _div_number_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,) = grads
    assert g is not None
    return (elementwise("div.Tensor", (g,)),)


def cos(x: Tensor) -> Tensor:
    """`x.cos()`."""
    return _saving_input("cos", x, _cos_backward)


def _cos_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (x,) = grads, node.unpack()
    assert g is not None
    slope = elementwise("neg", (elementwise("sin", (x,)),))
    return (elementwise("mul.Tensor", (g, slope)),)


def sin(x: Tensor) -> Tensor:
    """`x.sin()`."""
    return _saving_input("sin", x, _sin_backward)


def _sin_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (x,) = grads, node.unpack()
    assert g is not None
    return (elementwise("mul.Tensor", (g, elementwise("cos", (x,)))),)


def _saving_input(name: str, x: Tensor, backward: Backward) -> Tensor:
    node = differentiate(f"{name.capitalize()}Backward0", (x,), backward)
    if node:
        node.save(x)
    return elementwise(name, (x,), node)


def row_norms(x: Tensor) -> Tensor:
    """`torch.linalg.norm(x, dim=1)` of a constant matrix."""
    return emit("linalg_vector_norm", (x,), (x.shape[0],), x.dtype, attrs=Attrs(dims=(1,)))


def sum_dim(x: Tensor, dim: int, *, keep: bool = False) -> Tensor:
    """`x.sum(dim, keepdim=keep)`; CUDA autocast asks the kernel itself for fp32 (`fp32_set_opt_dtype`)."""
    dtype = "fp32" if tape().autocast and tape().device == "cuda" and x.is_floating else x.dtype
    dim = dim % len(x.shape)
    node = differentiate("SumBackward1", (x,), _sum_backward, (dim, x.shape, keep))
    shape = (*x.shape[:dim], *((1,) if keep else ()), *x.shape[dim + 1 :])
    return emit("sum.dim_IntList", (x,), shape, dtype, node=node, attrs=Attrs(dims=(dim,)))


def _sum_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,) = grads
    assert g is not None
    dim, shape, kept = node.attrs
    return (expand(g if kept else unsqueeze(g, dim), shape),)
