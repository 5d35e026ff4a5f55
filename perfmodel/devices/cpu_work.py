"""What kind of work each ATen call is on a CPU, and how much: rows for the models in `perfmodel.devices.cpu`."""

from typing import Any

from ..calls import costs
from ..calls.collectives import collective_row
from ..calls.table import row
from ..errors import UserError
from ..program.dims import product
from ..program.dtypes import FLOATING
from ..program.op import Op
from .gemm_parameters import LAYOUTS
from .tables import Tables

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
    "mixed",  # operands of two dtypes, cast on the way
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
    "mixed": "stream", "root": "divide",
    "sigmoid": "exponential", "tanh": "exponential", "cosine": "exponential", "broadcast": "strided",
    "row_norm": "reduction",
    "nt_aliased": "nt", "tn_narrow": "tn", "nn_narrow": "nn", "nn_few_narrow": "nn_few", "nt_narrow": "nt",
    "nt_aliased_narrow": "nt_narrow",
}  # fmt: skip
SAME = (
    "divide", "root", "exponential", "sigmoid", "tanh", "cosine", "gelu", "cast", "reduction", "softmax",
    "softmax_backward", "norm", "norm_backward",
)  # fmt: skip
MOVING = ("permute", "join", "part", "pad", "take", "put")
KIND_OF = {  # work of `calls.table` -> kind; all others stream
    **{work: work for work in SAME}, **dict.fromkeys(MOVING, "strided"), "rows": "gather", "pick": "gather",
}  # fmt: skip
FOREACH = {  # calls on lists that do more than stream
    "_foreach_div": "divide", "_foreach_div_": "divide", "_foreach_sqrt": "root", "_foreach_addcdiv": "divide",
    "_foreach_addcdiv_": "divide", "_foreach_norm": "reduction",
}  # fmt: skip
# An optimizer on a CPU goes over one parameter after the other: its first passes find what was last touched a step ago,
# the further ones what the first have left in a cache.
STATE = ("mul_", "lerp_")
HOT = ("addcmul_", "sqrt", "div", "addcdiv_")
WRITE_ALLOCATE = 2.0  # bytes moved per byte of a fresh output: the line is fetched before it is written


def sort(i: int, op: Op, tables: Tables) -> None:
    """Put one op into the table of its model; an op of several passes gets several rows."""
    name, work = op.name, row(op.name).work
    if work == "product":
        for layout, *sizes in costs.products(op):
            tables.add("gemm", _gemm_key(op, layout), i, *_real(op, *sizes))
    elif work == "attention":
        if name.startswith("flash_attn::"):
            raise UserError("attention flash2: flash-attn runs on a GPU only; use sdpa")
        backward = name.endswith("_backward")
        q, k = op.inputs[1:3] if backward else op.inputs[:2]
        causal, dtype = op.attrs.causal, "bf16" if q.dtype in ("bf16", "fp16") else "fp32"
        batch, heads, queries, head_dim = q.shape
        tables.add("attention", (backward, causal, dtype), i, batch, queries, k.shape[2], heads, head_dim)
    elif work == "decomposition":
        *batch, rows, columns = op.inputs[0].shape
        tables.add("solver", (name,), i, product(tuple(batch)), rows, columns)
    elif work == "collective":
        key, message = collective_row(op)
        tables.add("collective", key, i, *message)
    else:
        half = any(s.dtype in ("bf16", "fp16") for s in (*op.inputs, *op.outputs))
        for kind, *amounts in streams(op):
            tables.add("stream", (kind, half, writes_back(op)), i, *amounts)


def _gemm_key(op: Op, layout: str) -> tuple[str, str]:
    dtype = op.inputs[0].dtype
    return ("bf16" if dtype in ("bf16", "fp16") else "fp32", "nn" if op.name == "bmm" else layout)


def _real(op: Op, m: Any, n: Any, k: Any, batch: Any) -> tuple[Any, Any, Any, Any]:
    """A complex product is four real ones: [Re A, -Im A; Im A, Re A] by [Re B; Im B]."""
    return (2 * m, n, 2 * k, batch) if op.inputs[0].dtype == "c64" else (m, n, k, batch)


def streams(op: Op) -> list[tuple[str, Any, Any, Any, Any]]:
    """(kind, bytes of traffic, elements, calls, cold bytes) of each pass of an op that only streams.

    Cold is what no cache holds, however small it is: fresh results, and operands beside the first, which what ran just
    before has made.
    """
    base, work = op.name.partition(".")[0], row(op.name).work
    if work == "nothing" or not (op.inputs or op.outputs):
        return []
    out = op.outputs[0] if op.outputs else op.inputs[0]
    in_place = base.endswith("_")
    written = op.bytes_written * (1.0 if in_place else WRITE_ALLOCATE)
    if work in ("fill", "random", "loss_backward"):
        return [("stream", written, out.numel, 1, 0 if in_place else out.nbytes)]
    if work in ("rows", "take", "pick"):
        return [(KIND_OF[work], out.nbytes * (1 + WRITE_ALLOCATE), out.numel, 1, 2 * out.nbytes)]
    if work == "rows_backward":  # a fill, then a row of the gradient is added to its row of the weight's
        grad = op.inputs[0]
        return [("stream", written, out.numel, 1, out.nbytes), ("gather", 3 * grad.nbytes, grad.numel, 1, grad.nbytes)]
    if work == "part":
        part = op.inputs[0]
        return [("stream", written, out.numel, 1, out.nbytes), ("strided", 2 * part.nbytes, part.numel, 1, 0)]
    if base == "index_put_":
        moved = op.inputs[-1]
        return [("strided", 3 * moved.nbytes, moved.numel, 1, moved.nbytes)]
    if work == "loss":
        return [("stream", 2 * op.inputs[1].nbytes, op.inputs[1].numel, 1, 0)]
    if work == "list":
        lists = op.outputs or op.inputs
        elements = sum(s.numel * s.copies for s in op.inputs if s.shape) if "norm" in base else _elements(lists)
        return [(kind_of(op), op.bytes_read + written, elements, sum(s.copies for s in lists), op.bytes_read)]
    return [(kind_of(op), op.bytes_read + written, max_numel(op), 1, _cold(op, base))]


def writes_back(op: Op) -> bool:
    """Whether an op changes in place what no cache holds: an optimizer's passes over weights, gradients and states."""
    base = op.name.partition(".")[0]
    return base in STATE or (base.endswith("_") and base.startswith("_foreach_"))


def _cold(op: Op, base: str) -> Any:
    """Bytes that no cache holds when an elementwise op, a reduction or a copy begins."""
    if base in HOT or base == "stack":
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
    work = row(op.name).work
    kind = FOREACH.get(op.name.partition(".")[0], "stream") if work == "list" else KIND_OF.get(work, "stream")
    if kind == "reduction" and op.inputs and not costs.along_rows(op):
        return "column_reduction"
    if kind == "reduction" and "norm" in op.name and op.attrs.dims is not None:
        return "row_norm"
    if kind == "stream" and len({s.dtype for s in op.inputs if s.shape and s.dtype in FLOATING}) > 1:
        return "mixed"
    return "broadcast" if kind == "stream" and op.attrs.strided else kind
