"""Ops of virtual tokens: repeated over a batch, cut into the keys and values of every block, made on the host."""

from collections.abc import Sequence

from ..program.dims import Dim, is_one, product
from ..program.op import Attrs, Op, Spec
from .autograd import differentiate
from .core import append_op, emit, new_tensor, record
from .shape import narrow, reshape
from .tensor import Grads, Node, Storage, Tensor

Grad = Tensor | None


def repeat_batch(x: Tensor, times: Dim) -> Tensor:
    """`x.repeat(times, 1, 1)` of a (1, p, d) tensor."""
    node = differentiate("RepeatBackward0", (x,), _repeat_backward, (x.shape,))
    return emit("repeat", (x,), (times, *x.shape[1:]), x.dtype, node=node)


def _repeat_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (shape,) = grads, node.attrs
    assert g is not None
    if is_one(g.shape[0]):
        return (g,)
    g = reshape(g, (g.shape[0], *shape))
    return (emit("sum.dim_IntList", (g,), shape, g.dtype, attrs=Attrs(dims=(0,))),)


def split_layers(x: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """`x.split(2)` of (2 · layers, …): keys and values of every layer, one tensor (2, …) for each run of like layers.

    Args:
        counts: layers of each run; the gradient of a run's one tensor stands for as many.
    """
    node = differentiate("SplitBackward0", (x,), _split_layers_backward, (tuple(counts), x.shape))
    shape = (2, *x.shape[1:])
    outs = [Tensor(shape, x.dtype, x.strides, product(shape), x.storage) for _ in counts]
    record("split.Tensor", (x,), outs, view=True)
    if node:
        node.produces(*outs)
    return outs


def _split_layers_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    counts, shape = node.attrs
    made: list[Tensor] = []
    for g, count in zip(grads, counts, strict=True):
        assert g is not None
        g.storage.copies = count  # they waited, one of each layer, for the last one
        made.append(g)
    out = new_tensor(shape, made[0].dtype)
    inputs = tuple(Spec(g.dtype, g.shape, count) for g, count in zip(made, counts, strict=True))
    outputs = (out.spec,)
    append_op(Op("cat", inputs, outputs, sum(s.nbytes for s in inputs), out.nbytes), made, (out,))
    return (out,)


def unbind_pair(x: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """`first, second = x.unbind(dim)` of a tensor with two entries there."""
    dim = dim % len(x.shape)
    node = differentiate("UnbindBackward0", (x,), _unbind_backward, (x.shape,))
    shape, strides = (*x.shape[:dim], *x.shape[dim + 1 :]), (*x.strides[:dim], *x.strides[dim + 1 :])
    first, second = (Tensor(shape, x.dtype, strides, product(shape), x.storage) for _ in range(2))
    record("unbind.int", (x,), (first, second), view=True)
    if node:
        node.produces(first, second)
    return first, second


def _unbind_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    parts = [g for g in grads if g is not None]
    return (emit("stack", parts, node.attrs[0], parts[0].dtype),)


def first_in_cache(x: Tensor) -> Tensor:
    """What `DynamicLayer.update` makes of the first tensor it gets: a concatenation with an empty one."""
    empty = Tensor((0,), x.dtype, (1,), 0, Storage(0, None))
    node = differentiate("CatBackward0", (x,), _first_in_cache_backward, (x.shape,))
    return emit("cat", (empty, x), x.shape, x.dtype, node=node)


def _first_in_cache_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,) = grads
    assert g is not None
    emit("zeros", (), (0,), g.dtype)  # the empty tensor's gradient, needed or not
    return (narrow(g, -2, node.attrs[0][-2]),)
