"""Datasheet figures of one device: the only hardware facts that the price models need."""

import math

from ..program.dtypes import FLOAT8
from ..values import immutable

OFFERED = 0.983  # of a GPU's memory, to programs: mean of those that say so and have no ECC in GDDR (0.976 to 0.989)
ITEMSIZE = {"fp32": 4.0, "tf32": 4.0, "bf16": 2.0, "fp16": 2.0}  # bytes of an operand's element in memory


@immutable
class Hardware:
    """Datasheet figures of one GPU (or CPU: cores for SMs, the caches of the cores for L2); `idle_power` is measured.

    Attributes:
        sm_count: streaming multiprocessors, or cores.
        clock_hz: highest clock, Hz.
        memory_bytes: device memory, B.
        usable_bytes: what CUDA says that there is of it, B: without the driver's part, and what ECC takes of GDDR;
            None: not read (`offered`).
        memory_bandwidth: DRAM bandwidth, B/s.
        l2_bytes: last-level cache, B.
        fp32_flops: FLOP/s of the fp32 units, without TF32.
        board_power: what the board may draw, W; None: unknown, taken for enough.
        idle_power: what it draws of that without any work, W: as nvidia-smi shows it in state P0; None: 0.
        memory_energy: J to move a byte from or to DRAM; None: 0. HBM2 3.92 and GDDR5 14.0 pJ a bit (O'Connor et al.,
            MICRO-50, 2017; HBM2e and HBM3 are taken as HBM2), GDDR6 7.5 and GDDR6X 7.25 pJ a bit (Micron).
        flop_energy: J per fp32 FLOP of the largest server board of the same process: its power over its peak.
        mma_energy: J per 16-bit FLOP of the tensor cores: power of a board, idling included, over the rate that long
            products hold on it. Measured on this board or one of the same chips and rate; None: no limit is known.
        bus_bandwidth: B/s to and from the host's memory, one way, PCIe's encoding left out: of PCIe 3.0, 4.0, 5.0 x16
            15.75, 31.5, 63 GB/s; None: as of PCIe 4.0 x16.
        tf32_flops, fp16_flops, bf16_flops, fp8_flops, int8_flops: dense tensor-core FLOP/s with fp32 (int8: int32)
            accumulation; None where there is none, or of 8 bits where no source was read.
    """

    sm_count: int
    clock_hz: float
    memory_bytes: float
    memory_bandwidth: float
    l2_bytes: float
    fp32_flops: float
    tf32_flops: float | None = None
    fp16_flops: float | None = None
    bf16_flops: float | None = None
    fp8_flops: float | None = None
    int8_flops: float | None = None
    board_power: float | None = None
    idle_power: float | None = None
    memory_energy: float | None = None
    flop_energy: float | None = None
    mma_energy: float | None = None
    bus_bandwidth: float | None = None
    usable_bytes: float | None = None

    @property
    def offered(self) -> float:
        """Bytes of a GPU's memory that programs find."""
        return self.usable_bytes or self.memory_bytes * OFFERED

    @property
    def half(self) -> str:
        """The 16-bit dtype to train in: bf16, but fp16 where tensor cores have that alone (Volta and Turing)."""
        return "fp16" if self.bf16_flops is None and self.fp16_flops is not None else "bf16"

    def tensor_peak(self, dtype: str) -> float | None:
        """Dense FLOP/s of the tensor cores for operands of a dtype; None if there is no such path."""
        kind = "fp8" if dtype in FLOAT8 else "int8" if dtype == "i8" else dtype
        found: float | None = getattr(self, f"{kind}_flops", None)
        return None if dtype == "fp32" else found

    def peak(self, dtype: str, tensor_cores: bool = True) -> float:
        """Dense FLOP/s for operands of a dtype: fp32, tf32, bf16, fp16, e4m3, e5m2 or i8.

        Whatever has no tensor-core path on this device runs on the fp32 units.
        """
        tensor = self.tensor_peak(dtype) if tensor_cores else None
        return self.fp32_flops if tensor is None else tensor

    @property
    def working_power(self) -> float:
        """What the board may draw for its work, W; infinite if its limit is unknown.

        Small boards carry chips that could draw more than they may: a T4 at 8.1 TFLOP/s would need 0.6 x 19.1 pJ x
        8.1e12 = 93 W for its products, and has 70 - 26. Below its highest clock a chip's power is taken as proportional
        to the clock.
        """
        return math.inf if self.board_power is None else self.board_power - (self.idle_power or 0.0)

    def limit(self, dtype: str) -> tuple[float, float]:
        """(J of a FLOP of a product, 0 if unknown; W that the board has for products, infinite if unknown).

        Tensor cores draw as much a clock whatever the dtype. Their energy is that of whole boards: under load the clock
        falls so far that little is left of what an idle board draws at the highest.
        """
        peak, half = self.tensor_peak(dtype), self.bf16_flops or self.fp16_flops
        if peak is None or half is None:
            return self.flop_energy or 0.0, self.working_power
        return (self.mma_energy or 0.0) * half / peak, self.board_power or math.inf

    @property
    def lanes(self) -> float:
        """fp32 units of an SM over 64: 1 on P100, V100, T4, A100; 2 on P4, other Amperes, Ada, Hopper, Blackwell."""
        return self.fp32_flops / (128.0 * self.sm_count * self.clock_hz)

    @property
    def half_rate(self) -> bool:
        """Whether the tensor cores run at half rate when they accumulate in fp32, as on GeForce cards and the A10G.

        There an SM has 512 FLOPs a clock in 16 bit; professional cards of the same chips have 1,024.
        """
        half = self.bf16_flops or self.fp16_flops
        return half is not None and half < 768.0 * self.sm_count * self.clock_hz
