"""The time of a step: the clocks of its parts composed, with an interval."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..devices import engine
from ..devices.host import Host
from ..devices.profile import DeviceProfile
from ..program.part import Part
from ..recording.reuse import Shared
from ..recording.step import Step
from ..values import immutable
from . import communication, intervals, part_costs, timeline
from .communication import Communication, composed
from .contention import Seconds
from .intervals import Devices
from .work import Phases, StepWork

Exchange = Callable[[list[timeline.Clocks], Phases], Communication]  # of the clocks of parts, and the phases they make


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
    priced = list(part_costs.part_durations(built, on, shared) if durations is None else durations)
    work = StepWork.of(built, shared)
    return time_of(work, priced, on, by, shared.clocks, exchange_of(built, priced, on, by))


def exchange_of(built: Step, durations: Sequence[Seconds], on: DeviceProfile, by: Host) -> Exchange | None:
    """What tells what several GPUs exchange, and one with its host; None for one that offloads nothing."""
    if not (np.any(np.greater(built.setup.gpus, 1)) or built.setup.offload != "none"):
        return None
    under = engine.under(by, built.engine)
    return lambda matrices, phases: communication.exchanged(built, on, under, durations, matrices, phases)


def time_of(
    work: StepWork,
    durations: Sequence[Seconds],
    on: DeviceProfile | Devices,
    by: Host,
    known: dict[Part, Any],
    exchange: Exchange | None = None,
) -> Time:
    """The time of a step whose parts' ops take `durations`, on one device or on several side by side.

    Args:
        known: clocks of parts that are known already.
        exchange: tells what several GPUs exchange.
    """
    by = engine.under(by, work.engine)
    components: dict[str, Any] = {}
    matrices: list[timeline.Clocks] = []
    graphs = work.setup.cuda_graphs
    parts = [part for group in work.groups for part in group.parts]
    for part, of_part, seconds, times in zip(parts, work.parts, durations, work.repeats, strict=True):
        found = known.get(part)
        if found is None:
            found = known[part] = part_costs.clocks(of_part, seconds, work.device, by, graphs=graphs)
        for name, busy in found[1].items():
            components[name] = components.get(name, 0.0) + busy * times
        matrices.append(found[0])
    start = timeline.launched(by.graph_launch) if graphs and work.device == "cuda" else timeline.IDENTITY
    phases = composed(work.groups, matrices, start)
    total = phases["total"]
    exchanged = exchange(matrices, phases) if exchange is not None else communication.ALONE
    waiting = {intervals.COLLECTIVE: exchanged.exposed["total"], intervals.OFFLOAD: exchanged.offloading["total"]}
    for name, seconds in waiting.items():  # what waits for both counts once
        components[name] = np.minimum(seconds, np.maximum(0.0, total - sum(components.values())))
    busy = sum(components.values())
    components["host"] = np.maximum(0.0, total - busy)
    low, high = intervals.interval_bounds(total, intervals.step_sigma(components, total, on))
    return Time(phases, low, high, busy, components["host"] / total, components, exchanged)
