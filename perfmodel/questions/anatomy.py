"""What a step's time consists of: seconds by physical part, and what limits each phase.

Every op of a step belongs to one part, by whose account it runs on (`Op.owner`), its phase and its kind. The parts and
the time in which the device waits for the host add up to the step.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from ..calls import costs
from ..calls.collectives import exchanges
from ..devices import engine
from ..devices.host import Host
from ..devices.profile import DeviceProfile
from ..errors import UserError
from ..prediction import intervals
from ..prediction.over_lengths import drawn
from ..prediction.predict import Prediction, predict_alike
from ..program.op import Op
from ..program.part import PHASES, Part
from ..setup import Setup
from ..values import immutable

WAITING, COMMUNICATION, OFFLOADING, BUBBLE = "waiting", "communication", "offloading", intervals.BUBBLE
PERIODIC = "periodic"
PARTS = {  # part -> what it is called
    "gemm_forward": "GEMMs of the forward pass",
    "gemm_input_grad": "input-gradient GEMMs",
    "gemm_weight_grad": "weight-gradient GEMMs",
    "attention": "attention",
    "embedding": "embedding and its gradient",
    "pointwise": "norms, activations, residual adds",
    "loss": "logits and loss",
    "recompute": "recomputed forward",
    "dequantisation": "dequantisation of the weights",
    "accumulation": "accumulation of gradients",
    "adapter_gemm": "adapter GEMMs",
    "adapter_pointwise": "adapter casts and pointwise",
    "exchange": "copies to and from what travels",
    COMMUNICATION: "communication that nothing hides",
    OFFLOADING: "copies over the bus and the host's cores that nothing hides",
    "clipping": "gradient clipping",
    "optimizer": "optimizer",
    PERIODIC: "what comes every so many steps, on average",
    BUBBLE: "waiting for other stages (the bubble)",
    WAITING: "waiting for the host",
}
LIMITS = ("compute", "memory", "network", "bus", "launch")


def part_of(op: Op, part: Part) -> str:
    """The physical part that an op's time belongs to."""
    if part.phase == "optimizer":
        return "clipping" if part.name == "clip" else "optimizer"
    if part.name == "exchange" or op.owner == "exchange":
        return "exchange"
    kind = costs.kind(op)
    if op.owner in ("dequantisation", "accumulation", "optimizer"):
        return op.owner
    if kind == "optimizer":
        return kind
    if op.owner == "adapter":
        return "adapter_gemm" if kind == "gemm" else "adapter_pointwise"
    if op.recompute:
        return "recompute"
    if op.owner == "attention" or kind == "attention":
        return "attention"
    if kind == "gemm":
        if op.attrs.layout == "nt":  # the layout that weight gradients have, wherever they are formed
            return "gemm_weight_grad"
        return "gemm_forward" if part.phase == "forward" else "gemm_input_grad"
    if kind == "embedding":
        return "embedding"
    return "loss" if part.name in ("head", "entropy", "loss") else "pointwise"


@dataclass
class Phase:
    """One phase of a step and the three floors under its time, in seconds.

    Attributes:
        seconds: its share of the step.
        busy: seconds in which kernels run; `limited` splits them by what limits each kernel, compute, memory, or the
            network where nothing runs beside a collective.
        host: seconds that the host needs to dispatch it.
        flops, bytes: its work; `at_peak` and `at_bandwidth` are the seconds of that work at the datasheet's figures.
    """

    seconds: float
    busy: float = 0.0
    host: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    at_peak: float = 0.0
    at_bandwidth: float = 0.0
    limited: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LIMITS[:-1], 0.0))

    @property
    def waiting(self) -> float:
        """Seconds in which no kernel runs."""
        return max(0.0, self.seconds - self.busy)

    @property
    def regime(self) -> str:
        """What takes most of the phase: kernels limited by compute, kernels limited by memory, or launching them."""
        shares = {**self.limited, "launch": self.waiting}
        return max(LIMITS, key=shares.__getitem__)

    def add(self, other: "Phase", share: float) -> None:
        """Add a share of another step's phase."""
        for f in fields(self):
            if f.name != "limited":
                setattr(self, f.name, getattr(self, f.name) + share * getattr(other, f.name))
        self.limited = {limit: seconds + share * other.limited[limit] for limit, seconds in self.limited.items()}

    def as_dict(self) -> dict[str, Any]:
        """The JSON of a phase (SI units)."""
        return {
            "regime": self.regime, "seconds": self.seconds, "busy": self.busy, "waiting": self.waiting,
            **{f"{limit}_limited": seconds for limit, seconds in self.limited.items()}, "host": self.host,
            "flops": self.flops, "flops_at_peak": self.at_peak,
            "bytes": self.bytes, "bytes_at_bandwidth": self.at_bandwidth,
        }  # fmt: skip


@immutable
class Anatomy:
    """A predicted step taken apart: seconds by part (their sum is the mean step), and its phases."""

    parts: dict[str, float]
    phases: dict[str, Phase]

    @property
    def total(self) -> float:
        """Seconds of the mean step."""
        return sum(self.parts.values())


def timed_ops(p: Prediction) -> Iterator[tuple[Part, Op, float, int]]:
    """Every op that runs something on this device, with its part, its device seconds and how often it runs.

    Raises:
        UserError: the prediction is a grid, which has no single step.
    """
    if p.step is None or p.durations is None or any(seconds.added.ndim != 1 for seconds in p.durations):
        raise UserError("only a single setup can be taken apart: give batch, seq and rank as integers")
    for (part, count), seconds in zip(p.step.parts(), p.durations, strict=True):
        for op, duration in zip(part.ops, seconds.added.tolist(), strict=True):
            if not (op.view or op.attrs.host or exchanges(op)):
                yield part, op, duration, count


def dissect(p: Prediction, on: DeviceProfile, by: Host) -> Anatomy:
    """Take a predicted step apart.

    Args:
        on, by: the device and the host that the prediction was made for.

    Raises:
        UserError: the prediction is a grid.
    """
    kinds = [] if p.step is None else drawn(p.setup)
    found = _mean_over(kinds, p, on, by) if len(kinds) > 1 else _apart(p, on, by)
    return Anatomy({**found.parts, PERIODIC: float(p.beside)}, found.phases)


def _apart(p: Prediction, on: DeviceProfile, by: Host) -> Anatomy:
    """Take the step of micro-batches of one shape apart."""
    ops = list(timed_ops(p))
    parts = dict.fromkeys(PARTS, 0.0)
    phases = {name: Phase(float(p.time.phases[name])) for name in PHASES}
    for part, op, duration, count in ops:
        seconds, phase = duration * count, phases[part.phase]
        flops, moved = costs.flops(op), op.bytes_read + op.bytes_written
        compute, memory = flops / on.hardware.peak(costs.operand_dtype(op)), moved / on.hardware.memory_bandwidth
        parts[part_of(op, part)] += seconds
        phase.busy += seconds
        phase.limited["compute" if compute > memory else "memory"] += seconds
        phase.flops += count * flops
        phase.bytes += count * moved
        phase.at_peak += count * compute
        phase.at_bandwidth += count * memory
    for name, phase in phases.items():
        exposed = float(p.time.communication.exposed[name])
        phase.busy += exposed
        phase.limited["network"] += exposed
        parts[COMMUNICATION] += exposed
        offloaded = min(float(p.time.communication.offloading[name]), max(0.0, phase.seconds - phase.busy))
        phase.busy += offloaded
        phase.limited["bus"] += offloaded
        parts[OFFLOADING] += offloaded
    _host_seconds(p, on, by, phases)
    parts[BUBBLE] = float(p.time.components.get(BUBBLE, 0.0))
    parts[WAITING] = sum(phase.seconds for phase in phases.values()) - sum(parts.values())
    return Anatomy(parts, phases)


def _mean_over(kinds: list[tuple[float, Setup]], p: Prediction, on: DeviceProfile, by: Host) -> Anatomy:
    """The mean of the steps of several kinds of micro-batches, each with its share."""
    assert p.step is not None
    parts = dict.fromkeys(PARTS, 0.0)
    phases = {name: Phase(0.0) for name in PHASES}
    model = p.step.model
    method = p.step.method.bind(model)
    for share, setup in kinds:
        one = _apart(predict_alike(model, setup, method, on=on, by=by), on, by)
        for name, seconds in one.parts.items():
            parts[name] += share * seconds
        for name, phase in one.phases.items():
            phases[name].add(phase, share)
    return Anatomy(parts, phases)


def _host_seconds(p: Prediction, on: DeviceProfile, by: Host, phases: dict[str, Phase]) -> None:
    """What the host spends on dispatching each phase; a CUDA graph takes one launch, at the start of forward."""
    assert p.step is not None
    if p.setup.cuda_graphs and on.kind == "cuda":
        phases["forward"].host = by.graph_launch
        return
    by = engine.under(by, p.step.engine)
    for part, count in p.step.parts():
        if part.ops:
            phases[part.phase].host += count * float(np.sum(by.dispatch(part, on.kind)))
