"""Linear layers on 4-bit weights, as bitsandbytes computes them: dequantise, then an ordinary GEMM.

Two values lie in a byte; every 64 of them share an absolute maximum. With double quantisation those maxima are 8-bit
themselves, every 256 of them with an fp32 maximum, a table of 256 values and one offset.
Source: bitsandbytes 0.46-0.49, functional.py (`dequantize_4bit`), autograd/_functions.py (`MatMul4Bit`), _ops.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ...program.dims import product
from ..autograd import differentiate
from ..core import emit, record, tape
from ..linalg import linear, matmul
from ..pointwise import cast
from ..shape import narrow, t, view
from ..tensor import Grads, Node, Parameter, Storage, Tensor

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


def in_float(weight: Parameter | Packed, turns: int, *, buffered: bool = False) -> Tensor:
    """A weight that was turned so often, unpacked if it is in 4 bit: as fused LoRA calls the kernels of bitsandbytes.

    They have no operators there. With double quantisation there is one more, for the maxima.

    Args:
        buffered: whether what is unpacked lies in memory that was there before, cut to its size.
    """
    held: Tensor = weight.values if isinstance(weight, Packed) else weight
    for _ in range(turns):
        held = t(held)
    if not isinstance(weight, Packed):
        return held
    if weight.nested is None:
        out = dequantize(weight, held)
    else:
        with tape().belonging_to("dequantisation"):
            second, code, offset = weight.nested
            made = _cut if buffered else _empty
            out, absmax = made(weight.shape, weight.dtype), made(weight.absmax.shape, "fp32")
            record("bitsandbytes::cdequantize_blockwise_fp32", (code, weight.absmax, second, absmax), (absmax,))
            record("add_.Tensor", (absmax, offset), (absmax,))
            record("bitsandbytes::cdequantize_blockwise_nf4", (held, absmax, out), (out,))
    return t(out) if turns % 2 else out


def _empty(shape: tuple[int, ...], dtype: str) -> Tensor:
    return emit("empty.memory_format", (), shape, dtype)


def _cut(shape: tuple[int, ...], dtype: str) -> Tensor:
    """The front of a buffer that lasts, as long and of that shape."""
    size = product(shape)
    buffer = narrow(Tensor((size,), dtype, (1,), size, Storage(0, None)), 0, size)
    return view(buffer, shape) if len(shape) > 1 else buffer


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
