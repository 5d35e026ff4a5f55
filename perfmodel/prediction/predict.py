"""The answer for one setup, or for a whole grid of setups at once (see `perfmodel.prediction.grid`)."""

from dataclasses import field, fields, replace
from functools import lru_cache, partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import architectures, methods
from ..architectures import Architecture, Config
from ..devices import host as hosts
from ..devices.device import GivenDevice, profile_of
from ..devices.host import GivenHost, Host
from ..devices.profile import DeviceProfile
from ..errors import check_kind
from ..methods import Method
from ..methods.parts.periodic import PeriodicCost, PeriodicOps
from ..program.dims import Dim, MixedStructure
from ..program.part import Part
from ..recording import record
from ..recording.reuse import Shared, of_card
from ..recording.step import Step
from ..setup import Setup
from ..shown import Shown
from ..values import immutable
from . import memory, part_costs
from .contention import Seconds, on_each
from .given import setup_given
from .grid import Compute, grid_shape, over_devices, over_grid
from .intervals import Devices, of_each
from .memory import Memory
from .notes import notes_on
from .over_lengths import lengths_notes, over_lengths
from .remembered import REMEMBERED, BuildArguments, KnownStep, StepOnDemand, Steps
from .runnable import check_runs
from .times import Time, exchange_of, time_of
from .work import Phases, StepWork, counts

if TYPE_CHECKING:
    from .pipeline import Pipelined

Model = str | PathLike[str] | Architecture | Config
MODEL = "a name, the path of a config.json, a hub id, a Config or an Architecture"


@immutable
class Prediction(Shown):
    """What one training step costs; every number may be an array over the grid.

    Attributes:
        model, device, method: by their names; `setup` as it was asked for.
        total_params, trainable_params: parameters; `active_params` are those that a token passes through (experts).
        flops, bytes, kernels, dispatches: FLOPs, bytes of memory traffic, kernels and ATen calls by phase (forward,
            backward, optimizer, total).
        time: seconds; `memory`: bytes of the peak and its parts; `fits`: whether the device's memory holds it.
        mfu: model FLOPs utilisation: FLOPs of both passes as FlopCounterMode counts them, without what a checkpoint
            recomputes, over step time and the datasheet's peak of the fastest dtype that its products run in.
        peak_dtype: that dtype.
        pipeline: its ranks, where there is one: then work, memory and `step` are of one of them, the work of the
            busiest one, the memory of the fullest; None for a grid.
        padding: share of the tokens that are padding, where lengths of samples are given.
        notes: what an answer has to say, a sentence each.
        periodic: work that comes once a run or every so many steps, beside the figures of a step (`mean_step`).
        choices: what the method chose for each kind of layer, and why.
        step, durations: the recorded step, and for each of its parts the device seconds of its ops; None for a grid.
            Where samples differ in length, those of the longest micro-batches.
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
    pipeline: "Pipelined | None" = None
    recorded: StepOnDemand | None = field(default=None, repr=False, compare=False)

    @property
    def step(self) -> Step | None:
        """The step."""
        return None if self.recorded is None else self.recorded.step

    @property
    def durations(self) -> list[Seconds] | None:
        """For each part of the step the device seconds of its ops."""
        return None if self.recorded is None else self.recorded.durations

    @property
    def beside(self) -> Any:
        """Seconds that what comes every so many steps adds to one on average."""
        return sum((cost.seconds_per_step for cost in self.periodic if cost.every is not None), 0.0)

    @property
    def mean_step(self) -> Any:
        """Seconds of a step on average, with what comes every so many of them: what methods are compared by."""
        return self.time.phases["total"] + self.beside

    @property
    def mean_components(self) -> dict[str, Any]:
        """Those of the mean step's time; what comes beside is as uncertain as decompositions are."""
        components = self.time.components
        return {**components, "solver": components.get("solver", 0.0) + self.beside} if self.periodic else components

    @property
    def tokens_per_second(self) -> Any:
        """Tokens trained on per second of the mean step; padding counts where nothing is known of it (no lengths)."""
        return self.setup.tokens * self.setup.replicas / self.mean_step

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
            **({"offloading_s": plain(t.communication.offloading)} if self.setup.offload != "none" else {}),
            **({"padding_share": plain(self.padding)} if self.setup.lengths else {}),
            **({"pipeline": plain(self.pipeline.as_dict())} if self.pipeline is not None else {}),
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


def method_of(method: str | PathLike[str] | Method) -> Method:
    """A method by its spec, or by the path of an adapter_config.json, for models whose program is traced.

    Raises:
        UserError: an unknown name or option, or a file that holds no adapter's config.
    """
    if isinstance(method, Method):
        return method
    check_kind("method", method, (str, PathLike), "a text such as 'lora:r=16', or a Method")
    if isinstance(method, PathLike) or method.endswith(".json"):
        from ..methods.parts.peft_adapter import PeftAdapter

        return PeftAdapter.read(Path(method), label=str(method))
    return methods.parse(method)


def architecture_of(model: Model) -> Architecture:
    """The architecture that a name, path, config or architecture stands for.

    Raises:
        UserError: an unknown name, or a config that cannot be read.
    """
    check_kind("model", model, (str, PathLike, Architecture, Config), MODEL)
    if isinstance(model, str) and model.lower() in architectures.model_names():
        return _bundled(model.lower())
    if isinstance(model, (str, PathLike)):
        model = architectures.load(str(model))
    return architectures.from_config(model) if isinstance(model, Config) else model


@lru_cache(maxsize=256)
def _bundled(name: str) -> Architecture:
    """A bundled model's architecture: its file stays as it is."""
    return architectures.from_config(architectures.load(name))


def predict(
    model: Model,
    method: str | Method = "full",
    setup: Setup | None = None,
    device: GivenDevice = "l40s",
    *,
    host: GivenHost = "default",
    shared: Shared | None = None,
    steps: Steps | None = None,
    **options: Any,
) -> Prediction:
    """Predict one training step; `perfmodel.predict` says what it takes and raises.

    Args:
        shared: what earlier predictions of one setup each, with the same model, device and host, have in common.
        steps: what was recorded for earlier predictions of the same model, whatever the device.
    """
    architecture, bound = resolve(model, method)
    on = profile_of(device)
    setup = setup_given(setup, options, architecture, [on])
    by = hosts.host_of(host, on)
    compute = partial(predict_alike, architecture, on=on, by=by, shared=shared, steps=steps)
    p: Prediction = over_grid(partial(over_lengths, compute), setup, bound)
    told = lengths_notes(setup, p.padding)
    return replace(p, notes=[*p.notes, *told]) if told else p


def predict_on_each(
    architecture: Architecture, method: Method, setup: Setup, devices: Devices, host: GivenHost
) -> Prediction:
    """Predict a grid on several devices, every figure of shape (devices, *grid); it has no notes.

    Devices that run the same program under one host are answered side by side: it is found, composed and put into a
    grid once for all of them. Where the program goes by prices, or GPUs exchange, each is answered apart.
    """
    bound = method.bind(architecture)
    exchange = bool(np.any(np.greater(setup.gpus, 1))) or setup.offload != "none"
    by_prices = type(bound).priced is not Method.priced
    apart = architecture.recorded or setup.lengths is not None or exchange or by_prices
    alike: dict[Any, list[int]] = {}
    for i, on in enumerate(devices):
        program = on.kind, of_card(setup, on.kind, _capability(on)), hosts.host_of(host, on)
        alike.setdefault(i if apart else program, []).append(i)

    def compute(places: list[int]) -> Compute[Prediction]:
        some = tuple([devices[i] for i in places])
        one = partial(predict_alike, on=some[0]) if apart else partial(_side_by_side, devices=some)
        return partial(over_lengths, partial(one, architecture, by=hosts.host_of(host, some[0])))

    found = over_devices([(places, compute(places)) for places in alike.values()], setup, bound)
    return replace(found, device=", ".join(on.slug for on in devices), notes=[])


def predict_alike(
    architecture: Architecture, setup: Setup, method: Method, *, on: DeviceProfile, by: Host,
    shared: Shared | None = None, steps: Steps | None = None,
) -> Prediction:  # fmt: skip
    """Predict a step whose micro-batches are all of one shape, that of the setup."""
    check_runs(setup, method, on)
    if setup.pp > 1:
        return _of_pipeline(architecture, setup, method, on, by)
    shared = None if grid_shape(setup, method) else shared
    if np.any(np.greater(setup.gpus, 1)) or setup.offload != "none":
        from .placed import placed  # few ask for several

        on = replace(on, network=placed(setup, on))
    asked, method = method, method.priced(lambda parts: part_costs.seconds_of(parts, on, by))
    capability = _capability(on)
    if shared is not None or method is not asked or architecture.recorded:
        # what a search shares, a program that depends on the prices of the device, one that is kept elsewhere
        return of_step(record.build(architecture, method, setup, on.kind, capability, shared=shared), on, by, shared)
    arguments = BuildArguments(architecture, method, setup, on.kind, capability)
    return of_known((steps or REMEMBERED).find(arguments), on, by)


def _of_pipeline(architecture: Architecture, setup: Setup, method: Method, on: DeviceProfile, by: Host) -> Prediction:
    """Predict a step whose GPUs each have some of the blocks."""
    from ..recording.pipeline import build_ranks  # few ask for it
    from .pipeline import priced_pipeline
    from .placed import placed

    if np.size(setup.gpus) > 1:  # each number of GPUs is its own pipeline
        raise MixedStructure(np.equal(setup.gpus, np.ravel(setup.gpus)[0]))
    ranks = build_ranks(architecture, method, setup, on.kind, _capability(on))
    on = replace(on, network=placed(setup, on)).under(setup.stack)
    found = priced_pipeline(ranks, on, by)
    steps = [ours.step for ours in ranks]
    works = [StepWork.of(step) for step in steps]
    work = replace(
        works[found.busiest], memory=works[found.fullest].memory, total=sum(step.total for step in steps),
        trainable=sum(step.trainable for step in steps), active=sum(step.active for step in steps),
        exchanging=max((w.exchanging for w in works), key=len),
    )  # fmt: skip
    figures = _figures(work, found.time, on)
    flops = sum(w.of_model for w in works) / len(works)
    return Prediction(
        device=on.slug,
        **{**figures, "mfu": flops / max(map(on.peak, work.dtypes)) / found.time.phases["total"]},
        peak_dtype=max(work.dtypes, key=on.peak),
        notes=[*notes_on(work, on, by, found.time, figures["memory"]), found.note],
        pipeline=None if grid_shape(setup, method) else found,
        recorded=StepOnDemand(KnownStep(work, None, steps[found.busiest]), found.durations),
    )


def _side_by_side(
    architecture: Architecture, setup: Setup, method: Method, *, devices: Devices, by: Host
) -> Prediction:
    """The same on each of several devices that run the same program, one GPU each; without what is said of one."""
    for on in devices:
        check_runs(setup, method, on)
    first = devices[0]
    known = REMEMBERED.find(BuildArguments(architecture, method, setup, first.kind, _capability(first)))
    devices = tuple([on.under(known.work.setup.stack) for on in devices])
    durations = [on_each(of_part) for of_part in zip(*[known.durations(on) for on in devices], strict=True)]
    time = time_of(known.work, durations, devices, by, {})
    beside = [_periodic(ops, devices, by) for ops in known.work.periodic if ops.every is not None]
    return Prediction(device=first.slug, **_figures(known.work, time, devices), periodic=beside)


def _capability(on: DeviceProfile) -> str:
    return on.compute_capability or "8.0"


def of_step(built: Step, on: DeviceProfile, by: Host, shared: Shared | None = None) -> Prediction:
    """Count, price and compose a step, wherever its ops come from."""
    shared = shared or Shared()
    on = on.under(built.setup.stack)
    durations = part_costs.part_durations(built, on, shared)
    return _answer(KnownStep(StepWork.of(built, shared), None, built), durations, on, by, shared.clocks)


def of_known(known: KnownStep, on: DeviceProfile, by: Host) -> Prediction:
    """Price and compose a step that is known."""
    on = on.under(known.work.setup.stack)
    return _answer(known, known.durations(on), on, by, {})


def _answer(
    known: KnownStep, durations: list[Seconds], on: DeviceProfile, by: Host, clocks: dict[Part, Any]
) -> Prediction:
    """What is to be said of a step whose parts' ops take `durations`.

    Args:
        clocks: of parts, as far as they are known already (`times.time_of`).
    """
    work = known.work
    exchange = exchange_of(known.step, durations, on, by) if known.step is not None else None
    time = time_of(work, durations, on, by, clocks, exchange)
    figures = _figures(work, time, on)
    return Prediction(
        device=on.slug,
        **figures,
        peak_dtype=max(work.dtypes, key=on.peak),
        notes=notes_on(work, on, by, time, figures["memory"]),
        periodic=[_periodic(ops, on, by) for ops in work.periodic],
        choices=[{**choice} for choice in work.choices],
        recorded=StepOnDemand(known, durations),
    )


def _figures(work: StepWork, time: Time, on: DeviceProfile | Devices) -> dict[str, Any]:
    """The fields of a prediction that hold its figures, and what they are of."""
    held, counted = replace(work.memory, buffers=_buffers(work, on)), work.counted
    capacity = of_each(on, lambda device: device.capacity)
    peak = of_each(on, lambda device: max(map(device.peak, work.dtypes)))
    return {
        "model": work.architecture.name, "method": work.method.spec(), "setup": work.setup,
        "total_params": work.total, "trainable_params": work.trainable, "active_params": work.active,
        # what is kept is nobody's to change
        **{name: {**counted[name]} for name in ("flops", "bytes", "kernels", "dispatches")},
        "time": time, "memory": held, "fits": memory.fits(held.peak, capacity, work.device, held.buffers),
        "mfu": work.of_model / peak / time.phases["total"],
    }  # fmt: skip


def _buffers(work: StepWork, on: DeviceProfile | Devices) -> Dim:
    """What NCCL keeps on a GPU for the groups that it exchanges with, B."""
    if not isinstance(on, DeviceProfile) or on.network is None:
        return 0
    major = int(_capability(on).split(".")[0])
    return sum(on.network.buffers(kinds, ranks.size, ranks.stride, major) for ranks, kinds in work.exchanging)


def _periodic(ops: PeriodicOps, on: DeviceProfile | Devices, by: Host) -> PeriodicCost:
    """Count and price what a method does besides its steps."""
    parts = ops.group.parts
    counted = [(part.repeat, counts(part)) for part in parts]
    flops, nbytes = (sum(times * of_part[name] for times, of_part in counted) for name in ("flops", "bytes"))
    seconds = of_each(on, lambda device: part_costs.seconds_of(parts, device, by))
    return PeriodicCost(ops.what, ops.every, seconds, flops, nbytes)
