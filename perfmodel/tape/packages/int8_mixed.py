"""Linear layers whose products run in 8-bit integers on weights that stay as they are, as torchao trains them.

All three products round both operands anew: each row of the first and each column of the second has a scale, its
largest value over 127. The Triton kernel takes the second with the summed dim side by side and multiplies by both
scales; operands that lie otherwise are copied once they are rounded. Nothing is kept in 8 bit.
Source: torchao 0.18, prototype/quantized_training/int8_mixed_precision.py (`Int8MixedPrecisionTrainingLinear`, which
`module_swap=True` makes; weights of a class of their own, the default there, never reach the integer products), int8.py
(`quantize_int8_rowwise`), int8_mm.py.
"""

from collections.abc import Sequence

from ...errors import UserError
from ...program.dims import product, view_strides
from ...program.op import Attrs
from ..autograd import differentiate
from ..core import emit, tape
from ..custom import python_function
from ..elementary import div
from ..pointwise import add, cast, elementwise, mul
from ..shape import contiguous, permute, view
from ..tensor import Grads, Node, Tensor

Grad = Tensor | None


def int8_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = x·Wᵀ + b of a weight (n_out, n_in) in the dtype of x."""
    inputs = (x, weight) if bias is None else (x, weight, bias)
    node = differentiate("_Int8MixedPrecisionTrainingLinearFunctionBackward", inputs, _int8_linear_backward)
    python_function()
    with tape().no_grad():
        out = _product(x, _turned(weight))
        if bias is not None:
            out = add(out, bias)
    if node:
        node.save(x, weight)
        node.produces(out)
    return out


def _int8_linear_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (x, weight) = grads, node.unpack()
    assert g is not None
    python_function()
    grad_x = _product(g, weight) if node.needs[0] else None
    grads_of: list[Grad] = [grad_x, *(None for _ in node.needs[1:])]
    if node.needs[1]:
        g, x = _rows(g), _rows(x)
        grads_of[1] = _turned(_product(_turned(x), g))
    if node.needs[2:] == (True,):
        grads_of[2] = emit("sum.dim_IntList", (g,), (g.shape[1],), g.dtype, attrs=Attrs(dims=(0,)))
    return tuple(grads_of)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a (…, k) by b (k, n), in the dtype of a."""
    left, of_rows = _rounded(_rows(a))
    right, of_columns = _rounded(_turned(b))
    operands = (contiguous(left), _turned(contiguous(right)), of_rows, of_columns)
    shape = (left.shape[0], right.shape[0])
    out = emit("torchao::scaled_int8_mm", operands, shape, of_rows.dtype, attrs=Attrs("tn"))
    return view(out, (*a.shape[:-1], out.shape[-1]))


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix in 8 bit, and the scale of each of its rows in its own dtype."""
    scale = div(emit("amax", (elementwise("abs", (x,)),), (x.shape[0],), x.dtype, attrs=Attrs(dims=(1,))), 127.0)
    inverse = cast(scale, "fp32")
    for name in ("clamp", "reciprocal", "mul.Tensor"):
        inverse = elementwise(name, (inverse,))
    x = cast(x, "fp32")
    x = mul(x, view(inverse, (x.shape[0], 1)))
    for name in ("round", "clamp"):
        x = elementwise(name, (x,))
    return cast(x, "i8"), scale


def _rows(x: Tensor) -> Tensor:
    """`x.view(-1, width)`, which copies nothing."""
    shape = (product(x.shape[:-1]), x.shape[-1])
    if view_strides(x.shape, x.strides, shape) is None:
        raise UserError("int8 mixed: torchao's layer fails on this model, whose rows lie out of order; leave int8 out")
    return view(x, shape)


def _turned(x: Tensor) -> Tensor:
    """`x.T` of a matrix."""
    return permute(x, (1, 0))
