"""Linear layers on inputs and weights that are rounded and stay in 16 or 32 bit, as torchao trains them for a later
quantisation (QAT): inputs to 8-bit integers token by token, weights to 4-bit ones group by group.

Rounding passes gradients through; all else is differentiated, so that a step keeps several fp32 copies of each input
and each weight.
Source: torchao 0.18, quantization/qat/fake_quantizer.py (`IntxFakeQuantizer._per_token_forward`,
`Int4WeightFakeQuantizer._bf16_activations_forward`), quant_primitives.py (`_choose_qparams_affine`,
`_do_fake_quantize_affine`, `_Round`).
"""

from collections.abc import Sequence

from ...errors import UserError
from ...program.op import Attrs
from ..autograd import differentiate
from ..core import emit, tape
from ..custom import python_function
from ..elementary import div
from ..gather import clamp, quotient
from ..pointwise import add, cast, elementwise, mul, sub
from ..shape import unsqueeze, view
from ..tensor import Grads, Node, Tensor

Grad = Tensor | None


def rounded_operands(x: Tensor, weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The operands of a linear layer, (…, n_in) and (n_out, n_in), where it counts: as quantisation will leave them."""
    python_function()
    return _by_token(x), _by_group(weight, group)


def _by_token(x: Tensor) -> Tensor:
    """Each row of x on 256 steps from its least to its largest value, 0 among them."""
    dtype = x.dtype
    with tape().no_grad():
        least, largest = _extreme("amin", x, keepdim=False), _extreme("amax", x, keepdim=False)
        low = elementwise("minimum", (least, emit("zeros_like", (least,), least.shape, dtype)))
        high = elementwise("maximum", (largest, emit("zeros_like", (largest,), largest.shape, dtype)))
        step = clamp(div(sub(high, low), 1.0), low=True)
        zero = elementwise("rsub.Scalar", (_round(quotient(low, step)),))
        zero = clamp(zero, low=True, high=True)
        step, zero = unsqueeze(cast(step, "fp32"), -1), unsqueeze(cast(zero, "i32"), -1)
        inverse = elementwise("mul.Tensor", (elementwise("reciprocal", (step,)),))
    codes = clamp(add(_round(mul(x, inverse)), zero), low=True, high=True)
    return cast(mul(sub(_copied(codes, dtype), cast(zero, dtype)), step), dtype)


def _by_group(weight: Tensor, group: int) -> Tensor:
    """Each group of values of a row on 16 steps from its least to its largest."""
    n_out, n_in = weight.shape
    if n_in % group:
        raise UserError(f"qat: groups of {group} do not divide the {n_in} inputs of a layer; use another size")
    groups = view(cast(weight, "fp32"), (n_out, n_in // group, group))
    largest, least = _extreme("amax", groups), _extreme("amin", groups)
    step = div(clamp(sub(largest, least), low=True), 15.0)
    zero = add(least, mul(step, 8.0))
    codes = clamp(_round(quotient(sub(groups, least), step)), low=True, high=True)
    codes = sub(codes, 8.0)
    codes = add(mul(codes, step), zero)
    return cast(view(codes, weight.shape), weight.dtype)


def _extreme(name: str, x: Tensor, *, keepdim: bool = True) -> Tensor:
    """`amax` or `amin` over the last dim; places that share the value share its gradient."""
    node = differentiate(f"{name.capitalize()}Backward0", (x,), _extreme_backward)
    shape = (*x.shape[:-1], 1) if keepdim else x.shape[:-1]
    out = emit(name, (x,), shape, x.dtype, node=node, attrs=Attrs(dims=(len(x.shape) - 1,)))
    if node:
        node.save(x, out.alias())
    return out


def _extreme_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (x, value) = grads, node.unpack()
    assert g is not None
    there = elementwise("eq.Tensor", (value, x), dtype="bool")
    count = emit("sum.dim_IntList", (there,), g.shape, "i64", attrs=Attrs(dims=(len(x.shape) - 1,)))
    share = elementwise("div.Tensor", (g, count), dtype=g.dtype)
    return (elementwise("mul.Tensor", (share, there), dtype=g.dtype),)


def _round(x: Tensor) -> Tensor:
    """`_Round`: its gradient is that of the result."""
    node = differentiate("_RoundBackward", (x,), _passed)
    with tape().no_grad():
        out = elementwise("round", (x,))
    if node:
        node.produces(out)
    return out


def _passed(node: Node, grads: Sequence[Grad]) -> Grads:
    return (grads[0],)


def _copied(x: Tensor, dtype: str) -> Tensor:
    """`x.to(dtype, copy=True)`."""
    if x.dtype != dtype:
        return cast(x, dtype)
    return emit("_to_copy", (x,), x.shape, dtype, node=differentiate("ToCopyBackward0", (x,), _passed))
