"""Latency of fused (flash style) attention, forward and backward, in seconds; all sizes broadcast.

Forward. One cooperative thread array (CTA) owns `tiles` blocks of ROWS = 128 query rows of one head and walks over the
keys that its rows may see. With S = sm_count and P = peak FLOP/s:

    cell      = 4 * head_dim * S / (P * efficiency(head_dim))   s, one query-key pair on one SM (2 GEMMs)
    cells     = ROWS**2 * (1 + 2 + ... + blocks)  per head      causal: masked tiles are skipped, the diagonal is not
    work      = batch * heads * (cells * cell + blocks / tiles * cta_overhead) / S     every SM busy all the time
    longest   = alone * (tiles * ROWS * seq_kv * cell + cta_overhead)                  the last CTA, alone
    compute   = (work**p + longest**p)**(1/p)                   wave quantisation: list scheduling of unequal CTAs
    memory    = bytes of q, k, v, o, and of a mask once for every head, over the bandwidth of where they live
                (L2 or DRAM)
    time      = launch_floor + compute + exposed_memory * memory

`exposed_memory` is the part of the traffic that the compute does not hide.

Within a sliding window a row block walks over the window of its rows only (flash-attn, `window_size`).

Documents behind one another that attend within themselves (varlen): the CTAs of all of them, each over the keys of its
own document; the longest document's last CTA is the longest.

Backward (FlashAttention-2, https://arxiv.org/abs/2307.08691, algorithm 2): 5 GEMMs where forward has 2, so
10 * head_dim FLOPs a cell, at `backward_efficiency` times the forward rate, for heads above WIDE times `backward_wide`
again (fewer rows of q and do fit beside the gradients of k and v); a CTA owns ROWS keys; q, k, v, o, do are read, dq,
dk, dv written, dq is accumulated in fp32; three launches (row sums of do*o, main kernel, dq conversion).
"""

import numpy as np
from numpy.typing import ArrayLike

from ..program.dims import Array
from ..values import immutable
from .hardware import ITEMSIZE, Hardware

Kinds = tuple[Array, Array]  # lengths of documents, and how many of each there are, both (kinds, *grid)

ROWS = 128.0  # query rows of a CTA (FlashAttention 2 and 3 use 128 for head sizes 64 to 256)
KEYS = 64.0  # granularity of the key loop
WIDE = 128.0  # above this head size CTAs are smaller
PADDING = 32.0  # kernels are compiled for head sizes that are multiples of this; others are padded
SOFTMAX_DIMS = 32.0  # the exponential of a cell costs as much as so many head dims of GEMM (fa2 21, fa3 63)


@immutable
class AttentionParameters:
    """What a measurement must tell about one attention kernel on one device; defaults: as of `GemmParameters`.

    Attributes:
        launch_floor: seconds of an empty call.
        cta_overhead: clocks of one SM per CTA: prologue, pipeline fill, epilogue.
        alone: time of a lone CTA over its share of a full SM (< 1: two resident CTAs slow each other).
        p: exponent of the soft maximum between total work and the longest CTA; large is a hard maximum.
        exposed_memory: part of the q, k, v, o traffic that compute does not hide.
        l2_ratio: L2 over DRAM bandwidth.
        efficiency: (head size, share of peak), ascending.
        backward_efficiency: rate of the 5 backward GEMMs over the rate of the 2 forward ones.
        backward_cta_overhead: clocks of one SM per CTA and key block in backward.
        backward_launch_floor: seconds of the three launches.
        backward_wide: rate of the backward GEMMs of heads above 128 over that of narrower ones.
        row_tiles: blocks of 128 query rows that a CTA has of heads up to 128; of wider ones it has one.
    """

    launch_floor: float = 4e-6
    cta_overhead: float = 900.0
    alone: float = 0.85
    p: float = 1.02
    exposed_memory: float = 0.4
    l2_ratio: float = 1.5
    efficiency: tuple[tuple[int, float], ...] = ((64, 0.5), (128, 0.6), (256, 0.58))
    backward_efficiency: float = 0.88
    backward_cta_overhead: float = 8000.0
    backward_launch_floor: float = 1e-5
    backward_wide: float = 1.0
    row_tiles: int = 1

    def tiles_at(self, head_dim: Array) -> Array:
        """Blocks of query rows that a CTA of forward has."""
        return np.where(head_dim <= WIDE, float(self.row_tiles), 1.0)

    def efficiency_at(self, head_dim: ArrayLike) -> Array:
        """Share of peak at a head size: linear in log2(head_dim) between the fitted sizes.

        Below them the softmax, whose cost does not shrink with the head, weighs more.
        """
        sizes = np.array([d for d, _ in self.efficiency], dtype=np.float64)
        values = np.array([e for _, e in self.efficiency], dtype=np.float64)
        d = np.asarray(head_dim, dtype=np.float64)
        inside = np.interp(np.log2(np.maximum(d, 1.0)), np.log2(sizes), values)
        small = np.minimum(d, sizes[0])
        share = inside * small / (small + SOFTMAX_DIMS) * (sizes[0] + SOFTMAX_DIMS) / sizes[0]
        return np.asarray(share, dtype=np.float64)


def attention_flops(
    batch: ArrayLike,
    seq_q: ArrayLike,
    seq_kv: ArrayLike,
    heads: ArrayLike,
    head_dim: ArrayLike,
    *,
    causal: bool = True,
    backward: bool = False,
) -> Array:
    """Useful FLOPs: 4*b*h*sq*skv*d, about half of it if causal (masked pairs left out), 2.5 times that in backward."""
    b, sq, skv, h, d = _floats(batch, seq_q, seq_kv, heads, head_dim)
    pairs = sq * np.maximum(skv - sq / 2.0, skv / 2.0) if causal else sq * skv
    return 4.0 * b * h * pairs * d * (2.5 if backward else 1.0)


def attention_forward_time(
    batch: ArrayLike,
    seq_q: ArrayLike,
    seq_kv: ArrayLike,
    heads: ArrayLike,
    kv_heads: ArrayLike,
    head_dim: ArrayLike,
    mask_item: ArrayLike = 0.0,
    *,
    hardware: Hardware,
    parameters: AttentionParameters,
    causal: bool = True,
    dtype: str = "bf16",
    documents: Kinds | None = None,
    window: int | None = None,
) -> Array:
    """Seconds of one fused attention forward, floor included.

    Args:
        mask_item: bytes of a mask's element, which every head reads for each of its pairs; 0 without a mask.
        window: keys that a query sees at most; the kernel skips blocks that no query of its own sees.
        documents: of which the sequence of the queries, and of the keys, consists.

    >>> a100 = Hardware(108, 1.41e9, 80e9, 2.039e12, 40e6, 19.5e12, 156e12, 312e12, 312e12)
    >>> seconds = attention_forward_time(4, 4096, 4096, 32, 8, 128, hardware=a100, parameters=AttentionParameters())
    >>> f"{seconds * 1e3:.1f} ms"
    '3.2 ms'
    """
    b, sq, skv, h, hkv, d, item = _floats(batch, seq_q, seq_kv, heads, kv_heads, head_dim, mask_item)
    cells, blocks, longest = _tiles(b, sq, skv, causal, documents, window)
    cell = _cell_time(4.0, d, hardware, parameters, dtype)
    overhead = parameters.cta_overhead / hardware.clock_hz
    tiles = parameters.tiles_at(d)
    compute = _schedule(h, cells, blocks / tiles, tiles * longest, cell, overhead, hardware, parameters)
    moved = 2.0 * b * d * ITEMSIZE[dtype] * (sq * h + skv * hkv)  # q and o, k and v
    memory = moved * seconds_per_byte(moved, hardware, parameters.l2_ratio)
    memory = memory + _mask_time(b, h, sq * skv * item, hardware, parameters)
    return parameters.launch_floor + compute + parameters.exposed_memory * memory


def attention_backward_time(
    batch: ArrayLike,
    seq_q: ArrayLike,
    seq_kv: ArrayLike,
    heads: ArrayLike,
    kv_heads: ArrayLike,
    head_dim: ArrayLike,
    mask_item: ArrayLike = 0.0,
    *,
    hardware: Hardware,
    parameters: AttentionParameters,
    causal: bool = True,
    dtype: str = "bf16",
    documents: Kinds | None = None,
    window: int | None = None,
) -> Array:
    """Seconds of the attention backward (dq, dk, dv), its three launches included."""
    b, sq, skv, h, hkv, d = _floats(batch, seq_q, seq_kv, heads, kv_heads, head_dim)
    item = ITEMSIZE[dtype]
    cells, blocks, longest = _key_tiles(b, sq, skv, causal, documents, window)
    rate = parameters.backward_efficiency * np.where(d > WIDE, parameters.backward_wide, 1.0)
    cell = _cell_time(10.0 / rate, d, hardware, parameters, dtype)
    overhead = parameters.backward_cta_overhead / hardware.clock_hz
    compute = _schedule(h, cells, blocks, longest, cell, overhead, hardware, parameters)
    q = b * sq * h * d * item  # one of q, o, do, dq
    kv = b * skv * hkv * d * item  # one of k, v, dk, dv
    accumulator = 4.0 * b * sq * h * d  # dq in fp32: cleared, then read for the conversion
    expanded = np.where(hkv < h, 2.0 * b * skv * h * d * item, 0.0)  # dk, dv per query head, then summed
    side_kernels = 3.0 * q + 2.0 * accumulator + 2.0 * expanded  # nothing to hide behind
    main = parameters.exposed_memory * (3.0 * q + 4.0 * kv)
    per_byte = seconds_per_byte(4.0 * q + 4.0 * kv + accumulator, hardware, parameters.l2_ratio)
    (mask,) = _floats(sq * skv * np.asarray(mask_item))
    masked = parameters.exposed_memory * _mask_time(b, h, mask, hardware, parameters)
    return parameters.backward_launch_floor + compute + (main + side_kernels) * per_byte + masked


def _mask_time(batch: Array, heads: Array, nbytes: Array, hardware: Hardware, parameters: AttentionParameters) -> Array:
    """Seconds of reading a sample's mask of `nbytes` once for every head."""
    return batch * heads * nbytes * seconds_per_byte(batch * nbytes, hardware, parameters.l2_ratio)


def seconds_per_byte(footprint: Array, hardware: Hardware, l2_ratio: float) -> Array:
    """From L2 when the working set of so many bytes fits, from DRAM when it does not, smoothly between."""
    hit = 1.0 / (1.0 + (footprint / hardware.l2_bytes) ** 2)
    return (1.0 - hit + hit / l2_ratio) / hardware.memory_bandwidth


def _floats(*values: ArrayLike) -> tuple[Array, ...]:
    return tuple(np.asarray(v, dtype=np.float64) for v in values)


def _cell_time(flops: Array | float, head_dim: Array, hw: Hardware, p: AttentionParameters, dtype: str) -> Array:
    """Seconds of one query-key pair on one SM, at `flops` FLOPs per element of the head."""
    padded = np.ceil(head_dim / PADDING) * PADDING
    return flops * padded * hw.sm_count / (hw.peak(dtype) * p.efficiency_at(padded))


def _cells(seq_own: Array, seq_other: Array, causal: bool, window: int | None) -> tuple[Array, Array, Array]:
    """(cells computed per head, row blocks, longest row of a block) when CTAs own blocks of `seq_own`.

    Within a window a block walks over the keys that its first row sees up to those of its last one.
    """
    blocks = np.ceil(seq_own / ROWS)
    full = np.ceil(seq_other / KEYS) * KEYS
    if not causal:
        return blocks * ROWS * full, blocks, full
    offset = np.maximum(seq_other - seq_own, 0.0)  # keys that every row may see (bottom-right aligned mask)
    triangle = ROWS * ROWS * blocks * (blocks + 1.0) / 2.0 + blocks * ROWS * offset
    cells = np.minimum(triangle, blocks * ROWS * full)
    if window is None:
        return cells, blocks, full
    widest = np.minimum(np.ceil((window - 1.0) / ROWS) * ROWS + ROWS, full)
    growing = np.minimum(np.ceil(widest / ROWS), blocks)  # blocks up to the first whose window is full
    within = ROWS * ROWS * growing * (growing + 1.0) / 2.0 + (blocks - growing) * ROWS * widest
    return np.minimum(cells, within), blocks, widest


def _tiles(
    batch: Array, seq_own: Array, seq_other: Array, causal: bool, documents: Kinds | None, window: int | None
) -> tuple[Array, Array, Array]:
    """(cells of one head of all samples or documents, its row blocks, the longest row of a block)."""
    if documents is None:
        cells, blocks, longest = _cells(seq_own, seq_other, causal, window)
        return batch * cells, batch * blocks, longest
    lengths, times = documents
    cells, blocks, longest = _cells(lengths, lengths, causal, window)
    return (times * cells).sum(axis=0), (times * blocks).sum(axis=0), longest.max(axis=0)


def _key_tiles(
    batch: Array, seq_q: Array, seq_kv: Array, causal: bool, documents: Kinds | None, window: int | None
) -> tuple[Array, Array, Array]:
    """As `_tiles`, of a backward pass, whose CTAs own blocks of keys."""
    cells, blocks, longest = _tiles(batch, seq_q, seq_kv, causal, documents, window)
    if documents is not None:
        return cells, blocks, longest
    return cells, batch * np.ceil(seq_kv / ROWS), longest if window else np.ceil(seq_q / KEYS) * KEYS


def _schedule(
    heads: Array,
    cells: Array,
    blocks: Array,
    longest: Array,
    cell: Array,
    overhead: float,
    hw: Hardware,
    p: AttentionParameters,
) -> Array:
    """Seconds that heads of `cells` cells need on all SMs, each of a head's `blocks` CTAs paying `overhead` seconds."""
    work = heads * (cells * cell + blocks * overhead) / hw.sm_count
    last = p.alone * (ROWS * longest * cell + overhead)
    top = np.maximum(work, last)
    low = np.minimum(work, last) / top
    return np.asarray(top * (1.0 + low**p.p) ** (1.0 / p.p), dtype=np.float64)
