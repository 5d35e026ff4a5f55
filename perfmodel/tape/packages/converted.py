"""The product of an `nn.Linear` as torchao converts the layer. Conversions are rare: each is loaded on use."""

from ..linalg import linear
from ..tensor import Tensor


def float8_or_plain(x: Tensor, weight: Tensor, bias: Tensor | None, recipe: str) -> Tensor:
    """y = x·Wᵀ + b in 8-bit floats by a recipe of `Setup.fp8`, or plain where that is "none"."""
    if recipe == "none":
        return linear(x, weight, bias)
    from .float8 import linear_or_float8

    return linear_or_float8(x, weight, bias, recipe)


def fake_quantised(x: Tensor, weight: Tensor, bias: Tensor | None, group: int) -> Tensor:
    """y = x·Wᵀ + b of operands rounded as later inference rounds them, `group` weights to a scale."""
    from .fake_quant import rounded_operands

    return linear(*rounded_operands(x, weight, group), bias)


def in_int8(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = x·Wᵀ + b in 8-bit integers, scaled by row and column."""
    from .int8_mixed import int8_linear

    return int8_linear(x, weight, bias)
