"""Energy of a step: what its kernels take for FLOPs and bytes, on top of what the board draws at work and idle.

    P = min(limit, idle + at work · limit · share of the step in which it works + FLOPs·J per FLOP + bytes·J per byte)

Joules of a FLOP and of a byte are those of the device's file (`devices.hardware`): a board at its limit holds
`board_power / mma_energy`, and in 8 bits tensor cores draw as much a clock as in 16. Where the file has none, a chip
takes its whole limit at its peak. What a chip at work draws besides (clocks, caches, registers), and what its node does
(CPUs, fans, network, power supplies), are fitted to one set of measurements and checked on others (`validate.published.
power`, data/published/power.csv).
"""

from collections.abc import Callable
from typing import Any

from ..calls.costs import flops, kind, operand_dtype
from ..devices.hardware import Hardware
from ..program.op import Op
from ..recording.step import Step
from ..values import immutable
from .predict import Prediction

# Of the board's limit, where its file does not have it: A100-SXM4-40GB 53 of 400 W, V100-SXM2-32GB 44 of 300, A100 PCIe
# 33 of 250 and 45 of 300 (`idle_power` in data/devices/)
IDLE = 0.14
AT_WORK = 0.37  # of the limit: a working chip's beside FLOPs and bytes (fit: `validate.published.power`)
NODE = 0.36  # of the limit: a GPU's share of the rest of the node, at the wall (fit: `validate.published.power`)
DRAM = {True: 31.4e-12, False: 60e-12}  # J a byte by whether it is HBM: as in `Hardware.memory_energy`
HBM = 1.2e12  # B/s; GDDR of one board is slower, but for that of the newest cards
SIGMA = 0.12  # relative, of the power of a board: on measurements that no fit saw, of one kind of board alone


@immutable
class BoardPower:
    """Watts of a GPU and of its share of the node.

    Attributes:
        step: of the board in the mean over a step.
        idle: of the board while it waits.
        node: of the rest of the node, for each GPU.
    """

    step: float
    idle: float
    node: float


def board_power(p: Prediction, hardware: Hardware, node: float | None = None) -> BoardPower | None:
    """What a single step (no grid) makes a GPU and its node draw; None if the board's limit is not known.

    Args:
        node: W that the node draws for each GPU besides; None: a server's.
    """
    assert p.step is not None
    seconds = float(p.time.phases["total"])
    return draws(
        hardware,
        flops_per_second={dtype: share * p.flops["total"] / seconds for dtype, share in flops_by_dtype(p.step).items()},
        bytes_per_second=float(p.bytes["total"]) / seconds,
        working=min(1.0, float(p.time.device_busy) / seconds),
        node=node,
    )


def draws(
    hardware: Hardware, *, flops_per_second: dict[str, float], bytes_per_second: float, working: float,
    node: float | None = None,
) -> BoardPower | None:  # fmt: skip
    """What a board draws at some rates of work.

    Args:
        flops_per_second: by dtype of the operands.
        bytes_per_second: to and from DRAM; more than its bandwidth were found in a cache.
        working: share of the time in which kernels run.
    """
    limit = hardware.board_power
    if limit is None:
        return None
    idle = IDLE * limit if hardware.idle_power is None else hardware.idle_power
    of_flops = sum(rate * joules_per_flop(hardware, dtype) for dtype, rate in flops_per_second.items())
    moved = min(bytes_per_second, hardware.memory_bandwidth * working)
    joules_per_byte = hardware.memory_energy or DRAM[hardware.memory_bandwidth > HBM]
    step = idle + working * AT_WORK * limit + of_flops + moved * joules_per_byte
    return BoardPower(min(limit, step), idle, NODE * limit if node is None else node)


def joules_per_flop(hardware: Hardware, dtype: str) -> float:
    """Energy of a FLOP of a product; where no figure is known, of a chip that needs its limit to reach its peak."""
    known, _ = hardware.limit(dtype)
    return known or (hardware.board_power or 0.0) / hardware.peak(dtype)


def flops_by_dtype(step: Step) -> dict[str, float]:
    """FLOPs that run by dtype of the operands, over those that are counted: of causal attention only a half runs."""
    return _shares(step, lambda op: {"i8": "int8", "c64": "fp32"}.get(dtype := operand_dtype(op), dtype))


def flops_by_kind(step: Step) -> dict[str, float]:
    """The same by kind of call: gemm or attention."""
    return _shares(step, kind)


def _shares(step: Step, name: Callable[[Op], str]) -> dict[str, float]:
    counted: Any = 0
    found: dict[str, Any] = {}
    for _, op, times in step.ops():
        if count := 0 if op.view else flops(op) * times:
            counted = counted + count
            found[name(op)] = found.get(name(op), 0) + (count / 2 if op.attrs.causal else count)
    return {name: float(count / counted) for name, count in found.items()}
