"""Linear layers whose products run in 8-bit floats, as torchao trains them (`Float8Linear`).

Every product scales both operands to what the format holds and casts them, forward and backward anew. The tensor cores
take them only with the summed dim side by side, so operands that lie otherwise are copied. The weight's gradient is
computed even of a frozen weight. Recipes: tensorwise, one scale a tensor, gradients in e5m2; padded, the same with
summed dims padded to 16; rowwise, a scale a row or column, a power of two.
Source: torchao 0.18, float8/float8_linear.py, float8_utils.py (`tensor_to_scale`), float8_training_tensor.py
(`_ToFloat8ConstrFunc`), float8_ops.py (`preprocess_addmm`, `addmm_float8_unwrapped`).
"""

from collections.abc import Sequence
from typing import NamedTuple

from ...errors import UserError
from ...program.dims import decide, same
from ...program.op import Attrs
from ..autograd import differentiate
from ..core import emit, record, tape
from ..custom import as_rows, python_function
from ..linalg import linear
from ..pointwise import add, cast, elementwise, mul
from ..shape import clone, reshape, t
from ..tensor import Grads, Node, Tensor

Grad = Tensor | None
MULTIPLE = 16  # of which the dims of operands have to be multiples
ROUNDED = ("fp32", "fp16")  # dtypes that a product with scales by row gives in bf16 first


class Scaled(NamedTuple):
    """A tensor in 8 bits and what it was multiplied by: one number, or one of each row or column."""

    values: Tensor
    scale: Tensor

    def turned(self) -> "Scaled":
        """The transpose of a matrix."""
        return Scaled(t(self.values), t(self.scale) if self.scale.shape else self.scale)


def linear_or_float8(x: Tensor, weight: Tensor, bias: Tensor | None, recipe: str) -> Tensor:
    """An `nn.Linear`, converted by a recipe if its dims are multiples of 16 (`filter_linear_layers`)."""
    if not all(decide(n % MULTIPLE == 0) for n in weight.shape):
        return linear(x, weight, bias)
    return float8_linear(x, weight, bias, recipe)


def float8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, recipe: str) -> Tensor:
    """y = x·Wᵀ + b of a module whose weight is (n_out, n_in), both multiples of 16."""
    if tape().autocast and tape().device == "cuda":  # what `torch.is_autocast_enabled()` asks
        x = cast(x, tape().autocast or x.dtype)
    y = _product(x, t(weight), recipe)
    return add(y, cast(bias, y.dtype)) if bias is not None else y


def _product(x: Tensor, weight: Tensor, recipe: str) -> Tensor:
    """x (…, n_in) by (n_in, n_out); keeps both as they are."""
    node = differentiate("matmul_with_hp_or_float8_argsBackward", (x, weight), _product_backward, (recipe,))
    python_function()
    with tape().no_grad():
        a = _scaled(x, "e4m3", recipe, -1)
        b = _scaled(weight, "e4m3", recipe, 0)
        rows = Scaled(as_rows(a.values), as_rows(a.scale))
        out = _scaled_mm(rows, b, recipe, tape().autocast or x.dtype, fast=True)
        out = reshape(out, (*x.shape[:-1], out.shape[-1]))
    if node:
        node.save(x, weight)
        node.produces(out)
    return out


def _product_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    """Both gradients, whoever asks for them."""
    (g,), (x, weight), (recipe,) = grads, node.unpack(), node.attrs
    assert g is not None
    python_function()
    rows, of_gradient = as_rows(g), "e4m3" if recipe == "rowwise" else "e5m2"
    a = _scaled(rows, of_gradient, recipe, -1)
    b = _scaled(weight, "e4m3", recipe, -1)
    grad_x = _scaled_mm(a, b.turned(), recipe, g.dtype)
    grad_x = reshape(grad_x, (*g.shape[:-1], grad_x.shape[-1]))
    of_rows = as_rows(x)
    c = _scaled(rows, of_gradient, recipe, 0)
    d = _scaled(of_rows, "e4m3", recipe, 0)
    return (grad_x, t(_scaled_mm(c.turned(), d, recipe, g.dtype)))


def _scaled(x: Tensor, dtype: str, recipe: str, axis: int) -> Scaled:
    """x in 8 bits; with scales by row or column those run along `axis`."""
    if recipe == "rowwise":
        axis %= len(x.shape)
        shape = tuple([1 if i == axis else d for i, d in enumerate(x.shape)])
        largest = emit("amax", (elementwise("abs", (x,)),), shape, x.dtype, attrs=Attrs(dims=(axis,)))
    else:
        largest = emit("max", (elementwise("abs", (x,)),), (), x.dtype)
    scale = cast(largest, "fp64")
    for name in ("clamp", "reciprocal", "mul.Tensor"):
        scale = elementwise(name, (scale,))
    scale = cast(scale, "fp32")
    for name in ("log2", "floor", "exp2") if recipe == "rowwise" else ():
        scale = elementwise(name, (scale,))
    multiplied = mul(cast(x, "fp32"), scale)
    return Scaled(cast(elementwise("clamp", (multiplied,)), dtype), scale)


def _scaled_mm(a: Scaled, b: Scaled, recipe: str, dtype: str, *, fast: bool = False) -> Tensor:
    """(p, q) by (q, r); with scales by row and without fast accumulation they are multiplied on afterwards."""
    left, right = a.values, b.values
    if recipe == "padded":
        left, right = _padded(left, 1), _padded(right, 0)
    elif not decide(left.shape[1] % MULTIPLE == 0):
        raise UserError(
            f"fp8 {recipe}: float8 products sum over multiples of {MULTIPLE}; make the tokens of a micro-batch one, or "
            "use fp8 padded"
        )
    if not _row_major(left):
        left = clone(left)
    if _row_major(right):
        right = t(clone(t(right)))
    of_a, of_b = (elementwise("reciprocal", (s,)) for s in (a.scale, b.scale))
    after = None
    if recipe == "rowwise" and not fast:
        after = mul(of_a, of_b)
        of_a = emit("new_ones", (of_a,), (), "fp32")
        of_b = emit("new_ones", (of_a,), (), "fp32")
    made = "bf16" if recipe == "rowwise" and dtype in ROUNDED else dtype
    shape = (left.shape[0], right.shape[1])
    out = emit("_scaled_mm", (left, right, of_a, of_b), shape, made, attrs=Attrs("tn"))
    if after is not None:
        record("mul_.Tensor", (out, after), (out,))
    return cast(out, dtype)


def _row_major(x: Tensor) -> bool:
    return same(x.strides[1], 1)


def _padded(x: Tensor, dim: int) -> Tensor:
    """Zeros behind a dim up to a multiple of 16: a copy in any case, which lies as x does where there are none."""
    if decide(x.shape[dim] % MULTIPLE == 0):
        return emit("constant_pad_nd", (x,), x.shape, x.dtype, strides=x.strides)
    shape = tuple([-(-d // MULTIPLE) * MULTIPLE if i == dim else d for i, d in enumerate(x.shape)])
    return emit("constant_pad_nd", (x,), shape, x.dtype)
