"""The answer for one setup, or for a whole grid of setups at once (see `perfmodel.prediction.grid`)."""

from collections.abc import Sequence
from dataclasses import asdict, field, fields, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from .. import architectures, methods
from ..architectures import Architecture, Config
from ..calls import costs
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
from ..recording import record
from ..recording.reuse import Shared, Steps, step_key
from ..recording.step import Step
from ..setup import Setup
from ..shown import Shown
from ..values import immutable
from . import communication, intervals, memory, part_costs, timeline
from .communication import Communication, composed
from .contention import Seconds
from .grid import grid_shape, over_grid
from .notes import notes_on
from .over_lengths import lengths_notes, over_lengths

Model = str | PathLike[str] | Architecture | Config
Phases = dict[str, Any]  # forward, backward, optimizer, total


@immutable
class Time:
    """Seconds by phase, with the interval of the total.

    Attributes:
        phases: forward, backward, optimizer, total.
        low, high: bounds of the 90 % interval of the total.
        device_busy: seconds in which the device computes.
        launch_bound_share: share of the step in which the device waits for the host.
        components: seconds by what prices them (gemm16, gemm32, attention, memory, optimizer, solver, host); their sum
            is the total.
        communication: what several GPUs exchange.
    """

    phases: Phases
    low: Any
    high: Any
    device_busy: Any
    launch_bound_share: Any
    components: dict[str, Any]
    communication: Communication = communication.ALONE


@immutable
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


@immutable
class Prediction(Shown):
    """What one training step costs; every number may be an array over the grid.

    Attributes:
        mfu: model FLOPs utilisation: FLOPs of the step as FlopCounterMode counts them, without what a checkpoint
            recomputes, over step time and the datasheet's peak of the fastest dtype that its products run in.
        peak_dtype: that dtype.
        padding: share of the tokens that are padding, where lengths of samples are given.
        step, durations: the step, and for each of its parts the device seconds of its ops; None for a grid. Where
            samples differ in length, those of the longest micro-batches.
    """

    model: str
    device: str
    method: str
    setup: Setup
    total_params: Dim
    trainable_params: Dim
    active_params: Dim
    flops: Phases
    bytes: Phases
    kernels: Phases
    dispatches: Phases
    time: Time
    memory: Memory
    fits: Any
    mfu: Any
    peak_dtype: str = "bf16"
    notes: list[str] = field(default_factory=list)
    periodic: list[PeriodicCost] = field(default_factory=list)
    choices: list[dict[str, Any]] = field(default_factory=list)
    padding: Any = 0.0
    step: Step | None = field(default=None, repr=False, compare=False)
    durations: list[Seconds] | None = field(default=None, repr=False, compare=False)

    @property
    def tokens_per_second(self) -> Any:
        """Tokens that the step trains on per second; padding counts where nothing is known of it (no lengths)."""
        return self.setup.tokens * self.setup.replicas / self.time.phases["total"]

    def as_dict(self) -> dict[str, Any]:
        """The JSON of `predict` (SI units, bytes)."""
        t, m = self.time, self.memory
        return {
            "model": self.model,
            "device": self.device,
            "method": self.method,
            "setup": {k: plain(v) for k, v in self.setup.as_dict().items()},
            "params": {"total": plain(self.total_params), "trainable": plain(self.trainable_params),
                       "active": plain(self.active_params)},
            **{k: plain(getattr(self, k)) for k in ("flops", "bytes", "kernels", "dispatches")},
            "time_s": {
                **plain(t.phases), "low": plain(t.low), "high": plain(t.high),
                "device_busy": plain(t.device_busy), "launch_bound_share": plain(t.launch_bound_share),
            },
            **({"communication": plain(t.communication.as_dict())} if np.any(np.greater(self.setup.gpus, 1)) else {}),
            "memory_bytes": {f.name: plain(getattr(m, f.name)) for f in fields(m)},
            "fits": plain(self.fits),
            **({"padding_share": plain(self.padding)} if self.setup.lengths else {}),
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
    return architecture, method_of(method).bind(architecture)


def method_of(method: str | Method) -> Method:
    """A method by its spec, or by the path of an adapter_config.json, for models whose program is traced.

    Raises:
        UserError: an unknown name or option, or a file that holds no adapter's config.
    """
    if isinstance(method, Method):
        return method
    if method.endswith(".json"):
        from ..methods.parts.peft_adapter import PeftAdapter

        return PeftAdapter.read(Path(method), label=method)
    return methods.parse(method)


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
    steps: Steps | None = None,
    **options: Any,
) -> Prediction:
    """Predict one training step; `perfmodel.predict` says what it takes and raises.

    Args:
        shared: what earlier predictions of one setup each, with the same model, device and host, have in common.
        steps: what was recorded for earlier predictions of the same model, whatever the device.
    """
    setup = with_options(setup, options)
    architecture, bound = resolve(model, method)
    on = profile_of(device)
    by = hosts.host_of(host, on)
    compute = partial(predict_alike, architecture, on=on, by=by, shared=shared, steps=steps)
    p: Prediction = over_grid(partial(over_lengths, compute), setup, bound)
    return replace(p, notes=[*p.notes, *lengths_notes(setup, p.padding)])


def with_options(setup: Setup | None, options: dict[str, Any]) -> Setup:
    """A setup with some of its fields replaced."""
    known = {f.name for f in fields(Setup)}
    for name in options:
        if name not in known:
            raise UserError(f"unknown setup option {name!r}: {nearest(name, known)}")
    return replace(setup or Setup(), **options)


def predict_alike(
    architecture: Architecture, setup: Setup, method: Method, *, on: DeviceProfile, by: Host,
    shared: Shared | None = None, steps: Steps | None = None,
) -> Prediction:  # fmt: skip
    """Predict a step whose micro-batches are all of one shape, that of the setup."""
    if setup.fp8 != "none" and on.hardware.fp8_flops is None:
        raise UserError(f"fp8 {setup.fp8}: {on.slug} has no float8 peak in its datasheet (fp8_flops); leave fp8 out")
    if setup.int8 != "none" and (on.hardware.int8_flops or 0) <= (on.hardware.bf16_flops or 0):
        raise UserError(f"int8 {setup.int8}: {on.slug} has no int8 peak beyond bf16's in its datasheet; leave int8 out")
    shared = None if grid_shape(setup, method) else shared
    if np.any(np.greater(setup.gpus, 1)):
        from .placed import placed  # few ask for several

        on = replace(on, network=placed(setup, on))
    asked, method = method, method.priced(lambda parts: part_costs.seconds_of(parts, on, by))
    capability = on.compute_capability or "8.0"
    make = partial(record.build, architecture, method, setup, on.kind, capability, shared=shared)
    if steps is None or method is not asked:  # its program depends on the prices of the device
        return of_step(make(), on, by, shared)
    built = part_costs.recalled(steps.known, step_key(method, setup, on.kind, capability), make)
    return of_step(built, on, by, shared or Shared(counts=steps.counts))


def of_step(built: Step, on: DeviceProfile, by: Host, shared: Shared | None = None) -> Prediction:
    """Count, price and compose a step, wherever its ops come from."""
    shared = shared or Shared()
    on = on.under(built.setup.stack)
    durations = part_costs.part_durations(built, on, shared)
    time = step_time(built, on, by, durations, shared)
    held = _memory(built)
    counted = _counted(built, shared)
    flops, recomputed = counted["flops"]["total"], counted["recomputed"]["total"]
    peak_dtype = max(_product_dtypes(built), key=on.peak)
    return Prediction(
        model=built.architecture.name,
        device=on.slug,
        method=built.method.spec(),
        setup=built.setup,
        total_params=built.total,
        trainable_params=built.trainable,
        active_params=built.active,
        flops=counted["flops"],
        bytes=counted["bytes"],
        kernels=counted["kernels"],
        dispatches=counted["dispatches"],
        time=time,
        memory=held,
        fits=memory.fits(held.peak, on.hardware.memory_bytes, built.device),
        mfu=(flops - recomputed) / on.peak(peak_dtype) / time.phases["total"],
        peak_dtype=peak_dtype,
        notes=notes_on(built, on, time.components, time.phases["total"]),
        periodic=[_periodic(ops, on, by) for ops in built.periodic],
        choices=[asdict(choice) for choice in built.method.choices(built)],
        step=built,
        durations=durations,
    )


def _product_dtypes(built: Step) -> list[str]:
    """The dtypes that matrix products and attention run in, that of the setup first: it names the peak among equals."""
    ops = (op for part, _ in built.parts() for op in part.ops if costs.kind(op) in ("gemm", "attention"))
    return list(dict.fromkeys([built.setup.amp or built.setup.dtype, *map(costs.operand_dtype, ops)]))


def _counted(built: Step, shared: Shared) -> dict[str, Phases]:
    """Sums over the step by phase, for each thing that `part_costs.counts` counts."""
    sums: dict[str, Phases] = {}
    for part, times in built.parts():
        for name, of_part in part_costs.recalled(
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
        durations: device seconds of the ops of every part, if they are known already (`part_costs.part_durations`).
        shared: with the clocks of parts that are known already.
    """
    shared = shared or Shared()
    by = engine.under(by, built.engine)
    priced = list(part_costs.part_durations(built, on) if durations is None else durations)
    components: dict[str, Any] = {}
    matrices: list[timeline.Clocks] = []
    for (part, times), seconds in zip(built.parts(), priced, strict=True):
        known: dict[str, Any] = {"graphs": built.setup.cuda_graphs, "calls": shared.calls.get(part)}
        make = partial(part_costs.clocks, part, seconds, on, by, **known)
        matrix, work = part_costs.recalled(shared.clocks, part, make)
        for name, busy in work.items():
            components[name] = components.get(name, 0.0) + busy * times
        matrices.append(matrix)
    start = timeline.launched(by.graph_launch) if built.setup.cuda_graphs and on.kind == "cuda" else timeline.IDENTITY
    phases = composed(built, matrices, start)
    total = phases["total"]
    several = np.any(np.greater(built.setup.gpus, 1))
    exchange = communication.exchanged(built, on, by, priced, matrices, phases) if several else communication.ALONE
    components[intervals.COLLECTIVE] = exchange.exposed["total"]
    busy = sum(components.values())
    components["host"] = np.maximum(0.0, total - busy)
    low, high = intervals.interval_bounds(total, intervals.step_sigma(components, total, on))
    return Time(phases, low, high, busy, components["host"] / total, components, exchange)


def _memory(built: Step) -> Memory:
    peak = memory.peak_bytes(built)
    low, high = memory.reserved_bounds(peak, built.device)
    kept = () if built.setup.in_backward else built.parameters
    gradients = sum(p.nbytes * p.count for p in kept if p.used)
    rest = built.weight_bytes + gradients + built.state_bytes
    activations = np.maximum(peak - rest, 0) if isinstance(peak, np.ndarray) else max(peak - rest, 0)
    return Memory(built.weight_bytes, gradients, built.state_bytes, activations, peak, low, high)
