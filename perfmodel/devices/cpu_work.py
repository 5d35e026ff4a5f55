"""What kind of work each ATen call is on a CPU, and how much: rows for the models in `perfmodel.devices.cpu`."""

from typing import Any

from .. import costs, products
from ..tape.dims import product, same
from ..tape.op import Op
from .packages import gemm_shape
from .tables import Tables

LAYOUTS = ("tn", "nn", "nt")
# What a product's parameters go by: its layout; in nn, whether A has few rows, when the library reads B in place;
# whether what it reads in place (B in nn, A in nt) has rows a multiple of a page apart, which compete for the same sets
# of a cache; and whether C is narrower than a vector register (LoRA's rank of 8), which the usual kernels do not fill.
REGIMES = (
    *LAYOUTS, "nn_few", "nn_aliased", "nt_aliased", "tn_narrow", "nn_narrow", "nn_few_narrow", "nt_narrow",
    "nt_aliased_narrow",
)  # fmt: skip
FEW_ROWS = 192  # below so many rows of A MKL reads B in place (measured: the step lies between 160 and 192)
VECTOR = 16  # fp32 sums in a register of 512 bits
PAGE = 4096  # B
KINDS = (
    "stream",  # loads, a few vector instructions, a store
    "divide",
    "root",  # square roots
    "exponential",  # an exponential or logarithm an element, by the vector library where there is one
    "sigmoid",  # what PyTorch computes from an exponential itself
    "tanh",
    "cosine",
    "gelu",  # an error function an element
    "broadcast",  # a row or a column for every row or column
    "strided",  # permuted or sliced operands
    "cast",
    "reduction",  # along rows
    "row_norm",  # a norm of each row
    "column_reduction",  # down columns
    "softmax",
    "softmax_backward",
    "norm",
    "norm_backward",
    "gather",  # rows by index
)
# A kind of work, or regime of products, that was not measured costs what the like one does.
LIKE = {
    "root": "divide", "sigmoid": "exponential", "tanh": "exponential", "cosine": "exponential", "broadcast": "strided",
    "row_norm": "reduction",
    "nt_aliased": "nt", "tn_narrow": "tn", "nn_narrow": "nn", "nn_few_narrow": "nn_few", "nt_narrow": "nt",
    "nt_aliased_narrow": "nt_narrow",
}  # fmt: skip
_KIND_OF = {
    "divide": ("div", "reciprocal", "addcdiv", "_foreach_div", "_foreach_addcdiv"),
    "root": ("sqrt", "rsqrt", "_foreach_sqrt"),
    "exponential": ("exp", "log", "erf"),
    "sigmoid": ("sigmoid", "silu", "silu_backward", "softplus", "logsigmoid_forward"),
    "tanh": ("tanh",),
    "cosine": ("cos", "sin"),
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
# An optimizer on a CPU goes over one parameter after the other: its first passes find what was last touched a step ago,
# the further ones what the first have left in a cache.
STATE = ("mul_", "lerp_")
HOT = ("addcmul_", "sqrt", "div", "addcdiv_")
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
        causal, half = bool(op.attrs and op.attrs[0]), q.dtype in ("bf16", "fp16")
        tables.add("attention", (backward, causal, half), i, q.shape[0], q.shape[2], k.shape[2], q.shape[1], q.shape[3])
    elif name in products.NAMES:
        for layout, *shape in products.products(op):
            tables.add("gemm", ("bf16" if op.inputs[0].dtype in ("bf16", "fp16") else "fp32", layout), i, *shape)
    elif name in costs.SOLVERS:
        *batch, rows, columns = op.inputs[0].shape
        tables.add("solver", (name,), i, product(tuple(batch)), rows, columns)
    else:
        half = any(s.dtype in ("bf16", "fp16") for s in (*op.inputs, *op.outputs))
        for kind, *amounts in streams(op):
            tables.add("stream", (kind, half), i, *amounts)


def _gemm_key(op: Op, layout: str) -> tuple[str, str]:
    dtype = op.inputs[-1].dtype
    return ("bf16" if dtype in ("bf16", "fp16") else "fp32", "nn" if op.name == "bmm" else layout)


def _real(op: Op, m: Any, n: Any, k: Any, batch: Any) -> tuple[Any, Any, Any, Any]:
    """A complex product is four real ones: [Re A, -Im A; Im A, Re A] by [Re B; Im B]."""
    return (2 * m, n, 2 * k, batch) if op.inputs[0].dtype == "c64" else (m, n, k, batch)


def streams(op: Op) -> list[tuple[str, Any, Any, Any, Any]]:
    """(kind, bytes of traffic, elements, calls, cold bytes) of each pass of an op that only streams.

    Cold is what no cache holds, however small it is: fresh results, and operands beside the first, which what ran just
    before has made.
    """
    base = op.name.partition(".")[0]
    if base in NOTHING or not (op.inputs or op.outputs):
        return []
    out = op.outputs[0] if op.outputs else op.inputs[0]
    in_place = base.endswith("_")
    written = op.bytes_written * (1.0 if in_place else WRITE_ALLOCATE)
    if base in FILLS:
        return [("stream", written, out.numel, 1, 0 if in_place else out.nbytes)]
    if base in ("embedding", "index", "index_select"):
        return [(KIND_OF[base], out.nbytes * (1 + WRITE_ALLOCATE), out.numel, 1, 2 * out.nbytes)]
    if base == "embedding_dense_backward":  # a fill, then a row of the gradient is added to its row of the weight's
        grad = op.inputs[0]
        return [("stream", written, out.numel, 1, out.nbytes), ("gather", 3 * grad.nbytes, grad.numel, 1, grad.nbytes)]
    if base == "slice_backward":
        part = op.inputs[0]
        return [("stream", written, out.numel, 1, out.nbytes), ("strided", 2 * part.nbytes, part.numel, 1, 0)]
    if base == "index_put_":
        moved = op.inputs[-1]
        return [("strided", 3 * moved.nbytes, moved.numel, 1, moved.nbytes)]
    if base == "nll_loss_forward":
        return [("stream", 2 * op.inputs[1].nbytes, op.inputs[1].numel, 1, 0)]
    if base.startswith(("_foreach", "_fused_adam")):
        lists = op.outputs or op.inputs
        elements = sum(s.numel * s.copies for s in op.inputs if s.shape) if "norm" in base else _elements(lists)
        return [(kind_of(op), op.bytes_read + written, elements, sum(s.copies for s in lists), op.bytes_read)]
    if base == "stack":
        return [("stream", op.bytes_read + written, out.numel, 1, 0)]
    return [(kind_of(op), op.bytes_read + written, max_numel(op), 1, _cold(op, base))]


def _cold(op: Op, base: str) -> Any:
    """Bytes that no cache holds when an elementwise op, a reduction or a copy begins."""
    if base in HOT:
        return 0
    if base in STATE:
        return op.bytes_read
    fresh = 0 if base.endswith("_") else op.bytes_written
    beside = op.bytes_read - op.inputs[0].nbytes if len(op.inputs) > 1 else 0
    return fresh + beside


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
    if base in ("sum", "mean") and op.outputs:
        out = op.outputs[0]
        along_rows = not out.shape or (isinstance(out.shape[-1], int) and out.shape[-1] == 1)
        return "reduction" if along_rows or not same(op.inputs[0].shape[-1], out.shape[-1]) else "column_reduction"
    if base == "linalg_vector_norm" and op.outputs and op.outputs[0].shape:
        return "row_norm"
    return "broadcast" if kind == "stream" and "strided" in op.attrs else kind
