"""What kind of work each ATen call is on a CPU, and how much: rows for the models in `perfmodel.devices.cpu`."""

from typing import Any

from ..calls import costs
from ..calls.table import row
from ..program.dims import product
from ..program.op import Op
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
KIND_OF = {  # work of `calls.table` -> kind; all others stream
    "divide": "divide", "root": "divide", "gelu": "gelu", "cast": "cast", "reduction": "reduction",
    **dict.fromkeys(("exponential", "sigmoid", "tanh", "cosine"), "exponential"),
    **dict.fromkeys(("permute", "join", "part", "pad", "take", "put"), "strided"),
    "softmax": "softmax", "softmax_backward": "softmax_backward", "norm": "norm", "norm_backward": "norm_backward",
    "rows": "gather", "pick": "gather",
}  # fmt: skip
FOREACH = {  # calls on lists that do more than stream
    "_foreach_div": "divide", "_foreach_div_": "divide", "_foreach_sqrt": "divide", "_foreach_addcdiv": "divide",
    "_foreach_addcdiv_": "divide", "_foreach_norm": "reduction",
}  # fmt: skip
WRITE_ALLOCATE = 2.0  # bytes moved per byte of a fresh output: the line is fetched before it is written


def sort(i: int, op: Op, tables: Tables) -> None:
    """Put one op into the table of its model; an op of several passes gets several rows."""
    name, work = op.name, row(op.name).work
    if work == "product":
        for layout, *sizes in costs.products(op):
            tables.add("gemm", _gemm_key(op, layout), i, *_real(op, *sizes))
    elif work == "attention":
        backward = name.endswith("_backward")
        q, k = op.inputs[1:3] if backward else op.inputs[:2]
        causal = op.attrs.causal
        tables.add("attention", (backward, causal), i, q.shape[0], q.shape[2], k.shape[2], q.shape[1], q.shape[3])
    elif work == "decomposition":
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
    base, work = op.name.partition(".")[0], row(op.name).work
    if work == "nothing" or not (op.inputs or op.outputs):
        return []
    out = op.outputs[0] if op.outputs else op.inputs[0]
    in_place = base.endswith("_")
    written = op.bytes_written * (1.0 if in_place else WRITE_ALLOCATE)
    if work in ("fill", "random", "loss_backward"):
        return [("stream", written, out.numel, 1)]
    if work in ("rows", "take", "pick"):
        return [(KIND_OF[work], out.nbytes * (1 + WRITE_ALLOCATE), out.numel, 1)]
    if work == "rows_backward":  # a fill, then a row of the gradient is added to its row of the weight's
        grad = op.inputs[0]
        return [("stream", written, out.numel, 1), ("gather", 3 * grad.nbytes, grad.numel, 1)]
    if work == "part":
        part = op.inputs[0]
        return [("stream", written, out.numel, 1), ("strided", 2 * part.nbytes, part.numel, 1)]
    if base == "index_put_":
        moved = op.inputs[-1]
        return [("strided", 3 * moved.nbytes, moved.numel, 1)]
    if work == "loss":
        return [("stream", 2 * op.inputs[1].nbytes, op.inputs[1].numel, 1)]
    if work == "list":
        lists = op.outputs or op.inputs
        elements = sum(s.numel * s.copies for s in op.inputs if s.shape) if "norm" in base else _elements(lists)
        return [(kind_of(op), op.bytes_read + written, elements, sum(s.copies for s in lists))]
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
    work = row(op.name).work
    kind = FOREACH.get(op.name.partition(".")[0], "stream") if work == "list" else KIND_OF.get(work, "stream")
    if kind == "reduction" and op.inputs and not costs.along_rows(op):
        return "column_reduction"
    return "strided" if kind == "stream" and op.attrs.strided else kind
