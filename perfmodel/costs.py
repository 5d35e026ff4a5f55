"""What an op costs besides bytes: FLOPs, and how many CUDA kernels one ATen call launches.

FLOPs count multiply and add as two, and only matrix products and attention, as `torch.utils.flop_counter` does.
"""

from collections.abc import Callable, Iterable
from functools import cache, lru_cache
from typing import Any

import numpy as np

from . import products
from .tape.dims import Dim
from .tape.op import Op, Spec

Shape = tuple[Dim, ...]
_FLOPS: dict[str, Callable[..., Dim]] = {}


def flops_of(*names: str) -> Callable[[Callable[..., Dim]], Callable[..., Dim]]:
    """Register a FLOP formula, a function of the input shapes."""

    def register(formula: Callable[..., Dim]) -> Callable[..., Dim]:
        for name in names:
            _FLOPS[name] = formula
        return formula

    return register


@flops_of("mm")
def mm_flops(a: Shape, b: Shape) -> Dim:
    """(m, k)·(k, n)."""
    return 2 * a[0] * a[1] * b[1]


@flops_of("mm.out")
def mm_out_flops(a: Shape, b: Shape, out: Shape) -> Dim:
    """As `mm`; the result is written over `out`."""
    return mm_flops(a, b)


@flops_of("lorafusion::xw_sb")
def xw_sb_flops(x: Shape, w: Shape, s: Shape, b: Shape, *bias: Shape) -> Dim:
    """x·Wᵀ + s·Bᵀ: (T, n), (m, n), (T, r), (m, r)."""
    return 2 * x[0] * w[0] * (x[1] + s[1])


@flops_of("lorafusion::dys_dyb")
def dys_dyb_flops(g: Shape, b: Shape, s: Shape, *sums: Shape) -> Dim:
    """gᵀ·s and g·B: (T, m), (m, r), (T, r)."""
    return 4 * g[0] * g[1] * s[1]


@flops_of("lorafusion::dyw_dsa")
def dyw_dsa_flops(g: Shape, w: Shape, ds: Shape, a: Shape, *mask: Shape) -> Dim:
    """g·W + ds·A: (T, m), (m, n), (T, r), (r, n)."""
    return 2 * g[0] * w[1] * (g[1] + ds[1])


@flops_of("addmm", "addmm_")
def addmm_flops(bias: Shape, a: Shape, b: Shape) -> Dim:
    """The product only; the bias rides along."""
    return mm_flops(a, b)


@flops_of("addmm.out")
def addmm_out_flops(bias: Shape, a: Shape, b: Shape, out: Shape) -> Dim:
    """The product only; the result is written over `out`."""
    return mm_flops(a, b)


@flops_of("bmm")
def bmm_flops(a: Shape, b: Shape) -> Dim:
    """(h, m, k)·(h, k, n)."""
    return 2 * a[0] * a[1] * a[2] * b[2]


def attention_product(q: Shape, k: Shape) -> Dim:
    """One product of the attention's size: 2·b·h·sq·skv·d, causal masking not deducted."""
    return 2 * q[0] * q[1] * q[2] * k[2] * q[3]


@flops_of(
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
)
def attention_flops(q: Shape, k: Shape, *rest: Shape) -> Dim:
    """qkᵀ and pv."""
    return 2 * attention_product(q, k)


@flops_of(
    "_scaled_dot_product_flash_attention_backward",
    "_scaled_dot_product_efficient_attention_backward",
    "_scaled_dot_product_cudnn_attention_backward",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)
def attention_backward_flops(g: Shape, q: Shape, k: Shape, *rest: Shape) -> Dim:
    """qkᵀ again, then the gradients of p, v, q and k."""
    return 5 * attention_product(q, k)


def _heads_first(x: Shape) -> Shape:
    return (x[0], x[2], x[1], x[3])


@flops_of("flash_attn::_flash_attn_forward")
def flash2_flops(q: Shape, k: Shape, *rest: Shape) -> Dim:
    """As `attention_flops`, for (b, s, h, d)."""
    return attention_flops(_heads_first(q), _heads_first(k))


@flops_of("flash_attn::_flash_attn_backward")
def flash2_backward_flops(g: Shape, q: Shape, k: Shape, *rest: Shape) -> Dim:
    """As `attention_backward_flops`, for (b, s, h, d)."""
    return attention_backward_flops(g, _heads_first(q), _heads_first(k))


def flops(op: Op) -> Dim:
    """FLOPs of one call."""
    formula = _FLOPS.get(op.name)
    if formula:
        return formula(*[s.shape for s in op.inputs])
    return sum(product.flops for product in products.products(op)) if op.name in products.NAMES else 0


GEMMS = frozenset((
    "mm", "mm.out", "addmm", "addmm_", "addmm.out", "bmm", "lorafusion::xw_sb", "lorafusion::dys_dyb",
    "lorafusion::dyw_dsa",
))  # fmt: skip

# CUDA kernels per ATen call where it is not 1, with the reason. To be confirmed on a GPU by the validation harness.
# A library's product is one, whatever else the library launches for it (validate/measuring/kineto.py).
KERNELS: dict[str, tuple[int, str]] = {
    "_local_scalar_dense": (0, "a copy to the host and a synchronisation, no kernel"),
    "_linalg_check_errors": (0, "reads a status on the host"),
    "empty_like": (0, "allocates only"),
    "new_empty_strided": (0, "allocates only"),
    "zeros": (1, "a fill"),
    "eye": (2, "fills zeros, then the diagonal"),
    "diag_embed": (2, "fills zeros, then copies the diagonal"),
    "slice_backward": (2, "fills zeros, then copies the slice"),
    "select_backward": (2, "fills zeros, then copies the selected part"),
    "scatter.src": (2, "copies the tensor, then scatters"),
    "index_copy": (2, "copies the tensor, then the rows"),
    "index_put": (2, "copies the tensor, then puts the values"),
    "topk": (2, "radix selection, then a sort of what was found (TensorTopK.cu)"),
    "isinf": (2, "absolute values, then a comparison"),
    "constant_pad_nd": (2, "fills the padding, then copies the inner part"),
    "cumsum": (2, "scan in two passes (CUB)"),
    "embedding_dense_backward": (6, "sorts the indices (CUB radix sort), then segment offsets and sums"),
    "_softmax_backward_data": (2, "product of gradient and result, then its sums and the result (SoftMax.cu)"),
    "nll_loss_backward": (2, "zero fill of the gradient, then the scatter"),
    "native_layer_norm_backward": (2, "input gradient; weight and bias gradients"),
    "_scaled_dot_product_flash_attention_backward": (3, "dO·O row sums, main kernel, dQ conversion"),
    "flash_attn::_flash_attn_backward": (3, "dO·O row sums, main kernel, dQ conversion"),
    "_scaled_dot_product_efficient_attention_backward": (2, "dO·O row sums, main kernel"),
    "_scaled_dot_product_cudnn_attention_backward": (3, "dO·O row sums, main kernel, dQ conversion"),
}

# index_put that accumulates (Indexing.cu): remainder, stride, division and range of the indices, sort, sums.
_KERNELS_OF_ACCUMULATION = 6

# cuFFT keeps a transform in shared memory up to so many complex points of 8 B, the usual 48 KiB less bookkeeping; a
# longer one is factored into two passes (VkFFT, https://doi.org/10.1109/ACCESS.2023.3242240, section on memory layout).
_FFT_ON_CHIP = 4096

# MultiTensorApply.cuh, CUDA 12: tensors and 65,536-element chunks that fit one launch, by number of tensor lists.
_TENSORS_PER_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36}
_TENSORS_PER_SCALAR_LIST = {1: 96, 3: 48}
_BLOCKS_PER_LAUNCH = 320
_CHUNK = 65_536
_NORMS_PER_CLEANUP = 400  # ForeachReduceOp.cu
_LISTS = {
    "_foreach_mul_.Scalar": 1, "_foreach_mul_.Tensor": 1, "_foreach_add_.Scalar": 1, "_foreach_div_.ScalarList": 1,
    "_foreach_lerp_.Scalar": 2, "_foreach_sqrt": 2, "_foreach_add_.List": 2, "_foreach_norm.Scalar": 1,
    "_foreach_addcmul_.Scalar": 3, "_foreach_addcdiv_.ScalarList": 3, "_fused_adamw_": 4,
}  # fmt: skip


# Decompositions of cuSOLVER; whether PyTorch reads their status at once (BatchLinearAlgebra.cpp). The kernels that they
# launch inside the library are not counted: a call counts as one.
SOLVERS = {
    "linalg_qr": False, "_linalg_svd": True, "linalg_pinv.atol_rtol_tensor": True, "_linalg_eigh": True,
    "linalg_eig": True, "_linalg_solve_ex": False, "linalg_inv_ex": False,
}  # fmt: skip


READS = ("_local_scalar_dense", "_linalg_check_errors")  # of a result, by the host


def synchronises(op: Op) -> bool:
    """Whether the host waits for the device in a call: it reads a result, or copies between pageable memory and it."""
    if op.name in READS:
        return "host" not in op.attrs
    return SOLVERS.get(op.name, False) or (bool(op.attrs) and ("sync" in op.attrs or "bus" in op.attrs))


def kernels(op: Op) -> Dim:
    """CUDA kernels that one call launches; 0 for views, for work on host tensors and for copies over the bus."""
    if op.view:
        return 0
    if op.attrs:
        if "host" in op.attrs or "bus" in op.attrs:
            return 0
        if op.name in GEMMS:
            return 1 + len(copied_operands(op))
        if op.name.startswith("_fft"):
            return _fft_kernels(op)
        if "accumulate" in op.attrs:
            return _KERNELS_OF_ACCUMULATION
    if op.name in _LISTS:
        if op.launches is None:
            op.launches = _kernels_on_lists(op)
        return op.launches
    return KERNELS.get(op.name, (1, ""))[0]


def _kernels_on_lists(op: Op) -> Dim:
    limits = _TENSORS_PER_SCALAR_LIST if op.name.endswith("ScalarList") else _TENSORS_PER_LAUNCH
    if op.name == "_foreach_norm.Scalar":  # partial norms of chunks, then a cleanup
        return _launches(op.inputs, limits[1]) + -(-sum(s.copies for s in op.inputs) // _NORMS_PER_CLEANUP)
    results = op.outputs[: len(op.outputs) // 4] if op.name == "_fused_adamw_" else op.outputs
    return _launches(results, limits[_LISTS[op.name]])


def copied_operands(op: Op) -> list[int]:
    """Which inputs of a matrix product cuBLAS cannot read as they lie: attributes `copied:0`, `copied:1`."""
    return [int(a.removeprefix("copied:")) for a in op.attrs if isinstance(a, str) and a.startswith("copied:")]


def _fft_kernels(op: Op) -> Dim:
    """Passes of a transform, one scaling if it is normalised, one that mirrors the half spectrum of a real input.

    The attributes are over how many dims, from the last, and perhaps `scaled`, `half` (only half the spectrum is asked
    for).
    """
    dims = op.outputs[0].shape[-op.attrs[0] :]
    passes = sum(1 + np.greater(n, _FFT_ON_CHIP) for n in dims)
    return passes + ("scaled" in op.attrs) + mirrors(op)


def mirrors(op: Op) -> bool:
    """Whether a transform of real numbers is asked for the whole spectrum."""
    return op.name == "_fft_r2c" and "half" not in op.attrs


LISTED = ("_foreach", "_fused", "bitsandbytes::optimizer")


def by_lists(op: Op) -> bool:
    """Whether a call works on lists of tensors, as optimizers do."""
    return op.name.startswith(LISTED)


def _launches(tensors: tuple[Spec, ...], limit: int) -> Dim:
    """Launches of `multi_tensor_apply`: a launch is full at `limit` tensors or so many chunks."""
    chunks = [-(-s.numel // _CHUNK) for s in tensors]
    copies = [s.copies for s in tensors]
    if not any(isinstance(n, np.ndarray) for n in chunks):
        return _packed(tuple(zip(chunks, copies, strict=True)), limit)
    points, where = _distinct({id(n): n for n in chunks if isinstance(n, np.ndarray)}.values())
    columns = np.broadcast_arrays(*(n.reshape(-1)[points] if isinstance(n, np.ndarray) else [n] for n in chunks))
    packed = [_packed(tuple(zip(column, copies, strict=True)), limit) for column in np.stack(columns, axis=1).tolist()]
    return np.array(packed)[where]


def _distinct(arrays: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """One point of a grid for each combination of values that arrays take over it; which of them a point has."""
    code: Any = 0
    for array in arrays:
        values, index = np.unique(array, return_inverse=True)
        _, code = np.unique(code * len(values) + index, return_inverse=True)
    return np.unique(code, return_index=True)[1], code


@lru_cache(maxsize=4096)
def _packed(tensors: tuple[tuple[int, int], ...], limit: int) -> int:
    """Launches for tensors given as (chunks, copies): the lists of one step are packed again and again."""
    launches = slots = blocks = 0
    for chunks, copies in tensors:
        for _ in range(copies):
            filled, blocks = divmod(blocks + chunks, _BLOCKS_PER_LAUNCH)
            launches += filled
            # after a launch the tensor in progress keeps a slot, if chunks of it remain
            slots = int(blocks > 0) if filled else slots + 1
            if slots == limit:
                launches, slots, blocks = launches + 1, 0, 0
    return launches + (blocks > 0)


def kind(op: Op) -> str:
    """The class of kernel an op belongs to, for totals and prices."""
    return _kind(op.name, "host" in op.attrs)


@cache
def _kind(name: str, on_host: bool) -> str:
    if name in GEMMS or name in products.NAMES:
        return "gemm"
    if "attention" in name or "flash_attn" in name:
        return "attention"
    if name in SOLVERS:
        return "solver"
    if name.startswith(LISTED) or on_host:
        return "optimizer"
    if name in ("inductor::rows", "inductor::columns"):
        return "reduction"
    if "softmax" in name or "layer_norm" in name or name.startswith(("nll", "sum", "mean", "linalg")):
        return "reduction"
    if "embedding" in name:
        return "embedding"
    if name in ("_to_copy", "clone", "cat", "slice_backward"):
        return "copy"
    return "pointwise"
