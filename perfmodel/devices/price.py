"""The price of every op of a part on a device, in seconds.

Ops are sorted into tables by the model that prices them (GEMM, attention, memory-bound kernels, lists of an optimizer),
and each table is priced in one vectorised call, over the whole grid.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..calls.collectives import collective_row
from ..calls.costs import INTO_FP32, SCALED, products
from ..calls.table import row
from ..errors import UserError
from ..program.dims import product, same
from ..program.dtypes import FLOAT8
from ..program.lengths import Documents
from ..program.op import Op
from . import kernels
from .alignment import WIDE, padding
from .attention import attention_backward_time, attention_forward_time
from .gemm import gemm_time
from .gemm_parameters import LAYOUTS
from .hardware import ITEMSIZE, Hardware
from .pointwise import pointwise_time
from .profile import DeviceProfile
from .tables import CallRows, Model, Places, Priced, Tables, summed_rows

# B/s of copies from pageable host memory to the device, through the driver's staging buffer: an A10 (PCIe 4.0 x16), a
# Xeon 6438Y+, 4 MiB again and again (https://github.com/drkennetz/cuda_examples/pull/1, 003_bandwidth_check).
BUS = 19.6e9
# Of the bus's bandwidth what copies from and to page-locked memory reach: 12.36 GB/s on PCIe 3.0 x16, 6.20 on x8
# (https://github.com/NVIDIA/nvbandwidth, README at 04bf286), 55.6 on PCIe 5.0 x16 (its tutorials): 0.785 to 0.883.
PINNED = 0.83
USUAL_BUS = 31.5e9  # B/s one way of PCIe 4.0 x16
# Of the bandwidth of the host's memory what its cores reach. ZeRO-Offload (arXiv 2101.06840, table 4; figures as
# remembered, the paper was not readable here), 2 Xeon 8168 with 12 channels of DDR4-2666 (256 GB/s), Adam of 1 to 10
# billion parameters: DeepSpeed's one pass of 28 B each in 0.22 to 2.57 s is 91 to 127 GB/s; PyTorch's loop, 80 B each
# in 1.39 to 14.8 s, 54 to 58 GB/s.
ONE_PASS, IN_PASSES = 0.43, 0.22
FUSED = ("deepspeed::adam_update", "_fused_adamw_")  # calls that update in one pass
# Rate of the memory-efficient (CUTLASS) kernel in 16 bit over FlashAttention-2's. A100, head size 128, 2 x 8 heads of
# 8,192 tokens: 105 TFLOP/s forward (https://github.com/facebookresearch/xformers/issues/712), where FA2 reaches 73 % of
# 312; 74 to 103 backward (xformers/pull/557, faster by 1.4 since NVIDIA/cutlass/pull/992), where FA2 reaches 63 %.
EFFICIENT = 0.46
# Time of the same kernel in fp32 over that in 16 bit where tensor cores have TF32, three products of which it takes for
# one (PyTorch, mem_eff_attention/gemm_kernel_utils.h: OpMultiplyAddFastF32). A100, 64 x 16 heads of 1,024 tokens: 3.4,
# 4.3 and 3.7 for head sizes 64, 128 and 256, backward 3.8 (https://github.com/facebookresearch/xformers/pull/587)
IN_TF32 = 3.8

# Clocks of a 16-bit product in a stream of other kernels on top of those in a graph of its like, where its start hides
# behind the one before: with tensor memory accelerators 2.1 to 2.5 us in BERT-small, 1 x 141 on an H100 (4 shapes, 25
# products), and 0.8 to 6.9 in Qwen1.5-0.5B, 16 x 559, besides the gap of 1.4 (https://github.com/AMD-AGI/TraceLens,
# tests/traces/h100, torch 2.6). A part of it may be an older library's; LoRAFusion's layers (`validate layers`), whose
# rows had no part in it, come from 8.0 to 6.8 % forward and from 5.4 to 4.1 % with backward.
IN_STREAM = 4400.0
ACCELERATED = ("9.", "10.")  # compute capabilities with such accelerators in the kernels of cuBLAS

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
    "fused_norm_backward",
)  # kinds that give a row to a thread block


def durations(ops: Sequence[Op], profile: DeviceProfile, *, in_step: bool = True) -> np.ndarray:
    """Device seconds of each op, shape (ops, *grid); 0 for views and for work on host tensors.

    Args:
        in_step: as in a training step; if not, 16-bit products as benchmarks have them: of their like back to back, too
            short to make the board warm, and with what was learned of such (`residual`). In published steps that made
            nothing better (4.2 % for 4.1, ratios 2.8 % for 2.6), so they go without.
    """
    if profile.cpu is not None:
        from .cpu import cpu_durations

        return cpu_durations(ops, profile.hardware, profile.cpu, partial(_collective, profile))
    sheets, places = sorted_into_tables(ops)
    return from_tables([(sheet.model, sheet.key, sheet.columns) for sheet in sheets], places, profile, in_step=in_step)


def sorted_into_tables(ops: Sequence[Op]) -> tuple[list[CallRows], Places]:
    """What models have to price of ops, whatever the GPU, and where each op's price is then."""
    tables = Tables()
    for i, op in enumerate(ops):
        if not op.view and not op.attrs.host:
            _sort(i, op, tables)
    return tables.sheets(), tables.places(len(ops))


def from_tables(
    sheets: Sequence[Priced], places: Places, profile: DeviceProfile, *, in_step: bool = True
) -> np.ndarray:
    """Device seconds of ops on a GPU, from what `sorted_into_tables` gives; `durations` says the rest."""
    models = {name: partial(model, profile) for name, model in MODELS.items()}
    if not in_step:
        bursts = {dtype: p.in_bursts() if dtype in HALF else p for dtype, p in profile.gemm.items()}
        models["gemm"] = partial(_gemm, replace(profile, gemm=bursts), learned=True)
    return summed_rows(sheets, places, models)


def _sort(i: int, op: Op, tables: Tables) -> None:
    """Put one op into the table of its model; an op of several kernels gets several rows."""
    name, inputs = op.name, op.inputs
    work = row(name).work
    if work == "product":
        _products(i, op, tables)
        _launch(i, kernels.operand_copies(op), tables)
    elif work == "attention":
        _attention_row(i, op, tables)
    elif work == "collective":
        key, sizes = collective_row(op)
        tables.add("collective", key, i, *sizes)
    elif op.attrs.bus:
        tables.add("bus", (op.attrs.pinned,), i, op.outputs[0].nbytes)
    elif op.attrs.cores:
        tables.add("cores", (ONE_PASS if name in FUSED else IN_PASSES,), i, op.bytes_read + op.bytes_written)
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
    dtype = op.inputs[op.name == INTO_FP32].dtype  # which adds them to a sum
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
            _gemm_row(i, op, "fp32", layout, (2 * m, n, 2 * k, batch), tables)
        elif dtype in EIGHT:  # tensor cores take them in pairs: the bytes and the steps of half the depth
            _gemm_row(i, op, dtype, layout, (m, n, -(-k // 2), batch), tables)
        else:
            _gemm_row(i, op, dtype if dtype in HALF else "fp32", layout, (m, n, k, batch), tables)


def _gemm_row(i: int, op: Op, dtype: str, layout: Any, shape: tuple[Any, ...], tables: Tables) -> None:
    """A weight comes from HBM, an activation may still lie in L2; weight gradients and bmm have two activations."""
    name, padded = op.name, op.attrs.padded and dtype in (*HALF, *EIGHT)
    b_copies = 1.0 if name in WRITTEN or layout == "nt" else np.inf
    accumulates = name in ("addmm_", "addmm.out", INTO_FP32)
    if name.startswith(("convolution", "cce::")):  # cuDNN pads channels; Triton's tiles reach over the edge
        shape = (*(-(-x // WIDE) * WIDE for x in shape[:3]), shape[3])
    key = (dtype, name == "bmm", padded, name == INTO_FP32)
    tables.add("gemm", key, i, *shape, LAYOUTS.index(layout), b_copies, accumulates)


def _launch(i: int, launched: list[kernels.Kernel], tables: Tables) -> None:
    for kind, *amounts in launched:
        tables.add("memory", (kind,), i, *amounts)


def _gemm(
    profile: DeviceProfile, dtype: str, batched: bool, padded: bool, wide: bool, *columns: Any, learned: bool = False
) -> np.ndarray:
    """Matrix products of one dtype, all layouts at once; `padded`: by a compiler, where that pays; `wide`: into fp32;
    `learned`: with what measurements leave of the price.

    Products of 8 bits, which were not measured, are priced as those of 16 at their own rate. cuBLAS splits the k of no
    batch in fp32: of the 9,343 that NeuSight profiled (https://github.com/sitar-lab/NeuSight) none ran a sliced or
    split kernel, while of its single products those with few tiles did.
    """
    m, n, k, batch, layout, b_copies, accumulates = columns
    kind, of_layout = "fp16" if dtype in EIGHT else dtype, layout.astype(np.intp)
    hardware = _in_pairs(profile.hardware, dtype) if dtype in EIGHT else profile.hardware
    learned = learned and bool(profile.residual) and dtype in HALF and not batched

    def price(m: Any, n: Any, k: Any, batch: Any, **other: Any) -> np.ndarray:
        parameters = replace(profile.gemm[kind], **other) if other else profile.gemm[kind]
        seconds = gemm_time(
            m, n, k, batch, hardware=hardware, parameters=parameters, dtype=kind, layout=of_layout,
            accumulate=accumulates, b_copies=b_copies, output_itemsize=ITEMSIZE["fp32"] if wide else None,
        )  # fmt: skip
        return seconds * _learned(profile, m, n, k, batch, layout) if learned else seconds

    seconds = price(m, n, k, batch)
    if batched and dtype == "fp32":
        seconds = np.where(np.greater(batch, 1), price(m, n, k, batch, max_split=1), seconds)
    if padded:
        sides, copied = padding(m, n, k, batch, of_layout)
        copy = pointwise_time(copied, copied, hardware=profile.hardware, parameters=profile.pointwise)
        seconds = np.minimum(seconds, price(*sides) + np.where(copied > 0.0, copy, 0.0))
    return np.asarray(seconds)


def _in_pairs(hardware: Hardware, dtype: str) -> Hardware:
    """A device whose 16-bit rate is that of pairs of 8-bit values, which GeForce's half rate with fp32 sums is not."""
    peak = hardware.int8_flops if dtype == "i8" else hardware.fp8_flops
    return hardware if peak is None else replace(hardware, fp16_flops=peak / 2)


def _learned(profile: DeviceProfile, m: Any, n: Any, k: Any, batch: Any, layout: Any) -> np.ndarray:
    """What measurements leave of a price, a factor: of single products whose rows wide loads take, else 1.

    Weight gradients (nt) keep their price: SimuMax's rows of an A100 and a B200 say that the factor makes it no better,
    while it does that of input gradients.
    """
    from .residual import load_residual  # few devices have one

    held = (batch == 1) & (layout != LAYOUTS.index("nt")) & (n % WIDE == 0) & (k % WIDE == 0)
    held = np.broadcast_to(held, np.broadcast_shapes(held.shape, np.shape(m)))
    factor = np.ones(held.shape)
    rows = np.flatnonzero(held.reshape(len(held), -1).any(axis=1))
    if rows.size:
        m, n, k = (np.broadcast_to(x, (len(held), *np.shape(x)[1:]))[rows] for x in (m, n, k))
        found = load_residual(profile.residual).factor(m, n, k, profile.hardware.sm_count)
        factor[rows] = np.where(held[rows], found, 1.0)
    return factor


def _gemm_in_stream(profile: DeviceProfile, dtype: str, *columns: Any) -> np.ndarray:
    """As `_gemm`, in a stream of other kernels."""
    seconds = _gemm(profile, dtype, *columns)
    if dtype in (*HALF, *EIGHT) and profile.compute_capability.startswith(ACCELERATED):
        seconds += IN_STREAM / profile.hardware.clock_hz
    return seconds


def _attention(
    profile: DeviceProfile, kernel: str, backward: bool, causal: bool, window: int | None, dtype: str,
    packed: Documents | None, *columns: Any,
) -> np.ndarray:  # fmt: skip
    *shape, longest = columns
    model = attention_backward_time if backward else attention_forward_time
    parameters = profile.cudnn_attention if kernel == "cudnn" else profile.attention
    hardware = profile.hardware
    if kernel == "efficient" and (dtype in HALF or hardware.tf32_flops):
        rate = EFFICIENT if dtype in HALF else EFFICIENT / IN_TF32 * hardware.peak("bf16") / hardware.fp32_flops
        slower = tuple((size, share * rate) for size, share in parameters.efficiency)
        parameters = replace(parameters, efficiency=slower)
    kinds = None if packed is None else packed.groups(shape[1], longest)
    price = partial(model, hardware=hardware, parameters=parameters, causal=causal, dtype=dtype)
    return np.asarray(price(*shape, documents=kinds, window=window))


def _bus(profile: DeviceProfile, pinned: bool, nbytes: Any) -> np.ndarray:
    bus = profile.hardware.bus_bandwidth or USUAL_BUS
    if profile.network is not None:
        bus = min(bus, profile.network.slot_bandwidth)
    return np.asarray(nbytes / (PINNED * bus if pinned else BUS))


def _cores(profile: DeviceProfile, share: float, nbytes: Any) -> np.ndarray:
    """What the host's cores stream, with the part of its memory's bandwidth that each GPU's process has."""
    assert profile.network is not None
    return np.asarray(nbytes / (share * profile.network.host_bandwidth))


def _collective(profile: DeviceProfile, kind: str, dtype: str, *columns: Any) -> np.ndarray:
    if profile.network is None:
        raise UserError("this step has collectives, and its device is on no network: say what it stands in (--node)")
    return np.asarray(profile.network.seconds(kind, dtype, *columns))


def _grouped(profile: DeviceProfile, *row: Any) -> np.ndarray:
    from .grouped import grouped_time  # few models have experts

    return grouped_time(profile, *row)


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
        row_elements=length if row_wise else None,
    )  # fmt: skip
    if kind == "serial":  # its steps wait for one another, however many bytes each moves
        return np.asarray(seconds + (launches - 1) * floor)
    return np.asarray((seconds - floor) * spread + launches * floor)


MODELS: dict[str, Model] = {
    "gemm": _gemm_in_stream, "grouped": _grouped, "attention": _attention, "solver": _solver, "bus": _bus,
    "cores": _cores,
    "memory": _memory, "collective": _collective,
}  # fmt: skip
