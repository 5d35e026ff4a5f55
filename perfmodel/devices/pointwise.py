"""Latency of memory-bound kernels, in seconds; all sizes broadcast.

    time = launch_floor + kernel_gap + max(bytes / bandwidth, elements / (rate * sm_count * clock))

- bandwidth: `stream` of the datasheet figure from DRAM, `l2_ratio` times the datasheet figure when the working set
  (bytes read + written) fits into the usable part of L2, smoothly between; for what was just written when that does.
- elements / rate: kernels that compute an address per element (broadcast and permuted operands, dtype casts, index
  gathers) or an exponential per element are bound by instructions: `rate` is elements a clock and SM. A fused norm
  holds its row in registers, so it loads, computes and stores in turn, and the CTAs of an SM overlap only in part:
  there the two add as the sides of a right angle.
- rows: a kernel that gives a row to a CTA makes several passes over it. Passes after the first are free while the
  rows in flight stay in L1 and cost `reread` of a DRAM pass beyond that; and with fewer rows than SMs, only that many
  SMs pull on the memory.

An eager op (RMS norm, rotary embedding, cross entropy) is a sequence of such kernels: price each and add.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..errors import nearest
from ..program.dims import Array
from ..values import immutable
from .hardware import Hardware

SPILL_SHARPNESS = 6.0  # exponent of the passage from rows that stay in L1 to rows that do not
REGISTERS = 262144.0  # B of registers of an SM
LIVE = 16.0  # B an element that a fused norm's backward holds beside what it reads: weight, its gradient, product, dx
SMALL_GATHER = 16.0  # index_select copies up to so many rows one after another
LOSS_ROW = 2.2e5  # row size at which half of a fused cross entropy's second pass leaves registers and L1, B (A100)
FUSED_NORM_RATE = 5.8  # elements a clock and SM that a fused norm computes (A100 and H100 alike)
NORM_LANES = 512.0  # elements that a layer-norm CTA takes per step: 128 threads of 4
# Elements that bitsandbytes' 4-bit dequantisation gives per SM and clock: an A100 takes 1.241 ms for 16384 x 16384 with
# double quantisation, 20 us of them for its scales (github.com/ikko-debug/Learning-CUDA, nf4/readme.md at 32ee9261).
# The older tree of comparisons is as slow (github.com/bitsandbytes-foundation/bitsandbytes/pull/1747: what reaches the
# memory's bandwidth is 1.4 to 2.1 times as fast on P100, A100 and H100, not on 8.6 and 8.9). An L40S moves its bytes at
# the bandwidth (tests/devices/test_device_prices.py). A B300 takes 32.9 us for 4096 x 4096 and 68.8 us for 11008 x 4096
# (github.com/bitsandbytes-foundation/bitsandbytes/pull/2051): 2.3 whole, 2.7 between the two.
DEQUANTISE_RATE = 1.45
DEQUANTISE_RATE_OF = {"10": 2.5}  # by major compute capability


@immutable
class PointwiseParameters:
    """What measurements must tell about a device's memory-bound kernels. Bandwidths are shares of the datasheet's.

    Defaults: as of `GemmParameters`; they stand, too, for what the rows of a fit do not tell.

    Attributes:
        launch_floor: seconds of an empty kernel by the profiler's clock.
        kernel_gap: seconds between two kernels of a stream (0 to predict a profiler's kernel duration).
        stream: DRAM bandwidth reached by vectorised contiguous kernels.
        l2_ratio: L2 bandwidth over the datasheet's DRAM bandwidth.
        l2_usable: part of L2 that keeps a working set between two kernels.
        strided_rate: elements a clock and SM: broadcast, permuted or sliced operands.
        cast_rate: elements a clock and SM: dtype conversion.
        downcast_rate: the same to a dtype of 16 bits from fp32; no limit since PyTorch 2.6.
        gather_rate: elements a clock and SM: index_select under nn.Embedding.
        dequantise_rate: elements a clock and SM: weights of 4 bits to 16.
        exp_rate: elements a clock and SM: fused cross entropy (two exponentials an element).
        fused_norm_stream: bandwidth of a Triton norm forward, a row a CTA.
        row_latency: seconds a row and SM before its bytes flow (native norms: a CTA a row).
        fused_backward_stream: bandwidth of a fused layer norm's backward: four warps an SM, rows in series.
        fused_backward_rate: the same kernel's limit in elements a clock and SM.
        column_stream: bandwidth of column sums (weight gradient of a norm).
        serial_latency: seconds of a dependent step of a single CTA (nll_loss: target, then its logit; a row of a fused
            RMS norm's backward, one CTA an SM).
        row_copy_latency: seconds a row of an index_select of at most SMALL_GATHER rows.
        norm_stream: bandwidth of a native norm forward.
        norm_row_bytes: row size at which half of its second pass leaves L1, B.
        norm_reread: cost of that second pass, of a DRAM pass.
        norm_backward_stream: bandwidth of a native norm's input gradient, both passes counted.
        softmax_stream: bandwidth of a softmax.
        softmax_row_bytes: row size at which its extra passes leave L1, B.
        softmax_reread: cost of an extra pass, of a DRAM pass.
        sm_bandwidth: most that one SM can pull, in units of its share of DRAM bandwidth.
    """

    launch_floor: float = 1.5e-6
    kernel_gap: float = 1.0e-6
    stream: float = 0.87
    l2_ratio: float = 1.6
    l2_usable: float = 0.7
    strided_rate: float = 1.1
    cast_rate: float = 1.6
    downcast_rate: float = math.inf
    gather_rate: float = 0.5
    dequantise_rate: float = DEQUANTISE_RATE
    exp_rate: float = 1.5
    fused_norm_stream: float = 0.85
    row_latency: float = 0.15e-6
    fused_backward_stream: float = 0.46
    fused_backward_rate: float = 0.8
    column_stream: float = 0.5
    serial_latency: float = 0.9e-6
    row_copy_latency: float = 0.65e-6
    norm_stream: float = 0.85
    norm_row_bytes: float = 13e3
    norm_reread: float = 0.9
    norm_backward_stream: float = 0.85
    softmax_stream: float = 0.85
    softmax_row_bytes: float = 45e3
    softmax_reread: float = 0.9
    sm_bandwidth: float = 2.0

    def on(self, capability: str) -> "PointwiseParameters":
        """With what a compute capability tells beside the fit: no rows of 4-bit weights are in any."""
        rate = DEQUANTISE_RATE_OF.get(capability.partition(".")[0])
        return self if rate is None else replace(self, dequantise_rate=rate)


class Kind(NamedTuple):
    """Which parameters bound a kind of kernel."""

    stream: str = "stream"  # the bandwidth
    rate: str | float | None = None  # the instruction limit, elements a clock and SM
    by_turns: bool = False  # whether bytes and instructions wait for one another
    passes: float = 0.0  # extra reads of a row, at the reread cost
    row_bytes: str | float | None = None
    reread: str | None = None
    latency: str | None = None  # the serial share


KINDS: dict[str, Kind] = {
    "pointwise": Kind(),
    "optimizer": Kind(),
    "reduction": Kind(),
    "fused_norm": Kind("fused_norm_stream", FUSED_NORM_RATE, by_turns=True),
    "dequantise": Kind(rate="dequantise_rate"),
    "strided": Kind(rate="strided_rate"),
    "cat": Kind(rate="strided_rate"),
    "cast": Kind(rate="cast_rate"),
    "downcast": Kind(rate="downcast_rate"),
    "embedding": Kind(rate="gather_rate", latency="row_copy_latency"),
    "column_reduction": Kind("column_stream"),
    "fused_norm_backward": Kind(latency="serial_latency"),
    "fused_layer_norm_backward": Kind("fused_backward_stream", "fused_backward_rate"),
    "serial": Kind(latency="serial_latency"),
    "cross_entropy": Kind(
        rate="exp_rate", passes=1.0, row_bytes=LOSS_ROW, reread="softmax_reread", latency="serial_latency"
    ),
    "norm": Kind("norm_stream", passes=1.0, row_bytes="norm_row_bytes", reread="norm_reread", latency="row_latency"),
    "norm_backward": Kind("norm_backward_stream", latency="row_latency"),
    "softmax": Kind("softmax_stream", passes=2.0, row_bytes="softmax_row_bytes", reread="softmax_reread"),
}


def pointwise_time(
    bytes_read: ArrayLike,
    bytes_written: ArrayLike,
    *,
    hardware: Hardware,
    parameters: PointwiseParameters,
    kind: str = "pointwise",
    rows: ArrayLike | None = None,
    elements: ArrayLike | None = None,
    row_elements: ArrayLike | None = None,
    cold: ArrayLike = False,
) -> Array:
    """Seconds of one kernel that reads and writes so many distinct bytes, floor and gap included.

    Args:
        bytes_read, bytes_written: distinct bytes, each counted once.
        hardware, parameters: the device's datasheet and fitted figures.
        kind: one of KINDS.
        rows: for kinds that give a row to a CTA.
        elements: for kinds bound by instructions (default: 4 B an element of the larger side); dependent steps for
            kind 'serial'.
        row_elements: lets a norm see that a row of 1600 takes four steps of 512 lanes.
        cold: L2 was cleared before the kernel, as benchmarks do: its reads come from DRAM whatever their size.

    >>> a100 = Hardware(108, 1.41e9, 80e9, 2.039e12, 40e6, 19.5e12, 156e12, 312e12, 312e12)
    >>> f"{pointwise_time(1e9, 1e9, hardware=a100, parameters=PointwiseParameters()) * 1e3:.2f} ms"
    '1.13 ms'
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: {nearest(kind, KINDS)}")
    k, p = KINDS[kind], parameters
    read, written = np.asarray(bytes_read, dtype=np.float64), np.asarray(bytes_written, dtype=np.float64)
    count = None if rows is None else np.maximum(np.asarray(rows, dtype=np.float64), 1.0)
    length = None if row_elements is None else np.maximum(np.asarray(row_elements, dtype=np.float64), 1.0)
    moved = _moved(read, written, kind, count, length, p)
    seconds = moved * _seconds_per_byte(read, written, cold, k, hardware, p)
    if count is not None:
        seconds = seconds / np.minimum(1.0, count * p.sm_bandwidth / hardware.sm_count)
    n = np.maximum(read, written) / 4.0 if elements is None else np.asarray(elements, dtype=np.float64)
    if k.rate is not None:
        computing = n / (_figure(p, k.rate) * hardware.sm_count * hardware.clock_hz)
        seconds = np.hypot(seconds, computing) if k.by_turns else np.maximum(seconds, computing)
    return p.launch_floor + p.kernel_gap + seconds + _serial(kind, n, count, hardware, p)


def _figure(p: PointwiseParameters, said: str | float) -> float:
    """A parameter by its name, or a figure that all devices share."""
    figure: float = getattr(p, said) if isinstance(said, str) else said
    return figure


def _moved(
    read: Array, written: Array, kind: str, rows: Array | None, length: Array | None, p: PointwiseParameters
) -> Array:
    """Bytes moved, passes over rows that leave L1, spilled registers and idle lanes included."""
    k, moved = KINDS[kind], read + written
    if rows is None:
        return moved
    if k.row_bytes is not None and k.reread is not None:
        spill = 1.0 / (1.0 + (_figure(p, k.row_bytes) * rows / np.maximum(read, 1.0)) ** SPILL_SHARPNESS)
        moved = moved + k.passes * getattr(p, k.reread) * spill * read
    if length is not None and kind == "fused_norm_backward":  # one CTA an SM; what its registers cannot hold
        moved = moved + np.maximum(read + (LIVE * length - REGISTERS) * rows, 0.0)
    if length is not None and kind == "norm":
        steps = length / NORM_LANES
        moved = moved * np.minimum(np.ceil(steps) / steps, 4.0)
    if length is not None and kind == "softmax":
        moved = moved * np.sqrt(_softmax_steps(length))
    return np.asarray(moved, dtype=np.float64)


def _seconds_per_byte(
    read: Array, written: Array, cold: ArrayLike, kind: Kind, hw: Hardware, p: PointwiseParameters
) -> Array:
    """From L2 what still lies there, from DRAM the rest: the mean over the bytes.

    All lies there when all fits, and the operand that the kernel before has just written when it fits; that is taken
    to be as large as the result.
    """
    fresh, footprint = np.minimum(read, written), read + written
    kept = _kept(footprint, hw, p)
    near = kept * (footprint - fresh) + _kept(fresh, hw, p) * fresh
    if cold is not False:
        near = np.where(cold, kept * written, near)
    hit = near / np.maximum(footprint, 1.0)
    per_byte = 1.0 / (getattr(p, kind.stream) * hw.memory_bandwidth)
    return np.asarray(per_byte * (1.0 - hit * (1.0 - p.stream / p.l2_ratio)))


def _kept(size: Array, hw: Hardware, p: PointwiseParameters) -> Array:
    """Share of so many bytes that L2 still holds when they are touched again: half of as many as it can use."""
    x = size / (p.l2_usable * hw.l2_bytes)
    return np.asarray(1.0 / (1.0 + x * x * x))


def _serial(kind: str, steps: Array, rows: Array | None, hw: Hardware, p: PointwiseParameters) -> Array | float:
    """Seconds that no parallelism hides."""
    name = KINDS[kind].latency
    if name is None:
        return 0.0
    latency: float = getattr(p, name)
    if kind == "serial":
        return steps * latency
    if rows is None:
        return 0.0
    if kind == "embedding":
        return np.where(rows <= SMALL_GATHER, rows, 0.0) * latency
    return rows / hw.sm_count * latency  # one CTA walks a row; an SM holds about one


def _softmax_steps(length: Array) -> Array:
    """Lanes launched over lanes used: at::native picks a power of two of threads, 4 elements each, up to 1024."""
    wanted = np.minimum(length / 4.0, 1024.0)
    threads = np.maximum(2.0 ** np.ceil(np.log2(np.maximum(wanted / 2.0, 1.0))), 32.0)
    return np.where(length <= 1024.0, 1.0, np.ceil(length / (4.0 * threads)) * 4.0 * threads / length)
