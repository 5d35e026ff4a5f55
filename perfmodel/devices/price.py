"""The price of every op of a part on a device, in seconds.

Ops are sorted into tables by the model that prices them (GEMM, attention, memory-bound kernels, lists of an optimizer),
and each table is priced in one vectorised call, over the whole grid.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..calls.costs import SCALED, products
from ..calls.table import row
from ..program.dims import product, same
from ..program.dtypes import FLOAT8
from ..program.lengths import Documents
from ..program.op import Op
from . import kernels
from .attention import attention_backward_time, attention_forward_time
from .gemm import LAYOUTS, gemm_time
from .grouped import grouped_time
from .hardware import ITEMSIZE
from .pointwise import pointwise_time
from .profile import DeviceProfile
from .tables import Model, Tables

# B/s of copies from pageable host memory to the device, through the driver's staging buffer: an A10 (PCIe 4.0 x16), a
# Xeon 6438Y+, 4 MiB again and again (https://github.com/drkennetz/cuda_examples/pull/1, 003_bandwidth_check).
BUS = 19.6e9
# Rate of the memory-efficient (CUTLASS) kernel in 16 bit over FlashAttention-2's. A100, head size 128, 2 x 8 heads of
# 8,192 tokens: 105 TFLOP/s forward (https://github.com/facebookresearch/xformers/issues/712), where FA2 reaches 73 % of
# 312; 74 to 103 backward (xformers/pull/557, faster by 1.4 since NVIDIA/cutlass/pull/992), where FA2 reaches 63 %.
EFFICIENT = 0.46

HALF = ("bf16", "fp16")  # what tensor cores take as it is
WRITTEN = ("bmm", *SCALED)  # products whose operands were both just written
EIGHT = ("i8", *FLOAT8)  # what they take in pairs
ROW_WISE = (
    "norm",
    "norm_backward",
    "softmax",
    "embedding",
    "cross_entropy",
    "fused_norm",
)  # kinds that give a row to a thread block


def durations(ops: Sequence[Op], profile: DeviceProfile) -> np.ndarray:
    """Device seconds of each op, shape (ops, *grid); 0 for views and for work on host tensors."""
    if profile.cpu is not None:
        from .cpu import cpu_durations

        return cpu_durations(ops, profile.hardware, profile.cpu)
    tables = Tables()
    for i, op in enumerate(ops):
        if not op.view and not op.attrs.host:
            _sort(i, op, tables)
    return tables.seconds(len(ops), {name: partial(model, profile) for name, model in MODELS.items()})


def _sort(i: int, op: Op, tables: Tables) -> None:
    """Put one op into the table of its model; an op of several kernels gets several rows."""
    name, inputs = op.name, op.inputs
    work = row(name).work
    if work == "product":
        _products(i, op, tables)
        _launch(i, kernels.operand_copies(op), tables)
    elif work == "attention":
        _attention_row(i, op, tables)
    elif op.attrs.bus:
        tables.add("bus", (), i, op.outputs[0].nbytes)
    elif work == "decomposition":
        *batch, rows, columns = inputs[0].shape
        tables.add("solver", (name,), i, product(tuple(batch)), rows, columns)
    else:
        _launch(i, kernels.memory_bound(op), tables)


def _attention_row(i: int, op: Op, tables: Tables) -> None:
    """Sizes (b, queries, keys, heads, kv heads, head size), bytes of a mask's element, and the longest document.

    Where values are of another width than keys, the head size is that of as much work: of the two products forward each
    has one, of the five backward keys have three.
    """
    name, inputs, documents = op.name, op.inputs, op.attrs.documents
    backward = name.endswith("_backward")
    q, k, v = inputs[1:4] if backward else inputs[:3]
    mask: float = 0
    if documents is not None:  # all behind one another, (tokens, h, d)
        sizes = (1, q.shape[0], k.shape[0], q.shape[1], k.shape[1], q.shape[2])
    else:
        heads = 2 if "flash_attn" in name else 1  # the flash-attn package puts the sequence first
        seq = 3 - heads
        keys, values = q.shape[3], v.shape[3]
        width = keys if same(keys, values) else (3 * keys + 2 * values) / 5 if backward else (keys + values) / 2
        sizes = (q.shape[0], q.shape[seq], k.shape[seq], q.shape[heads], k.shape[heads], width)
        mask = sum(ITEMSIZE[x.dtype] for x in inputs[6 if backward else 3 :])
    packed = None if documents is None else documents._replace(longest=0)
    kernel = next((k for k in ("cudnn", "efficient") if k in name), "flash")
    key = (kernel, backward, op.attrs.causal, op.attrs.window, q.dtype, packed)
    tables.add("attention", key, i, *sizes, mask, 0 if documents is None else documents.longest)


def _products(i: int, op: Op, tables: Tables) -> None:
    """The GEMMs inside a call; what is filtered channel by channel streams."""
    dtype = op.inputs[0].dtype
    if op.attrs.routing is not None:
        (a, b), nt = (x.shape for x in op.inputs[:2]), op.attrs.layout == "nt"
        sizes = (b[0], a[0], b[1]) if nt else (a[0], b[1], b[2])
        key = dtype if dtype in HALF else "fp32", op.attrs.layout, op.attrs.routing, op.attrs.sync
        tables.add("grouped", key, i, *sizes)
        return
    for product_of in products(op):
        layout, m, n, k, batch = product_of
        if product_of.depthwise(op):
            _launch(i, kernels.memory_bound(op), tables)
        elif dtype == "c64":  # four real products: [Re A, -Im A; Im A, Re A] by [Re B; Im B]
            _gemm_row(i, op.name, "fp32", layout, (2 * m, n, 2 * k, batch), tables)
        elif dtype in EIGHT:  # tensor cores take them in pairs: the bytes and the steps of half the depth
            _gemm_row(i, op.name, dtype, layout, (m, n, -(-k // 2), batch), tables)
        else:
            _gemm_row(i, op.name, dtype if dtype in HALF else "fp32", layout, (m, n, k, batch), tables)


def _gemm_row(i: int, name: str, dtype: str, layout: Any, shape: tuple[Any, ...], tables: Tables) -> None:
    """A weight comes from HBM, an activation may still lie in L2; weight gradients and bmm have two activations."""
    b_copies = 1.0 if name in WRITTEN or layout == "nt" else np.inf
    accumulates = name in ("addmm_", "addmm.out")
    tables.add("gemm", (dtype, name == "bmm"), i, *shape, LAYOUTS.index(layout), b_copies, accumulates)


def _launch(i: int, launched: list[kernels.Kernel], tables: Tables) -> None:
    for kind, *amounts in launched:
        tables.add("memory", (kind,), i, *amounts)


def _gemm(profile: DeviceProfile, dtype: str, batched: bool, *columns: Any) -> np.ndarray:
    """Matrix products of one dtype, all layouts at once.

    cuBLAS splits the k of no batch in fp32: of the 9,343 that NeuSight profiled (https://github.com/sitar-lab/NeuSight)
    none ran a sliced or split kernel, while of its single products those with few tiles did.
    """
    *shape, layout, b_copies, accumulates = columns
    parameters = profile.gemm[dtype]
    slowdowns = np.array([parameters.slowdown(name) for name in LAYOUTS])
    price = partial(
        gemm_time, *shape, hardware=profile.hardware, dtype=dtype, layout=slowdowns[layout.astype(int)],
        accumulate=accumulates, b_copies=b_copies,
    )  # fmt: skip
    seconds = price(parameters=parameters)
    if batched and dtype == "fp32":
        whole = price(parameters=replace(parameters, max_split=1))
        seconds = np.where(np.greater(shape[-1], 1), whole, seconds)
    return np.asarray(seconds)


def _learned_gemm(profile: DeviceProfile, dtype: str, batched: bool, *columns: Any) -> np.ndarray:
    """As `_gemm`; 16-bit products of measured silicon with what measurements leave of that price.

    Weight gradients (nt) keep their price: SimuMax's rows of an A100 and a B200 say that the factor makes it no better,
    while it does that of input gradients. Batched products and those of 8 bits were not measured.
    """
    if dtype in EIGHT:
        return _gemm(profile, "fp16", batched, *columns)
    seconds = _gemm(profile, dtype, batched, *columns)
    if profile.residual and dtype in HALF and not batched:
        from .residual import load_residual  # few devices have one

        residual, (m, n, k, batch, layout, *_) = load_residual(profile.residual), columns
        single = (batch == 1) & (layout != LAYOUTS.index("nt"))
        rows = np.flatnonzero(single.reshape(len(single), -1).all(axis=1))
        if rows.size:
            seconds[rows] *= residual.factor(m[rows], n[rows], k[rows], profile.hardware.sm_count)
    return seconds


def _attention(
    profile: DeviceProfile, kernel: str, backward: bool, causal: bool, window: int | None, dtype: str,
    packed: Documents | None, *columns: Any,
) -> np.ndarray:  # fmt: skip
    *shape, longest = columns
    model = attention_backward_time if backward else attention_forward_time
    parameters = profile.cudnn_attention if kernel == "cudnn" else profile.attention
    if kernel == "efficient" and dtype in HALF:
        slower = tuple((size, share * EFFICIENT) for size, share in parameters.efficiency)
        parameters = replace(parameters, efficiency=slower)
    kinds = None if packed is None else packed.groups(shape[1], longest)
    price = partial(model, hardware=profile.hardware, parameters=parameters, causal=causal, dtype=dtype)
    return np.asarray(price(*shape, documents=kinds, window=window))


def _bus(profile: DeviceProfile, nbytes: Any) -> np.ndarray:
    return np.asarray(nbytes / BUS)


def _solver(profile: DeviceProfile, name: str, *shape: Any) -> np.ndarray:
    from .solver import solver_time  # few steps have a decomposition

    return solver_time(name, *shape, hardware=profile.hardware)


def _memory(profile: DeviceProfile, kind: str, *columns: Any) -> np.ndarray:
    """Memory-bound kernels; several launches pay the floor of each, and `spread` is what every byte costs."""
    launches, read, written, elements, rows, length, spread = columns
    p = profile.pointwise
    floor = p.launch_floor + p.kernel_gap
    row_wise = kind in ROW_WISE
    seconds = pointwise_time(
        read, written, hardware=profile.hardware, parameters=p, kind=kind, elements=elements,
        rows=rows if row_wise else None,
        row_elements=length if row_wise or kind == "fused_norm_backward" else None,
    )  # fmt: skip
    if kind == "serial":  # its steps wait for one another, however many bytes each moves
        return np.asarray(seconds + (launches - 1) * floor)
    return np.asarray((seconds - floor) * spread + launches * floor)


MODELS: dict[str, Model] = {
    "gemm": _learned_gemm, "grouped": grouped_time, "attention": _attention, "solver": _solver, "bus": _bus,
    "memory": _memory,
}  # fmt: skip
