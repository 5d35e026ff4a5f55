"""Elementwise ops, reductions and casts, each with its backward rule beneath it (derivatives.yaml)."""

from collections.abc import Sequence

from ..program.dims import Dim, Shape, dense_order, elementwise_strides, is_contiguous, is_one, remembered, same_shape
from ..program.dtypes import promote
from ..program.op import PLAIN, STRIDED, Attrs
from .autograd import differentiate
from .core import emit, record, tape
from .shape import view, view_as
from .tensor import Grads, Node, Tensor

Grad = Tensor | None


def broadcast(a: Shape, b: Shape) -> Shape:
    """The common shape of two operands."""
    if a is b:
        return a
    if len(a) < len(b):
        a = (1,) * (len(b) - len(a)) + a
    elif len(b) < len(a):
        b = (1,) * (len(a) - len(b)) + b
    return tuple(y if is_one(x) else x for x, y in zip(a, b, strict=True))


def elementwise(
    name: str,
    inputs: Sequence[Tensor],
    node: Node | None = None,
    *,
    dtype: str | None = None,
) -> Tensor:
    """An op whose result has the operands' common shape, by broadcasting, and their common dtype or another."""
    if dtype is None:
        with_dims = [t.dtype for t in inputs if t.shape] or [t.dtype for t in inputs]
        dtype = with_dims[0]
        for other in with_dims[1:]:
            dtype = promote(dtype, other)
    shape, strides, streams = _walk(tuple([(t.shape, t.strides) for t in inputs]))
    return emit(name, inputs, shape, dtype, strides=strides, node=node, attrs=PLAIN if streams else STRIDED)


@remembered
def _walk(operands: tuple[tuple[Shape, Shape], ...]) -> tuple[Shape, Shape, bool]:
    """Shape and strides of an elementwise result of operands (shape, strides), and whether its kernel streams."""
    shape = operands[0][0]
    for other, _ in operands[1:]:
        shape = broadcast(shape, other)
    return shape, elementwise_strides(shape, operands), all(reads_in_order(*operand, shape) for operand in operands)


def reads_in_order(own: Shape, strides: Shape, shape: Shape) -> bool:
    """Whether a kernel reads an operand front to back: not broadcast, permuted or sliced (0-dim operands are free)."""
    return not own or (same_shape(own, shape) and is_contiguous(own, strides))


def cast(x: Tensor, dtype: str) -> Tensor:
    """`x.to(dtype)`: nothing if it has that dtype already."""
    if x.dtype == dtype:
        return x
    node = differentiate("ToCopyBackward0", (x,), _cast_backward, (x.dtype,)) if x.is_floating else None
    order = dense_order(x.shape, x.strides)
    strides = x.strides if order else elementwise_strides(x.shape, ((x.shape, x.strides),))
    return emit("_to_copy", (x,), x.shape, dtype, strides=strides, node=node)


def _cast_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,) = grads
    assert g is not None
    return (cast(g, node.attrs[0]),)


def add(a: Tensor, b: Tensor | float) -> Tensor:
    """`a + b`."""
    if not isinstance(b, Tensor):
        return elementwise("add.Tensor", (a,), differentiate("AddBackward0", (a,), _pass))
    return elementwise("add.Tensor", (a, b), differentiate("AddBackward0", (a, b), _pass_both))


def sub(a: Tensor, b: Tensor | float) -> Tensor:
    """`a - b`."""
    if not isinstance(b, Tensor):
        return elementwise("sub.Tensor", (a,), differentiate("SubBackward0", (a,), _pass))
    return elementwise("sub.Tensor", (a, b), differentiate("SubBackward0", (a, b), _sub_backward))


def _sub_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,) = grads
    assert g is not None
    return (g if node.needs[0] else None, elementwise("neg", (g,)) if node.needs[1] else None)


def _pass(node: Node, grads: Sequence[Grad]) -> Grads:
    return (grads[0],)


def _pass_both(node: Node, grads: Sequence[Grad]) -> Grads:
    return (grads[0] if node.needs[0] else None, grads[0] if node.needs[1] else None)


def mul(a: Tensor, b: Tensor | float) -> Tensor:
    """`a * b`; a Python scalar is saved as such and costs nothing."""
    if not isinstance(b, Tensor):
        return elementwise("mul.Tensor", (a,), differentiate("MulBackward0", (a,), _scale_backward))
    node = differentiate("MulBackward0", (a, b), _mul_backward)
    if node:
        node.save(b if node.needs[0] else None, a if node.needs[1] else None)
    return elementwise("mul.Tensor", (a, b), node)


def _scale_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,) = grads
    assert g is not None
    return (elementwise("mul.Tensor", (g,)),)


def _mul_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,) = grads
    assert g is not None
    b, a = node.unpack()
    grad_b = elementwise("mul.Tensor", (g, a)) if node.needs[1] else None
    return (elementwise("mul.Tensor", (g, b)) if node.needs[0] else None, grad_b)


def scale(x: Tensor) -> Tensor:
    """`x * number` as ATen's C++ code writes it (`mul.Scalar`)."""
    return elementwise("mul.Scalar", (x,), differentiate("MulBackward1", (x,), _mul_scalar_backward))


def _mul_scalar_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,) = grads
    assert g is not None
    return (elementwise("mul.Scalar", (g,)),)


def neg(x: Tensor) -> Tensor:
    """`-x`."""
    return elementwise("neg", (x,), differentiate("NegBackward0", (x,), _neg_backward))


def _neg_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,) = grads
    assert g is not None
    return (elementwise("neg", (g,)),)


def power(x: Tensor) -> Tensor:
    """`x.pow(n)`; backward is grad · (n · x.pow(n-1))."""
    x = autocast_fp32(x)
    node = differentiate("PowBackward0", (x,), _power_backward)
    if node:
        node.save(x)
    return elementwise("pow.Tensor_Scalar", (x,), node)


def _power_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (x,) = grads, node.unpack()
    assert g is not None
    lower = elementwise("pow.Tensor_Scalar", (x,))  # named: C++ keeps temporaries to the end of the expression
    slope = elementwise("mul.Scalar", (lower,))
    return (elementwise("mul.Tensor", (g, slope)),)


def rsqrt(x: Tensor) -> Tensor:
    """`torch.rsqrt(x)`; backward is -½ · grad · y³."""
    x = autocast_fp32(x)
    node = differentiate("RsqrtBackward0", (x,), _rsqrt_backward)
    out = elementwise("rsqrt", (x,), node)
    if node:
        node.save_output(out)
    return out


def _rsqrt_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (y,) = grads, node.unpack()
    assert g is not None
    cube = elementwise("pow.Tensor_Scalar", (y,))
    return (elementwise("mul.Tensor", (elementwise("mul.Scalar", (g,)), cube)),)


def mean_last(x: Tensor) -> Tensor:
    """`x.mean(-1, keepdim=True)`."""
    node = differentiate("MeanBackward1", (x,), _mean_backward, (x.shape,))
    return emit("mean.dim", (x,), (*x.shape[:-1], 1), x.dtype, node=node, attrs=Attrs(dims=(len(x.shape) - 1,)))


def _mean_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,) = grads
    assert g is not None
    spread = view_as("expand", g, node.attrs[0], (*g.strides[:-1], 0))
    return (elementwise("div.Scalar", (spread,)),)


def silu(x: Tensor) -> Tensor:
    """SiLU; saves its input."""
    return _activation("silu", "SiluBackward0", "silu_backward", x)


def gelu(x: Tensor) -> Tensor:
    """Exact GELU; saves its input."""
    return _activation("gelu", "GeluBackward0", "gelu_backward", x)


def _activation(name: str, node_name: str, backward_op: str, x: Tensor) -> Tensor:
    node = differentiate(node_name, (x,), _activation_backward, (backward_op,))
    if node:
        node.save(x)
    return elementwise(name, (x,), node)


def tanh(x: Tensor) -> Tensor:
    """tanh; saves its output."""
    return _output_activation("tanh", "TanhBackward0", "tanh_backward", x)


def sigmoid(x: Tensor) -> Tensor:
    """The logistic function; saves its output."""
    return _output_activation("sigmoid", "SigmoidBackward0", "sigmoid_backward", x)


def relu(x: Tensor) -> Tensor:
    """ReLU; saves its output."""
    return _output_activation("relu", "ReluBackward0", "threshold_backward", x)


def _output_activation(name: str, node_name: str, backward_op: str, x: Tensor) -> Tensor:
    node = differentiate(node_name, (x,), _activation_backward, (backward_op,))
    out = elementwise(name, (x,), node)
    if node:
        node.save_output(out)
    return out


def _activation_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (saved,) = grads, node.unpack()
    assert g is not None
    return (elementwise(node.attrs[0], (g, saved)),)


def gelu_tanh(x: Tensor) -> Tensor:
    """GPT-2's `gelu_new`, written out in Python: 0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))."""
    return mul(mul(x, 0.5), add(tanh(mul(add(x, mul(power(x), 0.044715)), 0.797884)), 1.0))


def unary(name: str, x: Tensor) -> Tensor:
    """An elementwise op that nothing differentiates (cos, sin, ne, …)."""
    return elementwise(name, (x,))


def binary_bool(name: str, a: Tensor, b: Tensor) -> Tensor:
    """An elementwise comparison or boolean op."""
    return elementwise(name, (a, b), dtype="bool")


def where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`torch.where` of two scalars by a mask."""
    return elementwise("where.self", (condition, a, b), dtype=a.dtype)


def masked(allowed: Tensor, x: Tensor, constant: Tensor) -> Tensor:
    """`torch.where(allowed, x, constant)`: the gradient is zero where it is not allowed."""
    node = differentiate("WhereBackward0", (x,), _masked_backward)
    if node:
        node.save(allowed)
    return elementwise("where.self", (allowed, x, constant), node, dtype=x.dtype)


def _masked_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (allowed,) = grads, node.unpack()
    assert g is not None
    return (elementwise("where.self", (allowed, g, fill("scalar_tensor", (), g.dtype)), dtype=g.dtype),)


def fill(name: str, shape: Shape, dtype: str, like: Tensor | None = None) -> Tensor:
    """`zeros`, `ones`, `arange`, `scalar_tensor`, …: no input is read unless `like` is dispatched with it."""
    return emit(name, (like,) if like is not None else (), shape, dtype)


def empty_like(x: Tensor) -> Tensor:
    """Memory alone, of a tensor's shape and strides."""
    return emit("empty_like", (x,), x.shape, x.dtype, strides=x.strides)


def dropout(x: Tensor, p: float) -> Tensor:
    """Dropout in training. CUDA has one fused kernel with a bool mask; the CPU multiplies by a mask of x's dtype."""
    if p == 0:
        return x
    if tape().device == "cuda":
        node = differentiate("NativeDropoutBackward0", (x,), _native_dropout_backward)
        from .core import new_tensor

        out = new_tensor(x.shape, x.dtype, elementwise_strides(x.shape, ((x.shape, x.strides),)))
        mask = new_tensor(x.shape, "bool", out.strides)
        record("native_dropout", (x,), (out, mask))
        if node:
            node.save(mask)
            node.produces(out)
        return out
    noise = emit("empty_like", (x,), x.shape, x.dtype, strides=elementwise_strides(x.shape, ((x.shape, x.strides),)))
    record("bernoulli_.float", (noise,), (noise,))
    record("div_.Scalar", (noise,), (noise,))
    return mul(x, noise)


def _native_dropout_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (mask,) = grads, node.unpack()
    assert g is not None
    return (elementwise("native_dropout_backward", (g, mask), dtype=g.dtype),)


def reduce_dims(g: Tensor, dims: tuple[int, ...]) -> Tensor:
    """`g.sum(dims, keepdim=True)`."""
    shape = tuple(1 if i in dims else d for i, d in enumerate(g.shape))
    return emit("sum.dim_IntList", (g,), shape, g.dtype, attrs=Attrs(dims=dims))


def sum_to(g: Tensor, shape: Shape) -> Tensor:
    """Reduce a gradient to the shape of the tensor that was broadcast (`at::sum_to`)."""
    lead = len(g.shape) - len(shape)
    dims = tuple(range(lead)) + tuple(
        i for i in range(lead, len(g.shape)) if is_one(shape[i - lead]) and not is_one(g.shape[i])
    )
    if dims:
        g = reduce_dims(g, dims)
    return view(g, shape) if lead else g


def autocast_fp32(x: Tensor) -> Tensor:
    """CUDA autocast runs pow, rsqrt, softmax, layer norm, losses and sums in fp32; the CPU's list is shorter."""
    if tape().autocast and tape().device == "cuda" and x.is_floating:
        return cast(x, "fp32")
    return x


def cat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate; mixed dtypes are promoted within the kernel, under autocast by casts of floating operands."""
    dim = dim % len(tensors[0].shape)
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = promote(dtype, t.dtype)
    if tape().autocast:
        tensors = [cast(t, dtype) if t.is_floating else t for t in tensors]
    total: Dim = sum(t.shape[dim] for t in tensors)
    shape = (*tensors[0].shape[:dim], total, *tensors[0].shape[dim + 1 :])
    node = differentiate("CatBackward0", tensors, _cat_backward, (dim, tuple(t.shape[dim] for t in tensors)))
    return emit("cat", tensors, shape, dtype, node=node)


def _cat_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    from .shape import narrow

    (g,) = grads
    assert g is not None
    dim, sizes = node.attrs
    if len(g.shape) == 1:
        for size in sizes:
            if isinstance(size, int) and not size:
                fill("zeros", (0,), g.dtype)  # an empty vector is left out, but gets a gradient of its own
    return tuple(narrow(g, dim, size) if needed else None for size, needed in zip(sizes, node.needs, strict=True))
