"""Kernels of a step on the roofline: what they compute per byte, and how fast they run."""

from dataclasses import dataclass
from typing import Any

from ..calls import costs
from ..devices.profile import DeviceProfile
from ..prediction.predict import Prediction
from ..program.op import Op
from .anatomy import part_of, timed_ops


@dataclass(frozen=True)
class RooflineKernel:
    """All calls of one ATen op on operands of one shape.

    Attributes:
        part: the physical part that it belongs to (`anatomy.PARTS`).
        dtype: of its operands.
        shapes: of its first two operands, for people.
        calls: how often it runs in the step; seconds, operations and bytes are those of all calls.
        operations: FLOPs of matrix products and attention; of any other kernel one operation per element, a nominal
            figure that places it on the memory slope.
    """

    part: str
    name: str
    dtype: str
    shapes: str
    calls: int
    seconds: float
    operations: float
    bytes: float

    @property
    def intensity(self) -> float:
        """Operations per byte of memory traffic."""
        return self.operations / self.bytes

    @property
    def rate(self) -> float:
        """Operations per second."""
        return self.operations / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """The JSON of a kernel (SI units)."""
        return {
            "part": self.part, "name": self.name, "dtype": self.dtype, "shapes": self.shapes, "calls": self.calls,
            "seconds": self.seconds, "operations": self.operations, "bytes": self.bytes,
            "intensity": self.intensity, "rate": self.rate,
        }  # fmt: skip


@dataclass(frozen=True)
class Roof:
    """The roofline of a device: bytes/s of its memory and FLOP/s by dtype."""

    bandwidth: float
    peaks: dict[str, float]

    def ridge(self, dtype: str) -> float:
        """FLOP per byte from which on the peak limits."""
        return self.peaks[dtype] / self.bandwidth


def roof(on: DeviceProfile, kernels: list[RooflineKernel]) -> Roof:
    """The roof over some kernels: the peaks of the dtypes in which they multiply matrices."""
    used = dict.fromkeys(k.dtype for k in kernels if "gemm" in k.part or k.part == "attention")
    peaks = {dtype: on.hardware.peak(dtype) for dtype in used}
    return Roof(on.hardware.memory_bandwidth, dict(sorted(peaks.items(), key=lambda item: -item[1])))


def longest_kernels(p: Prediction) -> list[RooflineKernel]:
    """The step's kernels by time, longest first; calls of one op on equal shapes are one entry.

    Raises:
        UserError: the prediction is a grid.
    """
    totals: dict[tuple[str, str, str, str], list[float]] = {}
    for part, op, seconds, calls in timed_ops(p):
        moved = op.bytes_read + op.bytes_written
        if not seconds or not moved:
            continue
        total = totals.setdefault(
            (part_of(op, part), op.name, costs.operand_dtype(op), _shapes(op)), [0, 0.0, 0.0, 0.0]
        )
        for i, figure in enumerate((1, seconds, costs.flops(op) or _elements(op), moved)):
            total[i] += calls * figure
    found = [RooflineKernel(*key, int(calls), *figures) for key, (calls, *figures) in totals.items()]
    return sorted(found, key=lambda k: -k.seconds)


def _elements(op: Op) -> int:
    """Elements of the larger side of its first list of tensors: a reduction works on what it reads."""
    first = op.inputs[: max(1, len(op.outputs))]
    read, written = (int(sum(s.numel * s.copies for s in specs)) for specs in (first, op.outputs))
    return max(1, read, written)


def _shapes(op: Op) -> str:
    if op.name.startswith(("_foreach", "_fused")):
        return f"{sum(s.copies for s in op.outputs)} tensors"
    return " ".join("x".join(map(str, s.shape)) or "scalar" for s in op.inputs[:2])
