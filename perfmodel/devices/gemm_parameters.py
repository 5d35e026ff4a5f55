"""What the models of products, dense and by expert, know of a device beyond its datasheet."""

from dataclasses import replace
from typing import Literal

from ..values import immutable
from .hardware import Hardware

Layout = Literal["tn", "nn", "nt"]
LAYOUTS: tuple[Layout, ...] = ("tn", "nn", "nt")
Tiles = tuple[tuple[int, int], ...]

# (rows of C, columns of C) of the thread-block tiles that the libraries offer.
TENSOR_CORE_TILES: Tiles = (
    (256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64), (64, 32), (32, 64), (32, 32),
)  # fmt: skip


@immutable
class GemmParameters:
    """What the datasheet does not say. Ratios and clocks, not absolute rates, so that they carry over between GPUs.

    Defaults are where a fit begins. Predictions take what stands in a device's file, or in that of its class, and a
    default only for a key that is newer than the file (`toml`).

    Attributes:
        launch_clocks: clocks of an empty kernel, from the end of the one before to its own end.
        math_efficiency: share of the peak that the main loop reaches in a short burst.
        sustained: share of that rate which the board holds through a training step.
        derating: relative slow-down of the SMs when a long kernel hits the power limit.
        derating_time: seconds of SM time after which half of the derating is reached.
        power_share: energy of a FLOP in the main loop over that of `Hardware.limit`.
        load_energy: energy of loading a byte of an operand into an SM, in that of FLOPs.
        tile_balance: FLOP per byte: peak over the rate at which the SMs can load operands from L2; on the fp32 units
            the peak of 64 of them: an SM with 128 loads no faster.
        k_latency: clocks per element of k: the least that a thread block needs, however thin its tile.
        k_bubble: clocks per element of k on top: barriers that copy and math both wait for.
        epilogue: fill and drain of a tile, in units of loading as many bytes as the tile stores.
        wave_tail: share of the idle time in the last wave that is not filled (0: perfect stream-K).
        memory_efficiency: share of the DRAM bandwidth reached by long streams.
        write_cost: a byte written to DRAM, in bytes read.
        overlap_loss: extra time, relative, if SM time and memory time are equal (0: perfect overlap).
        l2_share: share of L2 that keeps data between two uses.
        l2_written: the same for C, of that share: written lines are evicted earlier.
        l2_stream: bandwidth of one pass over data in L2, over the rate of `tile_balance`.
        l2_write_cost: a byte written to L2, in bytes read from it.
        split_latency: seconds of the reduction kernel or the semaphores of a split k.
        split_traffic: passes over the fp32 partial sums of all splits through L2 (a write and a read: 2).
        long_row: slow-down of the main loop when the rows of A and B are so long that every load opens a page.
        page_reach: bytes from row to row at which half of that slow-down is reached.
        nn_slowdown: main loop in input-gradient layout over forward layout.
        nt_slowdown: main loop in weight-gradient layout over forward layout.
        k_step: elements of k that a pipeline stage holds: k is padded to it.
        k_split: a split keeps at least this many elements of k.
        max_split: the library splits k into at most this many parts.
        tiles: (rows, columns) of the tiles of C that the library offers.
        batched_tiles: the tiles for batch > 1, where the library has fewer; None: the same.
    """

    launch_clocks: float = 4500.0
    math_efficiency: float = 0.85
    sustained: float = 1.0
    derating: float = 0.27
    derating_time: float = 2e-3
    power_share: float = 0.0
    load_energy: float = 0.0
    tile_balance: float = 45.0
    k_latency: float = 2.2
    k_bubble: float = 0.1
    epilogue: float = 4.3
    wave_tail: float = 0.25
    memory_efficiency: float = 0.82
    write_cost: float = 0.85
    overlap_loss: float = 0.35
    l2_share: float = 0.8
    l2_written: float = 1.0
    l2_stream: float = 0.22
    l2_write_cost: float = 1.0
    split_latency: float = 2.6e-6
    split_traffic: float = 3.0
    long_row: float = 0.0
    page_reach: float = 65536.0
    nn_slowdown: float = 1.0
    nt_slowdown: float = 1.0
    k_step: int = 64
    k_split: int = 128
    max_split: int = 32
    tiles: Tiles = TENSOR_CORE_TILES
    batched_tiles: Tiles | None = None

    def in_bursts(self) -> "GemmParameters":
        """The same of short bursts, as kernels are benchmarked: before a board falls back to what its power allows."""
        return replace(self, sustained=1.0, power_share=0.0)

    def slowdown(self, layout: Layout) -> float:
        """Main-loop time of a layout over that of the forward layout."""
        return (1.0, self.nn_slowdown, self.nt_slowdown)[layout_index(layout)]


def layout_index(layout: str) -> int:
    """Where a layout stands in `LAYOUTS`."""
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}: use 'tn' (forward), 'nn' (input) or 'nt' (weight gradient)")
    return LAYOUTS.index(layout)


@immutable
class EarlyGemmParameters:
    """What cuBLAS's 16-bit kernels for Hopper had before CUDA 12.6 Update 2 in place of the figures of today's.

    Attributes:
        k_bubble, wave_tail: as in `GemmParameters`.
    """

    k_bubble: float
    wave_tail: float

    def on(self, current: GemmParameters) -> GemmParameters:
        """A device's parameters with these in place of its own."""
        return replace(current, k_bubble=self.k_bubble, wave_tail=self.wave_tail)


@immutable
class GroupedParameters:
    """How the one kernel of all products by expert differs from a dense product.

    With the defaults, where a fit begins, it hardly does: so a device is priced whose file has no such block.

    Attributes:
        main_loop: time of its main loop over the dense product's.
        epilogue: the same of filling and draining a tile: a persistent kernel may store one during the next.
        memory: the same of its bytes from and to DRAM and L2.
        overlap_loss: as in `GemmParameters`, between the two times of one expert.
    """

    main_loop: float = 1.0
    epilogue: float = 1.0
    memory: float = 1.0
    overlap_loss: float = 0.3


def for_each_dtype(bf16: GemmParameters, fp32: GemmParameters, hardware: Hardware) -> dict[str, GemmParameters]:
    """Parameters for each dtype: fp16 runs as bf16 does; without tensor cores for it a dtype runs on the fp32 units.

    TF32 is not measured: the same tensor cores at half the rate on elements of twice the bytes.
    """
    tf32 = replace(
        bf16,
        tile_balance=bf16.tile_balance / 2,
        k_latency=bf16.k_latency * 2,
        k_bubble=bf16.k_bubble * 2,
        k_step=max(1, bf16.k_step // 2),
    )
    return {
        "bf16": bf16 if hardware.bf16_flops else fp32,
        "fp16": bf16 if hardware.fp16_flops else fp32,
        "tf32": tf32 if hardware.tf32_flops else fp32,
        "fp32": fp32,
    }
