"""Datasheet figures of one device: the only hardware facts that the price models need."""

from dataclasses import dataclass

ITEMSIZE = {"fp32": 4.0, "tf32": 4.0, "bf16": 2.0, "fp16": 2.0}  # bytes of an operand's element in memory


@dataclass(frozen=True)
class Hardware:
    """Datasheet figures of one GPU (or CPU: cores for SMs, the caches of the cores for L2). Nothing measured.

    Attributes:
        sm_count: streaming multiprocessors, or cores.
        clock_hz: highest clock, Hz.
        memory_bytes: device memory, B.
        memory_bandwidth: DRAM bandwidth, B/s.
        l2_bytes: last-level cache, B.
        fp32_flops: FLOP/s of the fp32 units, without TF32.
        tf32_flops, fp16_flops, bf16_flops: dense tensor-core FLOP/s with fp32 accumulation; None where there is none.
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

    def peak(self, dtype: str, tensor_cores: bool = True) -> float:
        """Dense FLOP/s for operands of a dtype: fp32, tf32, bf16 or fp16.

        Whatever has no tensor-core path on this device runs on the fp32 units.
        """
        figures = {"tf32": self.tf32_flops, "fp16": self.fp16_flops, "bf16": self.bf16_flops}
        tensor = figures.get(dtype) if tensor_cores else None
        return self.fp32_flops if tensor is None else tensor

    @property
    def half_rate(self) -> bool:
        """Whether the tensor cores run at half rate when they accumulate in fp32, as on GeForce cards and the A10G.

        There the 16-bit peak is twice the fp32 peak; professional cards of the same chips have four times.
        """
        return self.bf16_flops is not None and self.tf32_flops is not None and self.bf16_flops < 3.0 * self.fp32_flops
