"""What an op costs besides bytes, by its row of `calls.table`: FLOPs, kind, whether the host waits.

FLOPs count multiply and add as two, and only matrix products and attention, as `torch.utils.flop_counter` does.
"""

from ..program.dims import Dim
from ..program.op import Op
from .launches import kernels, mirrors
from .products import Product
from .table import LISTED, row

INTO_FP32 = "addmm.dtype_out"  # a product of 16 bits that is added to a sum in fp32: (sum, a, b, sum)
SCALED = ("_scaled_mm", "torchao::scaled_int8_mm")  # products whose scales follow the factors

KINDS = {  # work -> the class of kernel for totals and intervals; everything else is pointwise
    "product": "gemm", "attention": "attention", "decomposition": "solver", "list": "optimizer",
    "collective": "collective", "rows": "embedding", "rows_backward": "embedding",
    **dict.fromkeys(("reduction", "softmax", "softmax_backward", "norm", "norm_backward", "loss", "loss_backward"),
                    "reduction"),
    **dict.fromkeys(("cast", "permute", "join", "part"), "copy"),
}  # fmt: skip

OFFLOAD = "offload"  # the class of what is there because tensors live in the host's memory


def products(op: Op) -> list[Product]:
    """The matrix products of one call."""
    found = row(op.name).products
    return found(op) if found else []


def flops(op: Op) -> Dim:
    """FLOPs of one call."""
    known = row(op.name)
    if known.products:
        return sum(product.flops for product in known.products(op))
    return known.flops(op) if known.flops else 0


def kind(op: Op) -> str:
    """The class of kernel an op belongs to."""
    if offloads(op):
        return OFFLOAD
    return "optimizer" if op.attrs.host else KINDS.get(row(op.name).work, "pointwise")


def offloads(op: Op) -> bool:
    """Whether an op is there because tensors live in the host's memory."""
    return op.attrs.pinned or op.attrs.cores


def operand_dtype(op: Op) -> str:
    """The dtype that an op computes in: its last operand's, or the first's where scales or locks follow it."""
    if not op.inputs:
        return op.outputs[0].dtype if op.outputs else "fp32"
    if op.name == INTO_FP32:
        return op.inputs[1].dtype
    first, last = op.inputs[0].dtype, op.inputs[-1].dtype
    followed = op.name in SCALED or op.name.startswith("cce::") or kind(op) == "attention"
    return first if first != last and followed else last


def synchronises(op: Op) -> bool:
    """Whether the host waits for the device in a call: it reads a result, or copies between pageable memory and it."""
    attrs = op.attrs
    return attrs.sync or (attrs.bus and not attrs.pinned) or (row(op.name).waits and not (attrs.host or attrs.cores))


def by_lists(op: Op) -> bool:
    """Whether a call works on lists of tensors, as optimizers do."""
    return op.name.startswith(LISTED)


def along_rows(op: Op) -> bool:
    """Whether a sum (mean, norm, extreme) takes elements that lie side by side; else it keeps the last dim."""
    dims = op.attrs.dims
    return dims is None or len(op.inputs[0].shape) - 1 in dims


def is_known(op: Op) -> bool:
    """Whether an op has a row, or is a view; what has none is priced as streaming, in one kernel."""
    return op.view or row(op.name).work != "unknown"


__all__ = [
    "along_rows", "by_lists", "flops", "is_known", "kernels", "kind", "mirrors", "offloads", "operand_dtype",
    "products", "synchronises",
]  # fmt: skip
