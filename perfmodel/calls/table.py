"""What every ATen call is: one row a name. Adding an op is adding a row.

A row says what the call's work is like, its matrix products or its FLOPs, how many CUDA kernels it launches where that
is not one (with the reason), and whether the host waits for it. CPU, GPU and the compiler's passes map the works to
what they know: `devices/cpu_work.py`, `devices/kernels.py`, `passes/lowering.py`.

A name is looked up whole (`scatter.src`), then without its overload (`add_`), then without the underscore of what works
in place (`add`).
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from ..program.dims import Dim
from ..program.op import Op
from ..registry import add_once
from . import attention
from .collectives import KIND_OF
from .products import (
    Product,
    addmm,
    baddbmm,
    bmm,
    by_expert,
    convolution,
    convolution_backward,
    cut_gradients,
    cut_logits,
    mm,
    of_rows,
    rides_along,
)

WORKS = {  # what a call does to its elements
    "product": "matrix products",
    "attention": "fused attention",
    "decomposition": "a decomposition of a library",
    "list": "one pass over lists of tensors",
    "stream": "loads, a few instructions, a store",
    "divide": "divisions",
    "root": "square roots",
    "exponential": "an exponential or logarithm an element",
    "sigmoid": "an exponential and a division an element",
    "tanh": "a hyperbolic tangent an element",
    "cosine": "a sine or cosine an element",
    "gelu": "an error function an element",
    "cast": "another dtype",
    "fill": "a store, nothing read",
    "random": "random numbers",
    "sequence": "elements that wait for one another",
    "permute": "a copy in another order",
    "join": "tensors side by side in one",
    "part": "zeros, then a copy into a part of them",
    "pad": "a copy with room around it",
    "arrange": "elements in other places",
    "take": "elements behind indices",
    "rows": "rows of a table behind indices",
    "pick": "parts along a dim behind indices",
    "put": "values to places behind indices",
    "reduction": "a sum, mean, norm or extreme, over `Attrs.dims`",
    "softmax": "a normalised exponential of each row",
    "softmax_backward": "its gradient",
    "norm": "each row normalised",
    "norm_backward": "its gradient, with those of weight and bias",
    "dropout": "random zeros and what they leave",
    "loss": "an entry a row looked up",
    "loss_backward": "its gradient: zeros but for that entry",
    "rows_backward": "rows added up behind indices",
    "select": "the largest of each row",
    "transform": "a Fourier transform",
    "collective": "data that GPUs exchange",
    "nothing": "no work: allocates, or tells the host",
    "package": "a kernel of another package or of a compiler (`devices/packages.py`)",
    "unknown": "no row: taken as streaming, in one kernel",
}


class CallRow(NamedTuple):
    """What a call is.

    Attributes:
        work: of `WORKS`.
        launches: CUDA kernels; lists, transforms and copied operands have more (`launches.py`).
        why: more or fewer than one.
        waits: whether the host waits until the device has done it.
        products: its matrix products.
        flops: its FLOPs, where it has no products.
    """

    work: str
    launches: int = 1
    why: str = ""
    waits: bool = False
    products: Callable[[Op], list[Product]] | None = None
    flops: Callable[[Op], Dim] | None = None


ROWS: dict[str, CallRow] = {}
UNKNOWN = CallRow("unknown")
LISTED = ("_foreach", "_fused", "bitsandbytes::optimizer")  # how the names of calls on lists begin


def rows(
    work: str, names: str, launches: int = 1, why: str = "", *, waits: bool = False,
    products: Callable[[Op], list[Product]] | None = None, flops: Callable[[Op], Dim] | None = None,
) -> None:  # fmt: skip
    """Add a row for each of some names."""
    for name in names.split():
        add_once(ROWS, name, CallRow(work, launches, why, waits, products, flops))


rows("product", "mm mm.out _scaled_mm torchao::scaled_int8_mm", products=mm)
rows("product", "addmm addmm_ addmm.out", products=addmm)
rows("product", "bmm", products=bmm)
rows("product", "baddbmm", products=baddbmm)
rows("product", "_grouped_mm", products=by_expert)
rows("product", "convolution", products=convolution)
rows("product", "convolution_backward", products=convolution_backward)
rows("product", "bitsandbytes::int8_linear_matmul", products=of_rows)
rows("product", "lorafusion::xw_sb lorafusion::dys_dyb lorafusion::dyw_dsa", products=rides_along)
rows("product", "cce::lse_forward", products=cut_logits)
rows("product", "cce::backward", products=cut_gradients)

FORWARD = "_scaled_dot_product_{}_attention"
THREE = "dO·O row sums, main kernel, dQ conversion"
for kernel in ("flash", "efficient", "cudnn"):
    rows("attention", FORWARD.format(kernel), flops=attention.forward)
rows("attention", FORWARD.format("flash") + "_for_cpu", flops=attention.forward)
rows("attention", "_scaled_dot_product_flash_attention_backward", 3, THREE, flops=attention.backward)
rows("attention", "_scaled_dot_product_cudnn_attention_backward", 3, THREE, flops=attention.backward)
rows("attention", "_scaled_dot_product_efficient_attention_backward", 2, "dO·O row sums, main kernel",
     flops=attention.backward)  # fmt: skip
rows("attention", "_scaled_dot_product_flash_attention_for_cpu_backward", flops=attention.backward)
rows("attention", "flash_attn::_flash_attn_forward", flops=attention.forward_heads_last)
rows("attention", "flash_attn::_flash_attn_backward", 3, THREE, flops=attention.backward_heads_last)
rows("attention", "flash_attn::_flash_attn_varlen_forward", flops=attention.forward_documents)
rows("attention", "flash_attn::_flash_attn_varlen_backward", 3, THREE, flops=attention.backward_documents)

# Of cuSOLVER; PyTorch reads the status of some at once (BatchLinearAlgebra.cpp). What the library launches is not
# counted: a call counts as one kernel.
rows("decomposition", "linalg_qr _linalg_solve_ex linalg_inv_ex")
rows("decomposition", "_linalg_svd linalg_pinv.atol_rtol_tensor _linalg_eigh linalg_eig", waits=True)

rows(
    "stream",
    "abs add sub rsub mul neg pow where eq ne gt ge le lt logical_not logical_or logical_and isnan floor_divide",
)
rows("stream", "bitwise_and bitwise_not bitwise_or __or__ clamp masked_fill addcmul lerp maximum minimum sign relu")
rows("stream", "threshold_backward tanh_backward native_dropout_backward nan_to_num round floor")
rows("stream", "stack repeat lift_fresh avg_pool2d avg_pool2d_backward")
rows("random", "bernoulli_ rand randn uniform_ normal_")
rows("sequence", "trace kthvalue sort linalg_lu_solve")
rows("put", "histc", 2, "fills zeros, then counts (SummaryOps.cu)")
rows("stream", "isinf", 2, "absolute values, then a comparison")
rows("sequence", "cumsum", 2, "scan in two passes (CUB)")
rows("divide", "div reciprocal addcdiv")
rows("root", "sqrt rsqrt")
rows("exponential", "exp exp2 log log2 erf log1p expm1 xlogy")
rows("sigmoid", "sigmoid sigmoid_backward silu silu_backward softplus softplus_backward")
rows("sigmoid", "log_sigmoid_forward log_sigmoid_backward")
rows("tanh", "tanh")
rows("cosine", "cos sin polar")
rows("gelu", "gelu gelu_backward")
rows("cast", "_to_copy")
rows(
    "fill", "zeros ones zeros_like ones_like new_zeros new_ones zero fill full full_like new_full arange scalar_tensor"
)
rows("fill", "eye", 2, "fills zeros, then the diagonal")
rows("permute", "clone tril triu")
rows("arrange", "copy flip roll unfold_backward diagonal_backward block_diag")
rows("arrange", "diag_embed", 2, "fills zeros, then copies the diagonal")
rows("join", "cat")
rows("part", "slice_backward", 2, "fills zeros, then copies the slice")
rows("part", "select_backward", 2, "fills zeros, then copies the selected part")
rows("pad", "constant_pad_nd", 2, "fills the padding, then copies the inner part")
rows("take", "index gather")
rows("rows", "embedding")
rows("pick", "index_select")
rows("put", "index_put_ scatter_")
rows("put", "index_put", 2, "copies the tensor, then puts the values")
rows("put", "scatter scatter_add", 2, "copies the tensor, then scatters")
rows("put", "scatter_add_")
rows("put", "masked_scatter", 6, "estimated: copies the tensor and the flags, counts those before each in two kernels "
     "(CUB), checks their number, puts the values (IndexKernel.cu)")  # fmt: skip
rows("take", "masked_scatter_backward", 5, "estimated: nonzero's kernels, for which the host waits, then takes values "
     "(IndexKernel.cu)", waits=True)  # fmt: skip
rows("put", "index_add_")
rows("put", "index_add", 2, "copies the tensor, then adds the rows")
rows("put", "index_copy", 2, "copies the tensor, then the rows")
rows("reduction", "sum mean linalg_vector_norm amax amin aminmax argmax max min any all nansum _is_all_true")
rows("softmax", "_softmax _log_softmax _safe_softmax")
rows(
    "softmax_backward",
    "_softmax_backward_data",
    2,
    "product of gradient and result, then its sums and the result (SoftMax.cu)",
)
rows("softmax", "logsumexp", 9, "largest of each row, its infinite ones, differences, exponentials, sums, logarithms "
     "and their sums (ReduceOps.cpp)")  # fmt: skip
rows("softmax_backward", "_log_softmax_backward_data")
rows("norm", "native_layer_norm _fused_rms_norm")
rows("norm_backward", "native_layer_norm_backward", 2, "input gradient; weight and bias gradients")
rows("norm_backward", "_fused_rms_norm_backward")
rows("dropout", "native_dropout")
rows("loss", "nll_loss_forward")
rows("loss_backward", "nll_loss_backward", 2, "zero fill of the gradient, then the scatter")
rows("rows_backward", "embedding_dense_backward", 6,
     "sorts the indices (CUB radix sort), then segment offsets and sums")  # fmt: skip
rows("select", "topk", 2, "radix selection, then a sort of what was found (TensorTopK.cu)")
rows("transform", "_fft_c2c _fft_r2c _fft_c2r")
rows("sequence", "bitsandbytes::outlier_columns", 4, "nonzero: counts them, the host waits, selects, writes indices",
     waits=True)  # fmt: skip
rows("sequence", "nonzero", 4, "counts them in two kernels, the host waits, then selects and writes them (Nonzero.cu)",
     waits=True)  # fmt: skip
rows("sequence", "_coalesce", 24, "estimated: flattens places, sorts, finds those that differ (the host waits), adds "
     "their values (SparseCUDATensor.cu)", waits=True)  # fmt: skip
rows("take", "sparse_mask", 3, "estimated: flattens the places in two kernels, then takes values (SparseTensor.cpp)")
rows("put", "_to_dense", 2, "fills zeros, then puts the values")
rows("nothing", "_sparse_coo_tensor_with_dims_and_tensors _nnz is_coalesced", 0, "looks at tensors that are there")
rows("nothing", "empty_like new_empty new_empty_strided empty", 0, "allocates only")
rows("collective", " ".join(KIND_OF))
rows("list", "fsdp::all_gather_copy_in")
rows("arrange", "fsdp::split_with_sizes_copy")
rows("join", "fsdp::chunk_cat")
rows("nothing", "set_", 0, "points at other memory")
rows("nothing", "promote_types", 0, "asks for a dtype")
rows("nothing", "_local_scalar_dense", 0, "a copy to the host and a synchronisation, no kernel", waits=True)
rows("nothing", "_linalg_check_errors", 0, "reads a status on the host", waits=True)


@cache
def row(name: str) -> CallRow:
    """The row of a call by its name; `UNKNOWN` if it has none."""
    base = name.partition(".")[0]
    for known in (name, base, base if base.startswith("_") else base.rstrip("_")):
        if known in ROWS:
            return ROWS[known]
    if name.startswith(LISTED):
        return CallRow("list")
    return CallRow("package") if "::" in name else UNKNOWN
