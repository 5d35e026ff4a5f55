"""The ATen call behind each streaming microbenchmark, as an Op: fit and price count its work with the same code."""

from collections.abc import Callable

from perfmodel.devices.cpu_work import streams
from perfmodel.program.op import PLAIN, STRIDED, Attrs, Op, Spec

Dims = tuple[int, ...]
Shapes = tuple[list[Dims], list[Dims]]  # of inputs and outputs


def _like(inputs: int, outputs: int = 1) -> Callable[[int, int], Shapes]:
    return lambda r, c: ([(r, c)] * inputs, [(r, c)] * outputs)


# microbenchmark -> (ATen name, its attributes, shapes by rows and columns)
CALLS: dict[str, tuple[str, Attrs, Callable[[int, int], Shapes]]] = {
    "add": ("add.Tensor", PLAIN, _like(2)),
    "mul": ("mul.Tensor", PLAIN, _like(2)),
    "mul_": ("mul_.Tensor", PLAIN, _like(1)),
    "lerp_": ("lerp_.Scalar", PLAIN, _like(2)),
    "addcmul_": ("addcmul_", PLAIN, _like(2)),
    "addcdiv_": ("addcdiv_", PLAIN, _like(3)),
    "sqrt": ("sqrt", PLAIN, _like(1)),
    "div": ("div.Tensor", PLAIN, _like(2)),
    "silu": ("silu", PLAIN, _like(1)),
    "silu_backward": ("silu_backward", PLAIN, _like(2)),
    "gelu": ("gelu", PLAIN, _like(1)),
    "gelu_backward": ("gelu_backward", PLAIN, _like(2)),
    "tanh": ("tanh", PLAIN, _like(1)),
    "exp": ("exp", PLAIN, _like(1)),
    "cos": ("cos", PLAIN, _like(1)),
    "mul_row": ("mul.Tensor", STRIDED, lambda r, c: ([(r, c), (c,)], [(r, c)])),
    "mul_column": ("mul.Tensor", STRIDED, lambda r, c: ([(r, c), (r, 1)], [(r, c)])),
    "transpose": ("clone", PLAIN, _like(1)),
    "cat": ("cat", PLAIN, lambda r, c: ([(r, c - c // 2), (r, c // 2)], [(r, c)])),
    "cast": ("_to_copy", PLAIN, _like(1)),
    "add_mixed": ("add.Tensor", PLAIN, _like(2)),
    "mean_row": ("mean.dim", Attrs(dims=(1,)), lambda r, c: ([(r, c)], [(r, 1)])),
    "sum_columns": ("sum.dim_IntList", Attrs(dims=(0,)), lambda r, c: ([(r, c)], [(1, c)])),
    "norm": ("linalg_vector_norm", PLAIN, lambda r, c: ([(r, c)], [()])),
    "norm_row": ("linalg_vector_norm", Attrs(dims=(1,)), lambda r, c: ([(r, c)], [(r, 1)])),
    "log_softmax": ("_log_softmax", PLAIN, _like(1)),
    "log_softmax_backward": ("_log_softmax_backward_data", PLAIN, _like(2)),
    "layer_norm": ("native_layer_norm", PLAIN, lambda r, c: ([(r, c), (c,), (c,)], [(r, c), (r, 1), (r, 1)])),
    "layer_norm_backward": (
        "native_layer_norm_backward", PLAIN,
        lambda r, c: ([(r, c), (r, c), (r, 1), (r, 1), (c,), (c,)], [(r, c), (c,), (c,)]),
    ),
    "embedding": ("embedding", PLAIN, lambda r, c: ([(r, c), (r,)], [(r, c)])),
    "fill": ("zeros_like", PLAIN, _like(1)),
}  # fmt: skip


def op(name: str, dtype: str, rows: int, columns: int) -> Op:
    """The call of a microbenchmark on so many rows and columns."""
    aten, attrs, shapes = CALLS[name]
    inputs, outputs = shapes(rows, columns)
    other = {"fp32": "bf16", "bf16": "fp32"}[dtype]
    kinds = {"cast": ([dtype], other), "add_mixed": ([dtype, other], "fp32")}.get(name, ([dtype] * len(inputs), dtype))
    read = [Spec(kind, s) for kind, s in zip(kinds[0], inputs, strict=True)]
    written = [Spec(kinds[1], s) for s in outputs]
    return Op(
        aten, tuple(read), tuple(written), sum(s.nbytes for s in read), sum(s.nbytes for s in written), attrs=attrs
    )


Amounts = tuple[float, float, float, float]


def passes(name: str, dtype: str, rows: int, columns: int) -> list[tuple[str, Amounts]]:
    """(kind, (bytes of traffic, elements, calls, cold bytes)) of each pass of a microbenchmark's call."""
    found = streams(op(name, dtype, rows, columns))
    return [(kind, (float(t), float(n), float(c), float(cold))) for kind, t, n, c, cold in found]
