"""What losses on log-probabilities are made of, each with its backward rule beneath it (derivatives.yaml)."""

from collections.abc import Sequence

from ..program.dims import decide, only
from ..program.op import ON_HOST, PLAIN, Attrs
from .autograd import differentiate
from .core import emit, new_tensor, record, tape
from .elementary import div
from .pointwise import elementwise, fill
from .shape import unsqueeze, view_as
from .split import stack
from .tensor import Backward, Grads, Node, Tensor

Grad = Tensor | None


def unbound(x: Tensor, dim: int = 0) -> list[Tensor]:
    """The slices of x along a dim (`for row in x`, `x.unbind(dim)`): views, whose gradients are stacked again.

    Raises:
        MixedStructure: a grid on whose points there are not equally many.
    """
    count = only(x.shape[dim])
    shape, strides = ((*given[:dim], *given[dim + 1 :]) for given in (x.shape, x.strides))
    node = differentiate("UnbindBackward0", (x,), _unbound_backward, (dim,))
    made = [Tensor(shape, x.dtype, strides, x.numel // count, x.storage) for _ in range(count)]
    record("unbind.int", (x,), made, view=True)
    if node:
        node.produces(*made)
    return made


def _unbound_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    return (stack([g for g in grads if g is not None], node.attrs[0]),)


def logsumexp(x: Tensor) -> Tensor:
    """`torch.logsumexp(x, dim=-1)`; backward is grad · exp(x - result)."""
    node = differentiate("LogsumexpBackward0", (x,), _logsumexp_backward)
    if node:
        node.save(x)
    last = Attrs(dims=(len(x.shape) - 1,))
    out = emit("logsumexp", (x,), x.shape[:-1], x.dtype, node=node, attrs=last)
    if node:
        node.save_output(out)
    return out


def _logsumexp_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (x, result) = grads, node.unpack()
    assert g is not None
    shares = elementwise("exp", (elementwise("sub.Tensor", (x, unsqueeze(result, -1))),))
    return (elementwise("mul.Tensor", (unsqueeze(g, -1), shares)),)


def gather_last(x: Tensor, index: Tensor) -> Tensor:
    """`x.gather(-1, index)`; the gradient is added to zeros of the whole."""
    node = differentiate("GatherBackward0", (x,), _gather_backward, (x.shape,))
    if node:
        node.save(index)
    return emit("gather", (x, index), index.shape, x.dtype, node=node)


def _gather_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (index,) = grads, node.unpack()
    assert g is not None
    zeros = emit("new_zeros", (g,), node.attrs[0], g.dtype)
    if tape().view_replay:  # tensor subclasses are not changed in place
        return (emit("scatter_add", (zeros, index, g), zeros.shape, g.dtype),)
    record("scatter_add_", (zeros, index, g), (zeros,))
    return (zeros,)


def log_sigmoid(x: Tensor) -> Tensor:
    """`F.logsigmoid(x)`; on the CPU a buffer is kept for its gradient."""
    node = differentiate("LogSigmoidBackward0", (x,), _log_sigmoid_backward)
    if node:
        node.save(x)
    out, buffer = (new_tensor(shape, x.dtype) for shape in (x.shape, x.shape if tape().device == "cpu" else (0,)))
    record("log_sigmoid_forward", (x,), (out, buffer))
    if node:
        node.save(buffer)
        node.produces(out)
    return out


def _log_sigmoid_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (x, buffer) = grads, node.unpack()
    assert g is not None
    return (emit("log_sigmoid_backward", (g, x, buffer), x.shape, g.dtype),)


def mean_all(x: Tensor) -> Tensor:
    """`x.mean()`."""
    node = differentiate("MeanBackward0", (x,), _mean_all_backward, (x.shape,))
    return emit("mean", (x,), (), x.dtype, node=node)


def _mean_all_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (shape,) = grads, node.attrs
    assert g is not None
    return (elementwise("div.Scalar", (view_as("expand", g, shape, (0,) * len(shape)),)),)


def sum_all(x: Tensor) -> Tensor:
    """`x.sum()`; flags are counted."""
    node = differentiate("SumBackward0", (x,), _sum_all_backward, (x.shape,))
    return emit("sum", (x,), (), "i64" if x.dtype == "bool" else x.dtype, node=node)


def _sum_all_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (shape,) = grads, node.attrs
    assert g is not None
    return (view_as("expand", g, shape, (0,) * len(shape)),)


def lesser(a: Tensor, b: Tensor) -> Tensor:
    """`torch.min(a, b)`, the gradient halved where they are equal."""
    return _one_of_two("minimum", "MinimumBackward0", a, b, beyond=("gt.Tensor", "lt.Tensor"))


def greater(a: Tensor, b: Tensor) -> Tensor:
    """`torch.max(a, b)`, the gradient halved where they are equal."""
    return _one_of_two("maximum", "MaximumBackward0", a, b, beyond=("lt.Tensor", "gt.Tensor"))


def _one_of_two(name: str, node_name: str, a: Tensor, b: Tensor, *, beyond: tuple[str, str]) -> Tensor:
    node = differentiate(node_name, (a, b), _one_of_two_backward, (beyond,))
    if node:
        node.save(a, b)
    return elementwise(name, (a, b), node)


def _one_of_two_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (a, b), (beyond,) = grads, node.unpack(), node.attrs
    assert g is not None

    def part(other: str) -> Tensor:
        equal, halved = elementwise("eq.Tensor", (a, b), dtype="bool"), elementwise("div.Scalar", (g,))
        grad = elementwise("where.self", (equal, halved, g), dtype=g.dtype)
        past = elementwise(other, (a, b), dtype="bool")
        record("masked_fill_.Scalar", (grad, past), (grad,))
        return grad

    return tuple(part(other) if needed else None for other, needed in zip(beyond, node.needs, strict=True))


def natural_exp(x: Tensor) -> Tensor:
    """`torch.exp(x)`; saves its output."""
    return _saving_output("exp", "ExpBackward0", x, _exp_backward)


def _exp_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (y,) = grads, node.unpack()
    assert g is not None
    return (elementwise("mul.Tensor", (g, y)),)


def exp_less_one(x: Tensor) -> Tensor:
    """`torch.expm1(x)`; saves its output."""
    return _saving_output("expm1", "Expm1Backward0", x, _exp_less_one_backward)


def _exp_less_one_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (y,) = grads, node.unpack()
    assert g is not None
    return (elementwise("mul.Tensor", (g, elementwise("add.Scalar", (y,)))),)


def _saving_output(name: str, node_name: str, x: Tensor, backward: Backward) -> Tensor:
    node = differentiate(node_name, (x,), backward)
    out = elementwise(name, (x,), node)
    if node:
        node.save_output(out)
    return out


def natural_log(x: Tensor) -> Tensor:
    """`torch.log(x)`."""
    node = differentiate("LogBackward0", (x,), _log_backward)
    if node:
        node.save(x)
    return elementwise("log", (x,), node)


def _log_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (x,) = grads, node.unpack()
    assert g is not None
    return (elementwise("div.Tensor", (g, x)),)


def log_of_more(x: Tensor) -> Tensor:
    """`torch.log1p(x)`."""
    node = differentiate("Log1PBackward0", (x,), _log_of_more_backward)
    if node:
        node.save(x)
    return elementwise("log1p", (x,), node)


def _log_of_more_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (x,) = grads, node.unpack()
    assert g is not None
    return (elementwise("div.Tensor", (g, elementwise("add.Scalar", (x,)))),)


def either(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`torch.where(condition, a, b)` of two tensors with gradients."""
    node = differentiate("WhereBackward0", (a, b), _either_backward)
    if node:
        node.save(condition)
    return elementwise("where.self", (condition, a, b), node, dtype=a.dtype)


def _either_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (condition,) = grads, node.unpack()
    assert g is not None

    def part(first: bool) -> Tensor:
        zero = fill("scalar_tensor", (), g.dtype)
        return elementwise("where.self", (condition, g, zero) if first else (condition, zero, g), dtype=g.dtype)

    return (part(True) if node.needs[0] else None, part(False) if node.needs[1] else None)


def samples_at(x: Tensor, indices: Tensor) -> Tensor:
    """`x.index_select(0, indices)`; the gradient is added to zeros of the whole."""
    node = differentiate("IndexSelectBackward0", (x,), _samples_at_backward, (x.shape,))
    if node:
        node.save(indices)
    attrs = PLAIN if decide(indices.numel > 0) else ON_HOST  # of nothing there is nothing to copy
    return emit("index_select", (x, indices), (*indices.shape, *x.shape[1:]), x.dtype, node=node, attrs=attrs)


def _samples_at_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (indices,) = grads, node.unpack()
    assert g is not None
    zeros = emit("new_zeros", (g,), node.attrs[0], g.dtype)
    record("index_add_", (zeros, indices, g), (zeros,))
    return (zeros,)


def complement(x: Tensor) -> Tensor:
    """`1 - x`."""
    return elementwise("rsub.Scalar", (x,), differentiate("RsubBackward1", (x,), _complement_backward))


def _complement_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,) = grads
    assert g is not None
    return (elementwise("neg", (g,)),)


def nan_sum(x: Tensor) -> Tensor:
    """`x.nansum()`."""
    node = differentiate("NansumBackward0", (x,), _nan_sum_backward)
    if node:
        node.save(x)
    return emit("nansum", (x,), (), x.dtype, node=node)


def _nan_sum_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (x,) = grads, node.unpack()
    assert g is not None
    spread = view_as("expand", g, x.shape, (0,) * len(x.shape))
    real = elementwise("logical_not", (elementwise("isnan", (x,), dtype="bool"),), dtype="bool")
    return (elementwise("mul.Tensor", (spread, real)),)


def nan_mean(x: Tensor) -> Tensor:
    """`x.nanmean()`."""
    real = elementwise("ne.Tensor", (x, x), dtype="bool")
    record("logical_not_", (real,), (real,))
    count = emit("sum.dim_IntList", (real,), (), "i64")
    return div(nan_sum(x), count)
