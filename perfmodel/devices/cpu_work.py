"""What kind of work each ATen call is on a CPU, and how much: rows for the models in `perfmodel.devices.cpu`."""

from typing import Any

from ..calls import costs, products
from ..calls.sums import along_rows
from ..program.dims import product
from ..program.op import Op
from .packages import gemm_shape
from .tables import Tables

LAYOUTS = ("tn", "nn", "nt")
# What a product's parameters go by: its layout and, in nn, whether A has few rows. The library then reads B in place,
# which is slow if B's rows are a multiple of a page apart: they compete for the same sets of a cache.
REGIMES = (*LAYOUTS, "nn_few", "nn_aliased")
FEW_ROWS = 192  # below so many rows of A MKL reads B in place (measured: the step lies between 160 and 192)
PAGE = 4096  # B
KINDS = (
    "stream",  # loads, a few vector instructions, a store
    "divide",  # divisions and square roots
    "exponential",  # one exponential or the like an element
    "gelu",  # an error function an element
    "strided",  # broadcast, permuted or sliced operands
    "cast",
    "reduction",  # along rows
    "column_reduction",  # down columns
    "softmax",
    "softmax_backward",
    "norm",
    "norm_backward",
    "gather",  # rows by index
)
_KIND_OF = {
    "divide": ("div", "sqrt", "rsqrt", "reciprocal", "addcdiv", "_foreach_div", "_foreach_sqrt", "_foreach_addcdiv"),
    "exponential": (
        "exp", "log", "tanh", "sigmoid", "silu", "silu_backward", "cos", "sin", "softplus", "logsigmoid_forward", "erf",
    ),
    "gelu": ("gelu", "gelu_backward"),
    "strided": ("clone", "cat", "stack", "slice_backward", "constant_pad_nd", "index", "index_put", "tril", "triu"),
    "cast": ("_to_copy",),
    "reduction": ("sum", "mean", "linalg_vector_norm", "_foreach_norm", "any", "all", "amax", "argmax"),
    "softmax": ("_softmax", "_log_softmax"),
    "softmax_backward": ("_softmax_backward_data", "_log_softmax_backward_data"),
    "norm": ("native_layer_norm", "_fused_rms_norm"),
    "norm_backward": ("native_layer_norm_backward", "_fused_rms_norm_backward"),
    "gather": ("embedding", "index_select", "gather", "scatter"),
}  # fmt: skip
KIND_OF = {name: kind for kind, names in _KIND_OF.items() for name in names}  # all others stream
NOTHING = ("empty_like", "new_empty_strided", "_local_scalar_dense", "_linalg_check_errors")
FILLS = (
    "zeros",
    "zeros_like",
    "new_zeros",
    "ones_like",
    "zero_",
    "fill_",
    "arange",
    "eye",
    "full",
    "nll_loss_backward",
)
WRITE_ALLOCATE = 2.0  # bytes moved per byte of a fresh output: the line is fetched before it is written


def sort(i: int, op: Op, tables: Tables) -> None:
    """Put one op into the table of its model; an op of several passes gets several rows."""
    name = op.name
    if name in costs.GEMMS:
        layout, *sizes = gemm_shape(op)
        tables.add("gemm", _gemm_key(op, layout), i, *_real(op, *sizes))
    elif "attention" in name or "flash_attn" in name:
        backward = name.endswith("_backward")
        q, k = op.inputs[1:3] if backward else op.inputs[:2]
        causal = op.attrs.causal
        tables.add("attention", (backward, causal), i, q.shape[0], q.shape[2], k.shape[2], q.shape[1], q.shape[3])
    elif name in products.NAMES:
        for layout, *shape in products.products(op):
            tables.add("gemm", ("bf16" if op.inputs[0].dtype in ("bf16", "fp16") else "fp32", layout), i, *shape)
    elif name in costs.SOLVERS:
        *batch, rows, columns = op.inputs[0].shape
        tables.add("solver", (name,), i, product(tuple(batch)), rows, columns)
    else:
        half = any(s.dtype in ("bf16", "fp16") for s in (*op.inputs, *op.outputs))
        for kind, traffic, elements, calls in streams(op):
            tables.add("stream", (kind, half), i, traffic, elements, calls)


def _gemm_key(op: Op, layout: str) -> tuple[str, str]:
    dtype = op.inputs[-1].dtype
    return ("bf16" if dtype in ("bf16", "fp16") else "fp32", "nn" if op.name == "bmm" else layout)


def _real(op: Op, m: Any, n: Any, k: Any, batch: Any) -> tuple[Any, Any, Any, Any]:
    """A complex product is four real ones: [Re A, -Im A; Im A, Re A] by [Re B; Im B]."""
    return (2 * m, n, 2 * k, batch) if op.inputs[0].dtype == "c64" else (m, n, k, batch)


def streams(op: Op) -> list[tuple[str, Any, Any, Any]]:
    """(kind, bytes of traffic, elements, calls) of each pass of an op that is neither product nor attention."""
    base = op.name.partition(".")[0]
    if base in NOTHING or not (op.inputs or op.outputs):
        return []
    out = op.outputs[0] if op.outputs else op.inputs[0]
    in_place = base.endswith("_")
    written = op.bytes_written * (1.0 if in_place else WRITE_ALLOCATE)
    if base in FILLS:
        return [("stream", written, out.numel, 1)]
    if base in ("embedding", "index", "index_select"):
        return [(KIND_OF[base], out.nbytes * (1 + WRITE_ALLOCATE), out.numel, 1)]
    if base == "embedding_dense_backward":  # a fill, then a row of the gradient is added to its row of the weight's
        grad = op.inputs[0]
        return [("stream", written, out.numel, 1), ("gather", 3 * grad.nbytes, grad.numel, 1)]
    if base == "slice_backward":
        part = op.inputs[0]
        return [("stream", written, out.numel, 1), ("strided", 2 * part.nbytes, part.numel, 1)]
    if base == "index_put_":
        moved = op.inputs[-1]
        return [("strided", 3 * moved.nbytes, moved.numel, 1)]
    if base == "nll_loss_forward":
        return [("stream", 2 * op.inputs[1].nbytes, op.inputs[1].numel, 1)]
    if base.startswith(("_foreach", "_fused_adam")):
        lists = op.outputs or op.inputs
        elements = sum(s.numel * s.copies for s in op.inputs if s.shape) if "norm" in base else _elements(lists)
        return [(kind_of(op), op.bytes_read + written, elements, sum(s.copies for s in lists))]
    if base == "stack":
        return [("stream", op.bytes_read + written, out.numel, 1)]
    elements = max_numel(op)
    return [(kind_of(op), op.bytes_read + written, elements, 1)]


def _elements(specs: Any) -> Any:
    return sum(s.numel * s.copies for s in specs)


def max_numel(op: Op) -> Any:
    """Elements of the largest operand: what an elementwise kernel or a reduction walks over."""
    sizes = [s.numel for s in (*op.inputs, *op.outputs)]
    if all(isinstance(n, int) for n in sizes):
        return max(sizes)
    import numpy as np

    return np.maximum.reduce(np.broadcast_arrays(*sizes))


def kind_of(op: Op) -> str:
    """The kind of a streaming op."""
    base = op.name.partition(".")[0]
    kind = KIND_OF.get(base) or KIND_OF.get(base.rstrip("_"), "stream")
    if kind == "reduction" and op.inputs and not along_rows(op):
        return "column_reduction"
    return "strided" if kind == "stream" and op.attrs.strided else kind
