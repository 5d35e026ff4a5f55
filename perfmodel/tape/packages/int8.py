"""Linear layers on 8-bit weights, as bitsandbytes computes them (LLM.int8(), https://arxiv.org/abs/2208.07339).

The input is rounded to 8 bit row by row and multiplied in integers; its columns that hold a value beyond a threshold,
the outliers, are multiplied in 16 bit instead. How many there are is data. The gradient of the input dequantises the
weight and is an ordinary product. Source: bitsandbytes 0.50, autograd/_functions.py (`MatMul8bitLt`),
backends/cuda/ops.py (`int8_vectorwise_quant`, `int8_mm_dequant`), backends/default/ops.py (`int8_mixed_scaled_mm`).
"""

from collections.abc import Sequence
from typing import NamedTuple

from ...program.dims import product
from ...program.op import Attrs
from ..autograd import differentiate
from ..core import emit, new_tensor, record, tape
from ..custom import gather, index_buffer, python_function
from ..linalg import addmm, autocast_operand, matmul
from ..pointwise import cast, elementwise, mul
from ..shape import reshape, t, unsqueeze, view
from ..tensor import Grads, Node, Parameter, Storage, Tensor

Grad = Tensor | None


class Rounded(NamedTuple):
    """A weight (n_out, n_in) in 8 bit.

    Attributes:
        values: int8, (n_out, n_in).
        scales: fp32, (n_out,).
        outliers: columns of the input that are multiplied in 16 bit.
    """

    values: Parameter
    scales: Parameter
    outliers: int


def linear_8bit(x: Tensor, weight: Rounded, bias: Tensor | None) -> Tensor:
    """y = x·Wᵀ + b. Python keeps x, as no hook on saved tensors sees: not even a checkpoint lets go of it."""
    rows = reshape(x, (product(x.shape[:-1]), x.shape[-1])) if len(x.shape) > 2 else x
    node = differentiate("MatMul8bitLtBackward", (x,), _linear_8bit_backward, (weight, rows, x.shape, x.dtype))
    python_function()
    with tape().no_grad():
        codes, scales, columns = _round(cast(rows, "fp16"), weight.outliers)
        of_outliers = None
        if weight.outliers:
            with tape().belonging_to("dequantisation"):
                picked = mul(gather(weight.values, columns), unsqueeze(weight.scales, -1))
                picked = cast(elementwise("mul.Tensor", (picked,)), x.dtype)
            of_outliers = (gather(rows, columns), t(picked))
        out = _integer_product(codes, scales, weight, bias, x.dtype)
        if of_outliers is not None:
            with tape().belonging_to("dequantisation"):
                out = addmm(*map(autocast_operand, (out, *of_outliers)))
        out = view(out, (*x.shape[:-1], out.shape[-1]))
    if node:
        node.produces(out)
    return out


def whole_rows(values: Parameter, scales: Parameter) -> Tensor:
    """Weights (…, n_in) in fp32, whatever they were: each row times its scale (`int8_vectorwise_dequant`)."""
    with tape().belonging_to("dequantisation"):
        rows = view(values, (scales.numel, values.shape[-1]))
        rows = elementwise("mul.Tensor", (rows, unsqueeze(scales, -1)), dtype="fp32")
        return view(elementwise("mul.Tensor", (rows,)), values.shape)


def _round(x: Tensor, outliers: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scales of the rows, and which columns hold outliers: the host waits for both answers."""
    beyond = elementwise("ge.Scalar", (elementwise("abs", (x,)),), dtype="bool")
    record("_local_scalar_dense", (emit("any", (beyond,), (), "bool"),), ())
    columns = index_buffer(outliers)
    if outliers:
        held = emit("any.dim", (beyond,), (x.shape[1],), "bool", attrs=Attrs(dims=(0,)))
        columns = view(emit("bitsandbytes::outlier_columns", (held,), (outliers, 1), "i64"), (outliers,))
    scales, codes = new_tensor((x.shape[0],), "fp32"), new_tensor(x.shape, "i8")
    record("bitsandbytes::int8_vector_quant", (x,), (codes, scales))
    if outliers:
        record("index_put_", (codes, columns, Tensor((), "i8", (), 1, Storage(0, None))), (codes,))
    return codes, scales, columns


def _integer_product(codes: Tensor, scales: Tensor, weight: Rounded, bias: Tensor | None, dtype: str) -> Tensor:
    """Sums in 32-bit integers, then a kernel that scales them to fp16; a bias of another dtype is added apart."""
    shape = (codes.shape[0], weight.values.shape[0])
    sums = emit("bitsandbytes::int8_linear_matmul", (codes, weight.values), shape, "i32")
    fused = (bias,) if bias is not None and bias.dtype == "fp16" else ()
    out = emit("bitsandbytes::int8_mm_dequant", (sums, scales, weight.scales, *fused), shape, "fp16")
    if bias is not None and not fused:
        record("add_.Tensor", (out, bias), (out,))
    return cast(out, dtype)


def _linear_8bit_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (weight, _, shape, dtype) = grads, node.attrs
    assert g is not None
    python_function()
    rows = reshape(g, (product(g.shape[:-1]), g.shape[-1])) if len(g.shape) > 2 else g
    with tape().belonging_to("dequantisation"):
        whole = cast(weight.values, dtype)
        scales = elementwise("mul.Tensor", (unsqueeze(weight.scales, 1),))
        record("mul_.Tensor", (whole, scales), (whole,), Attrs(strided=True))
    return (view(matmul(cast(rows, dtype), whole), shape),)
