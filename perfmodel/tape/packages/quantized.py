"""Linear layers on 4-bit weights, as bitsandbytes computes them: dequantise, then an ordinary GEMM.

Two values lie in a byte; every 64 of them share an absolute maximum. With double quantisation those maxima are 8-bit
themselves, every 256 of them with an fp32 maximum, a table of 256 values and one offset.
Source: bitsandbytes 0.46-0.49, functional.py (`dequantize_4bit`), autograd/_functions.py (`MatMul4Bit`), _ops.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..autograd import differentiate
from ..core import emit, record, tape
from ..linalg import linear, matmul
from ..pointwise import cast
from ..shape import t
from ..tensor import Grads, Node, Parameter, Tensor

Grad = Tensor | None
BLOCK = 64  # values that share a maximum (`bnb_4bit` block size)
NESTED_BLOCK = 256  # maxima that share a second one


@dataclass(frozen=True)
class Packed:
    """A quantised weight (n_out, n_in), or (experts, n_out, n_in).

    Attributes:
        values: uint8, (elements / 2, 1); or as many bytes in a wider dtype.
        absmax: per block of 64 values; fp32, or uint8 with double quantisation.
        nested: double quantisation's second maxima, table and offset; None without it.
        dtype: what it dequantises to, the dtype that the weight had.
    """

    values: Parameter
    absmax: Parameter
    nested: tuple[Parameter, Parameter, Parameter] | None
    shape: tuple[int, ...]
    dtype: str


def dequantize(weight: Packed, values: Tensor) -> Tensor:
    """The weight in 16 or 32 bit from its values: a custom op, and with double quantisation two more for the maxima."""
    with tape().belonging_to("dequantisation"):
        absmax: Tensor = weight.absmax
        if weight.nested is not None:
            second, code, offset = weight.nested
            absmax = emit("bitsandbytes::dequantize_blockwise", (absmax, second, code), absmax.shape, "fp32")
            record("add_.Tensor", (absmax, offset), (absmax,))
        return emit("bitsandbytes::dequantize_4bit", (values, absmax), weight.shape, weight.dtype)


def linear_4bit(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """y = x·Wᵀ + b; keeps nothing but the packed weight, which the gradient of x dequantises again."""
    node = differentiate("MatMul4BitBackward", (x,), _linear_4bit_backward, (weight,))
    with tape().no_grad():
        out = linear(x, t(cast(t(dequantize(weight, t(weight.values))), x.dtype)), bias)
    if node:
        node.produces(out)
    return out


def _linear_4bit_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (weight,) = grads, node.attrs
    assert g is not None
    return (matmul(g, t(cast(t(dequantize(weight, t(weight.values))), g.dtype))),)
