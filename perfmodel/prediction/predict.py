"""The answer for one setup, or for a whole grid of setups at once (see `perfmodel.prediction.grid`)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial, reduce
from os import PathLike
from typing import Any

import numpy as np

from .. import architectures, methods, passes
from ..architectures import Architecture, Config
from ..calls.table import row
from ..devices import engine
from ..devices import host as hosts
from ..devices.device import Device, profile_of
from ..devices.host import Host
from ..devices.profile import DeviceProfile
from ..errors import UserError, nearest
from ..methods import Method
from ..methods.parts.periodic import PeriodicCost, PeriodicOps
from ..program.dims import Dim
from ..program.part import PHASES
from ..recording import record, zero
from ..recording.reuse import Shared, recalled
from ..recording.step import Step
from ..setup import Setup
from ..shown import Shown
from . import intervals, memory, part_costs, timeline
from .contention import Seconds
from .grid import over_grid

Model = str | PathLike[str] | Architecture | Config
MOST_NAMED = 6  # calls that a note names
Phases = dict[str, Any]  # forward, backward, optimizer, total


@dataclass(frozen=True)
class Time:
    """Seconds by phase, with the interval of the total.

    Attributes:
        phases: forward, backward, optimizer, total.
        low, high: bounds of the 90 % interval of the total.
        device_busy: seconds in which the device computes.
        launch_bound_share: share of the step in which the device waits for the host.
        components: seconds by what prices them (gemm16, gemm32, attention, memory, optimizer, solver, host); their sum
            is the total.
    """

    phases: Phases
    low: Any
    high: Any
    device_busy: Any
    launch_bound_share: Any
    components: dict[str, Any]


@dataclass(frozen=True)
class Memory:
    """Bytes that PyTorch allocates (`max_memory_allocated`).

    `activations` is what the peak holds beyond weights, gradients and optimizer state: saved activations, logits,
    temporaries of the optimizer. `low` and `high` bound what the allocator reserves for it, fragmentation included.
    """

    weights: Dim
    gradients: Dim
    optimizer: Dim
    activations: Dim
    peak: Dim
    low: Any
    high: Any


@dataclass(frozen=True)
class Prediction(Shown):
    """What one training step costs; every number may be an array over the grid.

    Attributes:
        mfu: model FLOPs utilisation: FLOPs of the step as FlopCounterMode counts them, without what a checkpoint
            recomputes, over step time and the datasheet's peak of the dtype that the base GEMMs run in.
        step, durations: the step, and for each of its parts the device seconds of its ops; None for a grid.
    """

    model: str
    device: str
    method: str
    setup: Setup
    total_params: Dim
    trainable_params: Dim
    flops: Phases
    bytes: Phases
    kernels: Phases
    dispatches: Phases
    time: Time
    memory: Memory
    fits: Any
    mfu: Any
    notes: list[str] = field(default_factory=list)
    periodic: list[PeriodicCost] = field(default_factory=list)
    choices: list[dict[str, Any]] = field(default_factory=list)
    step: Step | None = field(default=None, repr=False, compare=False)
    durations: list[Seconds] | None = field(default=None, repr=False, compare=False)

    @property
    def tokens_per_second(self) -> Any:
        """Tokens that the step trains on per second, padding included."""
        return self.setup.tokens / self.time.phases["total"]

    def as_dict(self) -> dict[str, Any]:
        """The JSON of `predict` (SI units, bytes)."""
        t, m = self.time, self.memory
        return {
            "model": self.model,
            "device": self.device,
            "method": self.method,
            "setup": {k: plain(v) for k, v in self.setup.as_dict().items()},
            "params": {"total": plain(self.total_params), "trainable": plain(self.trainable_params)},
            **{k: plain(getattr(self, k)) for k in ("flops", "bytes", "kernels", "dispatches")},
            "time_s": {
                **plain(t.phases), "low": plain(t.low), "high": plain(t.high),
                "device_busy": plain(t.device_busy), "launch_bound_share": plain(t.launch_bound_share),
            },
            "memory_bytes": {f.name: plain(getattr(m, f.name)) for f in fields(m)},
            "fits": plain(self.fits),
            "periodic": [plain(cost.as_dict()) for cost in self.periodic],
            "choices": plain(self.choices),
            "notes": self.notes,
        }  # fmt: skip


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value.item() if isinstance(value, np.generic) else value


def resolve(model: Model, method: str | Method) -> tuple[Architecture, Method]:
    """Architecture and bound method from objects or command-line strings.

    Raises:
        UserError: unknown names, configs that cannot be read, options that do not fit the model.
    """
    architecture = architecture_of(model)
    parsed = methods.parse(method) if isinstance(method, str) else method
    return architecture, parsed.bind(architecture)


def architecture_of(model: Model) -> Architecture:
    """The architecture that a name, path, config or architecture stands for.

    Raises:
        UserError: an unknown name, or a config that cannot be read.
    """
    if isinstance(model, (str, PathLike)):
        model = architectures.load(str(model))
    return architectures.from_config(model) if isinstance(model, Config) else model


def predict(
    model: Model,
    method: str | Method = "full",
    setup: Setup | None = None,
    device: str | DeviceProfile | Device = "l40s",
    *,
    host: str | Host = "default",
    shared: Shared | None = None,
    **options: Any,
) -> Prediction:
    """Predict one training step; `perfmodel.predict` says what it takes and raises.

    Args:
        shared: what earlier predictions of one setup each, with the same model, device and host, have in common.
    """
    setup = with_options(setup, options)
    architecture, bound = resolve(model, method)
    on = profile_of(device)
    by = hosts.host_of(host, on)
    return over_grid(lambda s, m: _predict(architecture, m, s, on, by, shared), setup, bound)


def with_options(setup: Setup | None, options: dict[str, Any]) -> Setup:
    """A setup with some of its fields replaced."""
    known = {f.name for f in fields(Setup)}
    for name in options:
        if name not in known:
            raise UserError(f"unknown setup option {name!r}: {nearest(name, known)}")
    return replace(setup or Setup(), **options)


def _predict(
    architecture: Architecture, method: Method, setup: Setup, on: DeviceProfile, by: Host, shared: Shared | None
) -> Prediction:
    method = method.priced(lambda parts: part_costs.seconds_of(parts, on, by))
    capability = on.compute_capability or "8.0"
    return of_step(record.build(architecture, method, setup, on.kind, capability, shared=shared), on, by, shared)


def of_step(built: Step, on: DeviceProfile, by: Host, shared: Shared | None = None) -> Prediction:
    """Count, price and compose a step, wherever its ops come from."""
    shared = shared or Shared()
    durations = part_costs.part_durations(built, on, shared)
    time = step_time(built, on, by, durations, shared)
    held = _memory(built)
    counted = _counted(built, shared)
    flops, recomputed = counted["flops"]["total"], counted["recomputed"]["total"]
    peak = on.hardware.peak(built.setup.amp or built.setup.dtype)
    return Prediction(
        model=built.architecture.name,
        device=on.slug,
        method=built.method.spec(),
        setup=built.setup,
        total_params=built.total,
        trainable_params=built.trainable,
        flops=counted["flops"],
        bytes=counted["bytes"],
        kernels=counted["kernels"],
        dispatches=counted["dispatches"],
        time=time,
        memory=held,
        fits=memory.fits(held.peak, on.hardware.memory_bytes, built.device),
        mfu=(flops - recomputed) / peak / time.phases["total"],
        notes=_notes(built, on, time),
        periodic=[_periodic(ops, on, by) for ops in built.periodic],
        choices=[asdict(choice) for choice in built.method.choices(built)],
        step=built,
        durations=durations,
    )


def _notes(built: Step, on: DeviceProfile, time: Time) -> list[str]:
    """What a reader should know about this prediction."""
    notes = []
    parts = time.components
    used = {b for c, b in intervals.BLOCK.items() if np.any(parts.get(c, 0.0) > 0.01 * time.phases["total"])}
    defaults = [block for block, origin in on.fitted.items() if origin == "class" and block in used]
    if defaults:
        missing = f"no measurements of {', '.join(defaults)} on {on.slug}: defaults of its class, wider interval"
        hint = "; perfmodel calibrate --device cpu measures this machine" if on.kind == "cpu" else ""
        notes.append(missing + hint)
    if on.kind == "cpu":
        notes.append(
            "the step time is that of a malloc that keeps freed memory (jemalloc, tcmalloc, or glibc's with "
            "MALLOC_TRIM_THRESHOLD_=-1 MALLOC_MMAP_MAX_=0): page faults of glibc's default add up to a quarter"
        )
    notes += [passes.NOTE] if built.setup.compile != "none" else []
    notes += _optimizer_notes(built, time)
    notes += _unknown_notes(built)
    notes += [zero.NOTE] if built.zero else []
    if built.setup.checkpoint != "none" and not any(p.requires_grad for p in built.parameters if p.kind == "embedding"):
        notes.append(
            "with checkpointing transformers makes the embedding's output need a gradient: backward runs through every "
            "block, also below the lowest trainable one"
        )
    return notes


def _unknown_notes(built: Step) -> list[str]:
    """Names the calls that no row of `calls.table` tells of."""
    names = {op.name for part, _ in built.parts() for op in part.ops if not op.view}
    unknown = sorted(name for name in names if row(name).work == "unknown")
    if not unknown:
        return []
    more = f" and {len(unknown) - MOST_NAMED} more" if len(unknown) > MOST_NAMED else ""
    return [f"unknown calls, priced as streaming in one kernel each: {', '.join(unknown[:MOST_NAMED])}{more}"]


def _optimizer_notes(built: Step, time: Time) -> list[str]:
    notes = []
    own = built.method.own_optimizer
    if own and built.setup.optimizer != "adamw":
        notes.append(f"{built.method.name} brings {own}: the setup's optimizer {built.setup.optimizer} is not used")
    besides = (op.name for work in built.periodic for part in work.group.parts for op in part.ops)
    in_step = np.any(time.components.get("solver", 0.0) > 0.01 * time.phases["total"])
    if in_step or any(row(name).work == "decomposition" for name in besides):
        notes.append(
            "decompositions (SVD, QR, pseudo-inverse, …) are priced by a rough model of cuSOLVER, right within a "
            "factor of about two"
        )
    if np.any(built.paged_bytes):
        gigabytes = np.max(built.paged_bytes) / 1e9
        notes.append(
            f"{gigabytes:.1f} GB of optimizer state are paged, outside the peak: what finds no room beside it crosses "
            "the bus twice a step, which the step time leaves out"
        )
    return notes


def _counted(built: Step, shared: Shared) -> dict[str, Phases]:
    """Sums over the step by phase, for each thing that `part_costs.counts` counts."""
    sums: dict[str, Phases] = {}
    for part, times in built.parts():
        for name, of_part in recalled(
            shared.counts, part, partial(part_costs.counts, part, shared.calls.get(part))
        ).items():
            phases = sums.setdefault(name, dict.fromkeys(PHASES, 0))
            phases[part.phase] = phases[part.phase] + times * of_part
    for phases in sums.values():
        phases["total"] = sum(phases[phase] for phase in PHASES)
    return sums


def _periodic(ops: PeriodicOps, on: DeviceProfile, by: Host) -> PeriodicCost:
    """Count and price what a method does besides its steps."""
    parts = ops.group.parts
    counted = [(part.repeat, part_costs.counts(part)) for part in parts]
    flops, nbytes = (sum(times * of_part[name] for times, of_part in counted) for name in ("flops", "bytes"))
    return PeriodicCost(ops.what, ops.every, part_costs.seconds_of(parts, on, by), flops, nbytes)


def step_time(
    built: Step,
    on: DeviceProfile,
    by: Host,
    durations: Sequence[Seconds] | None = None,
    shared: Shared | None = None,
) -> Time:
    """Compose the step's clocks part by part; a phase's time is what it adds to the latest clock.

    Args:
        durations: device seconds of the ops of every part, if they are known already (`part_costs.durations`).
        shared: with the clocks of parts that are known already.
    """
    shared = shared or Shared()
    by = engine.under(by, built.setup.engine)
    clocks = timeline.launched(by.graph_launch) if built.setup.cuda_graphs and on.kind == "cuda" else timeline.IDENTITY
    phases: Phases = dict.fromkeys(PHASES, 0.0)
    components: dict[str, Any] = {}
    done: Any = 0.0
    priced = iter(part_costs.part_durations(built, on) if durations is None else durations)
    for group in built.groups:
        once: Phases = {}
        blocks: list[timeline.Clocks] = []
        for part in group.parts:
            known: dict[str, Any] = {"graphs": built.setup.cuda_graphs, "calls": shared.calls.get(part)}
            make = partial(part_costs.clocks, part, next(priced), on, by, **known)
            matrix, work = recalled(shared.clocks, part, make)
            for name, seconds in work.items():
                components[name] = components.get(name, 0.0) + seconds * part.repeat * group.repeat
            blocks.append(matrix.power(part.repeat))
            clocks = clocks.then(blocks[-1])
            once[part.phase] = once.get(part.phase, 0.0) + clocks.end - done
            done = clocks.end
        if group.repeat > 1:
            clocks = clocks.then(reduce(timeline.Clocks.then, blocks).power(group.repeat - 1))
        scale = 1.0 + (clocks.end - done) / sum(once.values())  # further micro-batches split as the first one does
        for phase, seconds in once.items():
            phases[phase] = phases[phase] + seconds * scale
        done = clocks.end
    phases["total"] = total = sum(phases[p] for p in PHASES)
    busy = sum(components.values())
    components["host"] = np.maximum(0.0, total - busy)
    low, high = intervals.interval_bounds(total, intervals.step_sigma(components, total, on))
    return Time(phases, low, high, busy, components["host"] / total, components)


def _memory(built: Step) -> Memory:
    peak = memory.peak_bytes(built)
    low, high = memory.reserved_bounds(peak, built.device)
    gradients = sum(p.nbytes * p.count for p in built.parameters if p.used)
    rest = built.weight_bytes + gradients + built.state_bytes
    activations = np.maximum(peak - rest, 0) if isinstance(peak, np.ndarray) else max(peak - rest, 0)
    return Memory(built.weight_bytes, gradients, built.state_bytes, activations, peak, low, high)
