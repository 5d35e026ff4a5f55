"""Custom autograd Functions of methods that bring their own backward rule.

Inside a `torch.autograd.Function` nothing builds a graph, and what is saved and how gradients are formed is the
author's choice. `torch.amp.custom_fwd` and `custom_bwd` run backward under the autocast of the forward.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from ..program.dims import Dim, product
from .autograd import differentiate
from .core import emit, record, tape
from .linalg import addmm, autocast_operand, conv1d, layout_of, linear, mm
from .pointwise import add
from .shape import contiguous, reshape, t, view
from .tensor import Backward, Grads, Node, Storage, Tensor

Grad = Tensor | None
R = TypeVar("R")


@contextmanager
def autocasting(dtype: str | None) -> Iterator[None]:
    """`custom_bwd`: the autocast state that the forward had."""
    current = tape()
    before, current.autocast = current.autocast, dtype
    try:
        yield
    finally:
        current.autocast = before


def python_function() -> None:
    """The Python of a Function and of the kernels it launches costs the host what a module's call costs."""
    tape().part.host.modules += 1


def on_base(call: Callable[..., R], *arguments: Any) -> R:
    """Inside a method's operator: run what the base model would run without it (a layer's product) on its account."""
    with tape().belonging_to("base"):
        return call(*arguments)


def in_place_of_base(
    name: str, inputs: Sequence[Tensor], backward: Backward, attrs: tuple[object, ...] = ()
) -> Node | None:
    """A node of an operator that stands in for the base layer: the gradient that it hands down is the base's, but what
    its rule runs is the adapter's, `on_base` excepted."""

    def rule(node: Node, grads: Sequence[Grad]) -> Grads:
        with tape().belonging_to("adapter"):
            return backward(node, grads)

    node = differentiate(name, inputs, rule, attrs)
    if node:
        node.owner = "base"
    return node


def as_rows(x: Tensor) -> Tensor:
    """`x.reshape(-1, width)`: tokens as the rows of a matrix."""
    return reshape(x, (product(x.shape[:-1]), x.shape[-1])) if len(x.shape) > 2 else x


def index_buffer(size: Dim) -> Tensor:
    """A buffer of int64 indices that was there before the step."""
    return Tensor((size,), "i64", (1,), size, Storage(0, None))


def write_columns(weight: Tensor, indices: Tensor, values: Tensor) -> None:
    """`weight.data[:, indices] = values`: in place, without autograd."""
    record("index_put_", (weight, indices, values), (weight,))


def gather(x: Tensor, indices: Tensor) -> Tensor:
    """`x[..., indices]` inside a Function, so without a graph."""
    return emit("index.Tensor", (x, indices), (*x.shape[:-1], indices.shape[0]), x.dtype)


def partial_linear(
    x: Tensor, weight: Tensor, columns: Tensor, bias: Tensor | None, indices: Tensor, *, is_conv1d: bool
) -> Tensor:
    """PaCA's linear: one GEMM forward, but only the trained input columns of x are kept for the gradient.

    `weight` holds the columns' values already; `columns` (n_out, r) receives the gradient (Conv1D: (r, n_out)).
    """
    attrs = (is_conv1d, x.shape, tape().autocast)
    node = in_place_of_base("PartialLinearBackward", (x, weight, columns), _partial_linear_backward, attrs)
    with tape().no_grad():
        if is_conv1d:
            assert bias is not None
            out = on_base(conv1d, x, weight, bias)
        else:
            out = on_base(linear, x, weight, bias)
        kept = gather(x, indices)
    if node:
        node.save(kept, weight)
        node.produces(out)
    return out


def _partial_linear_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (kept, weight) = grads, node.unpack()
    assert g is not None
    is_conv1d, shape, autocast = node.attrs
    g, grad_x = as_rows(g), None
    with autocasting(autocast):
        g = autocast_operand(g)
        if node.needs[0]:
            grad_x = view(on_base(mm, g, on_base(autocast_operand, t(weight) if is_conv1d else weight)), shape)
        kept = as_rows(kept)
        grad_columns = mm(autocast_operand(t(kept)), g) if is_conv1d else mm(t(g), autocast_operand(kept))
    return (grad_x, None, grad_columns)


def addmm_(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`y.addmm_(a, b)`: y += a·b in the GEMM's epilogue."""
    record("addmm_", (y, a, b), (y,), attrs=layout_of(a, b))
    return y


FORWARDS, BACKWARDS = range(1, 5), range(1, 9)


def run_lora(x: Tensor, w: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, forward: int, backward: int) -> Tensor:
    """RunLoRA's operator: b + x·w + (x·u)·v in one of four forward orders, with one of eight backward orders.

    x (…, n), w (n, m) frozen, u (n, r), v (r, m). Saves x, w, u and v, no product.
    """
    node = in_place_of_base("RunLoRABackward", (x, w, u, v), _run_lora_backward, (backward, x.shape))
    shape = (*x.shape[:-1], w.shape[1])
    with tape().no_grad():
        if forward == 4:
            y = view(on_base(mm, as_rows(x), addmm(w, u, v)), shape, "_unsafe_view")
            out = add(bias, y) if bias is not None else y
        else:
            out = view(_run_lora_rows(as_rows(contiguous(x)), w, u, v, bias, forward), shape)
    if node:
        node.save(x, w if node.needs[0] else None, u, v)
        node.produces(out)
    return out


def _product(bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return addmm(bias, a, b) if bias is not None else mm(a, b)


def _run_lora_rows(x: Tensor, w: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, forward: int) -> Tensor:
    if forward == 1:
        return addmm_(on_base(_product, bias, x, w), mm(x, u), v)
    if forward == 2:
        return on_base(_product, bias, x, addmm(w, u, v))
    return on_base(addmm_, _product(bias, mm(x, u), v), x, w)


def _run_lora_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (x, w, u, v) = grads, node.unpack()
    assert g is not None
    order, shape = node.attrs
    x, g = as_rows(contiguous(x)), as_rows(contiguous(g))
    inner = mm(g, t(v)) if order in (1, 2) else None  # kept for x's gradient
    dense = mm(t(x), g) if order in (3, 4) else None  # kept for v's gradient
    if inner is not None or order in (5, 8):
        grad_u = mm(t(x), inner if inner is not None else mm(g, t(v)))
    else:
        grad_u = mm(dense if dense is not None else mm(t(x), g), t(v))
    if order in (1, 5):
        grad_v = mm(t(mm(x, u)), g)
    elif order in (6, 7):
        grad_v = mm(mm(t(u), t(x)), g)
    else:
        grad_v = mm(t(u), dense if dense is not None else mm(t(x), g))
    grad_x = view(_run_lora_input_grad(g, w, u, v, order, inner), shape) if node.needs[0] else None
    return (grad_x, None, grad_u, grad_v)


def _run_lora_input_grad(g: Tensor, w: Tensor, u: Tensor, v: Tensor, order: int, inner: Grad) -> Tensor:
    """g·(w + u·v)ᵀ."""
    if order in (4, 5):
        return on_base(mm, g, t(addmm(w, u, v)))
    if order in (7, 8):
        return on_base(mm, g, add(t(w), mm(t(v), t(u))))
    if order == 6:
        return add(on_base(mm, g, t(w)), mm(mm(g, t(v)), t(u)))
    return addmm_(on_base(mm, g, t(w)), inner if inner is not None else mm(g, t(v)), t(u))
