"""Seconds of ATen calls on a CPU; all sizes broadcast. What the host spends on dispatching them comes on top.

A CPU works off one call after the other: work of a call = a floor + arithmetic + traffic, added, since a core overlaps
them little.

- Products (MKL, oneDNN): FLOPs at a share of the peak, plus packing: each operand is read, reordered and read again, so
  it costs so many passes of its bytes at the memory's bandwidth. Skinny products (adapters) are all packing. Both
  depend on the layout (tn, nn and nt are the products of forward, input gradient and weight gradient) and the regime.
- Attention (the flash kernel, ATen/native/cpu/FlashAttentionKernel.cpp): blocks of queries; a block costs a floor, its
  products FLOPs, and each score an exponential and the passes of a softmax. Blocks above the diagonal are skipped.
- Everything else streams: bytes over bandwidth (in cache while the working set fits), and clocks an element for what
  takes more than a load and a store. A fresh output is read before it is written (the line is fetched for ownership).

Floors are those of kernels beyond the cheapest one, which the host's seconds a call contain.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from ..program.dims import Array
from ..program.op import Op
from .cpu_work import FEW_ROWS, KINDS, PAGE, REGIMES, VECTOR, sort
from .hardware import ITEMSIZE, Hardware
from .solver import solver_time
from .tables import Model, Tables

GRAIN = 32768.0  # elements that a thread takes at least (at::internal::GRAIN_SIZE)
CACHE_SHARPNESS = 3.0  # exponent of the passage from cache to memory


def _each(names: Sequence[str], value: float) -> Any:
    return field(default_factory=lambda: dict.fromkeys(names, value))


@dataclass(frozen=True)
class CpuGemmParameters:
    """Products of one dtype. Defaults, here and below, are as of `GemmParameters`: where a fit begins.

    Attributes:
        floor: seconds of a product of next to nothing.
        efficiency: share of the datasheet's peak, by regime (`cpu_work.REGIMES`).
        a_passes, b_passes, c_passes: passes over (m, k), (k, n) and (m, n) at the datasheet's bandwidth, by regime.
    """

    floor: float = 3e-6
    efficiency: Mapping[str, float] = _each(REGIMES, 0.9)
    a_passes: Mapping[str, float] = _each(REGIMES, 1.5)
    b_passes: Mapping[str, float] = _each(REGIMES, 1.5)
    c_passes: Mapping[str, float] = _each(REGIMES, 0.5)


@dataclass(frozen=True)
class CpuAttentionParameters:
    """The flash kernel.

    Attributes:
        floor, backward_floor: seconds of a call.
        block, backward_block: seconds of a block of queries of one head, and core.
        score, backward_score: clocks a score (a query and a key that it sees) and core, products excluded.
        efficiency, backward_efficiency: share of the fp32 peak in its products.
        aliasing, backward_aliasing: how much longer the products take where the rows of q are whole pages apart.
    """

    floor: float = 10e-6
    block: float = 5e-6
    score: float = 8.0
    efficiency: float = 0.7
    aliasing: float = 1.5
    backward_floor: float = 20e-6
    backward_block: float = 10e-6
    backward_score: float = 16.0
    backward_efficiency: float = 0.7
    backward_aliasing: float = 1.5


@dataclass(frozen=True)
class CpuStreamParameters:
    """Everything that streams.

    Attributes:
        stream: bandwidth beyond the private caches, of the datasheet's.
        cache_ratio: bandwidth inside them over `stream`.
        cache_usable: part of them that keeps a working set between two calls.
        cold: what a byte that no cache holds costs beyond one of the shared cache, in such bytes.
        shared_bytes: working set that the shared cache keeps between two calls; 0: not told apart from the memory.
        floors: seconds of a call beyond the cheapest one, by kind.
        clocks: clocks an element and core beyond a load and a store, by kind, on fp32.
        clocks16: the same on 16-bit operands, which are computed in fp32.
        back16: the same beyond that, where results go back in place to what no cache holds: few lines are under way.
    """

    stream: float = 1.0
    cache_ratio: float = 2.0
    cache_usable: float = 0.7
    floors: Mapping[str, float] = _each(KINDS, 1e-6)
    clocks: Mapping[str, float] = _each(KINDS, 0.5)
    clocks16: Mapping[str, float] = _each(KINDS, 1.0)
    cold: float = 0.0
    shared_bytes: float = 0.0
    back16: float = 0.0


@dataclass(frozen=True)
class CpuKernels:
    """What prices a CPU's work: products and attention by dtype (fp32, bf16; fp16 as bf16), streams."""

    gemm: Mapping[str, CpuGemmParameters]
    attention: Mapping[str, CpuAttentionParameters]
    stream: CpuStreamParameters


def cpu_durations(ops: Sequence[Op], hardware: Hardware, kernels: CpuKernels, collective: Model) -> np.ndarray:
    """Seconds of the work of each op, shape (ops, *grid); 0 for views and for scalars that Python code keeps.

    Args:
        collective: prices what ranks exchange.
    """
    tables = Tables()
    for i, op in enumerate(ops):
        if not op.view and not op.attrs.host:
            sort(i, op, tables)

    def gemm(dtype: str, layout: str, *sizes: Any) -> Array:
        return cpu_gemm_time(*sizes, hardware=hardware, parameters=kernels.gemm[dtype], dtype=dtype, layout=layout)

    return tables.seconds(
        len(ops),
        {
            "gemm": gemm,
            "attention": partial(_attention, hardware, kernels.attention),
            "solver": partial(_solver, hardware),
            "stream": partial(_stream, hardware, kernels.stream),
            "collective": collective,
        },
    )


def cpu_gemm_time(
    m: Any,
    n: Any,
    k: Any,
    batch: Any = 1,
    *,
    hardware: Hardware,
    parameters: CpuGemmParameters,
    dtype: str,
    layout: str,
) -> Array:
    """Seconds of `batch` products (m, k)·(k, n)."""
    m, n, k = (np.asarray(x, np.float64) for x in (m, n, k))

    def one(regime: str) -> Array:
        passes = p.a_passes[regime] * m * k + p.b_passes[regime] * k * n + p.c_passes[regime] * m * n
        compute = 2.0 * m * n * k / (p.efficiency[regime] * hardware.peak(dtype))
        return np.asarray(compute + passes * itemsize / hardware.memory_bandwidth)

    def widths(wide: str, narrow: str) -> Array:
        return np.where(n >= VECTOR, one(wide), one(narrow))

    p, itemsize = parameters, ITEMSIZE[dtype]
    if layout == "nn":
        few = np.where(aliased(n * itemsize), one("nn_aliased"), widths("nn_few", "nn_few_narrow"))
        seconds = np.where(m >= FEW_ROWS, widths("nn", "nn_narrow"), few)
    elif layout == "nt":
        in_place = widths("nt_aliased", "nt_aliased_narrow")
        seconds = np.where(aliased(m * itemsize), in_place, widths("nt", "nt_narrow"))
    else:
        seconds = widths("tn", "tn_narrow")
    return np.asarray(p.floor * np.greater(batch, 0) + batch * seconds)


def aliased(row_bytes: Any) -> Any:
    """Whether rows lie a multiple of a page apart: they then fall into the same sets of a cache."""
    return np.asarray(row_bytes) % PAGE == 0


def regime(m: float, n: float, layout: str, dtype: str) -> str:
    """The regime of one product."""
    name, rows = layout, {"nn": n, "nt": m}.get(layout, 1) * ITEMSIZE[dtype]
    if layout == "nn" and m < FEW_ROWS:
        name = "nn_aliased" if aliased(rows) else "nn_few"
    elif layout == "nt" and aliased(rows):
        name = "nt_aliased"
    return f"{name}_narrow" if n < VECTOR else name


def query_block(queries: Any) -> Any:
    """Queries of one block of the flash kernel."""
    return np.where(np.asarray(queries) >= 768, 256, np.where(np.asarray(queries) >= 192, 64, 32))


def attention_work(b: Any, queries: Any, keys: Any, heads: Any, *, causal: bool) -> tuple[Any, Any]:
    """(blocks, scores) that the flash kernel works off: below the diagonal, in whole blocks, if `causal`."""
    block = np.minimum(query_block(queries), queries)
    blocks = np.ceil(queries / block)
    seen = np.minimum((queries + block) / 2.0, keys) if causal else keys
    return b * heads * blocks, b * heads * queries * seen


def cpu_attention_time(
    b: Any, queries: Any, keys: Any, heads: Any, head_dim: Any,
    *, hardware: Hardware, parameters: CpuAttentionParameters, dtype: str, causal: bool, backward: bool = False,
) -> Array:  # fmt: skip
    """Seconds of scaled dot product attention: two products forward, five backward."""
    p, prefix = parameters, "backward_" if backward else ""
    floor, block, score, efficiency, aliasing = (
        getattr(p, prefix + name) for name in ("floor", "block", "score", "efficiency", "aliasing")
    )
    blocks, scores = attention_work(b, queries, keys, heads, causal=causal)
    slower = np.where(aliased(heads * head_dim * ITEMSIZE[dtype]), aliasing, 1.0)
    products = slower * 2.0 * (5 if backward else 2) * scores * head_dim / (efficiency * hardware.fp32_flops)
    per_core = (blocks * block + scores * score / hardware.clock_hz) / hardware.sm_count
    return np.asarray(floor + products + per_core)


def stream_time(
    traffic: Any, elements: Any, calls: Any = 1, cold: Any = 0.0,
    *, hardware: Hardware, parameters: CpuStreamParameters, kind: str, half: bool = False, back: bool = False,
) -> Array:  # fmt: skip
    """Seconds of a call that moves `traffic` bytes and computes on so many elements; `calls` pay a floor each.

    `cold` of the bytes are in no cache; the others are not either if they are more than the shared cache keeps. `half`:
    of 16 bits; `back`: written in place to where no cache holds them.
    """
    p = parameters
    cores = np.clip(np.ceil(np.asarray(elements, np.float64) / GRAIN), 1.0, hardware.sm_count)
    clocks = p.clocks16[kind] + back * p.back16 if half else p.clocks[kind]
    usable = p.cache_usable * hardware.l2_bytes * cores / hardware.sm_count
    hit = _kept(traffic, usable)
    slowdown = (1.0 - hit) + hit / (p.cache_ratio * cores / hardware.sm_count)
    if p.shared_bytes:
        cold = cold + (traffic - cold) * (1.0 - _kept(traffic, p.shared_bytes))
    memory = (traffic * slowdown + cold * p.cold) / (p.stream * hardware.memory_bandwidth)
    return np.asarray(calls * p.floors[kind] + memory + elements * clocks / (hardware.clock_hz * cores))


def _kept(traffic: Any, usable: Any) -> Any:
    """Share of a working set that a cache keeps."""
    return 1.0 / (1.0 + (traffic / usable) ** CACHE_SHARPNESS)


def _attention(
    hardware: Hardware, parameters: Mapping[str, CpuAttentionParameters], backward: bool, causal: bool, dtype: str,
    *sizes: Any,
) -> np.ndarray:  # fmt: skip
    return cpu_attention_time(
        *sizes, hardware=hardware, parameters=parameters[dtype], dtype=dtype, causal=causal, backward=backward
    )


def _solver(hardware: Hardware, name: str, *shape: Any) -> np.ndarray:
    return solver_time(name, *shape, hardware=hardware)


def _stream(
    hardware: Hardware, parameters: CpuStreamParameters, kind: str, half: bool, back: bool, *columns: Any
) -> np.ndarray:
    return stream_time(*columns, hardware=hardware, parameters=parameters, kind=kind, half=half, back=back)
