"""Linear layers on a base that GPTQ made, as gptqmodel trains on them: dequantise, then an ordinary GEMM.

Of the kernels that gptqmodel has for such weights only those of Torch and Triton have a backward pass, and in training
both run this: the weight is unpacked by code that `torch.compile` makes one kernel of (of 3 bits four, as Inductor's
scheduler says), and multiplied. Autograd keeps the unpacked weight for the input's gradient; nothing is unpacked again
but by a checkpoint.
Source: gptqmodel 7.7, nn_modules/qlinear/{__init__,torch,tritonv2}.py (`dequantize_weight`, `_forward_eager`).
"""

from dataclasses import dataclass

from ..core import emit, tape
from ..inplace import add_to_output
from ..linalg import autocast_operand, mm
from ..pointwise import cast
from ..shape import reshape
from ..tensor import Parameter, Tensor


@dataclass(frozen=True)
class Grouped:
    """A quantised weight (n_in, n_out), rows of which share scales and zeros.

    Attributes:
        bits: of a code. Of 3 bits 32 codes lie in three words, each of which is first spread over 12 numbers.
        qweight: int32, (n_in · bits / 32, n_out).
        qzeros: int32, (groups, n_out · bits / 32).
        scales: (groups, n_out), in the model's dtype.
        g_idx: int32, (n_in,): the group of every row, in any order (`desc_act`).
    """

    bits: int
    qweight: Parameter
    qzeros: Parameter
    scales: Parameter
    g_idx: Parameter


def linear_gptq(x: Tensor, weight: Grouped, bias: Tensor | None) -> Tensor:
    """y = x·W + b."""
    n_in, n_out = weight.g_idx.shape[0], weight.scales.shape[1]
    rows = reshape(x, (x.numel // n_in, n_in))
    with tape().belonging_to("dequantisation"):
        weights = cast(_unpacked(weight, n_in, n_out), x.dtype)
    out = reshape(mm(autocast_operand(rows), autocast_operand(weights)), (*x.shape[:-1], n_out))
    del weights
    return out if bias is None else add_to_output(out, cast(bias, out.dtype), viewed=True)


def _unpacked(weight: Grouped, n_in: int, n_out: int) -> Tensor:
    codes, zeros = weight.qweight, weight.qzeros
    if weight.bits == 3:
        spread = emit("gptqmodel::spread", (codes,), (codes.shape[0] * 12, n_out), "i32")
        zeros_spread = emit("gptqmodel::spread", (zeros,), (zeros.shape[0], zeros.shape[1] * 12), "i32")
        joined = emit("gptqmodel::joined", (zeros_spread,), (zeros.shape[0], n_out), "i32")
        operands: tuple[Tensor, ...] = (spread, joined, weight.scales, weight.g_idx)
    else:
        operands = (codes, zeros, weight.scales, weight.g_idx)
    return emit("gptqmodel::dequantize_weight", operands, (n_in, n_out), weight.scales.dtype)
