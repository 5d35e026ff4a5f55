"""What several GPUs exchange in a step: how much, how long, and how much of it nothing hides."""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np

from ..calls import costs
from ..calls.collectives import KIND_OF, exchanges, message_bytes
from ..devices.host import Host
from ..devices.profile import DeviceProfile
from ..program.part import PHASES, Group, Part
from ..recording.step import Step
from ..values import immutable
from . import part_costs, timeline
from .contention import Seconds
from .work import PartWork

Phases = dict[str, Any]


@immutable
class Communication:
    """Collectives of a step on one GPU.

    Attributes:
        exposed: seconds by phase that the step would be shorter if all collectives were free.
        hidden: seconds of collectives that run beside other work; with `exposed` at most what they take by themselves.
        nbytes: bytes by kind of collective (`perfmodel.network`), of whole buffers.
        calls: how many of each kind.
        offloading: seconds by phase that the step would be shorter if copies over the bus and the work of the host's
            cores on what is offloaded were free.
    """

    exposed: Phases
    hidden: Phases
    nbytes: dict[str, Any]
    calls: dict[str, Any]
    offloading: Phases

    def as_dict(self) -> dict[str, Any]:
        """Plain values; of the kinds that there are."""
        here = [kind for kind, calls in self.calls.items() if np.any(calls)]
        amounts = {"bytes": self.nbytes, "calls": self.calls}
        kinds = {what: {kind: values[kind] for kind in here} for what, values in amounts.items()}
        return {"exposed_s": self.exposed, "hidden_s": self.hidden, **kinds}


NO_TIME: Phases = dict.fromkeys((*PHASES, "total"), 0.0)
NO_CALLS: dict[str, Any] = dict.fromkeys(sorted({*KIND_OF.values()}), 0)
ALONE = Communication(NO_TIME, NO_TIME, NO_CALLS, NO_CALLS, NO_TIME)  # of one GPU


def composed(
    groups: Sequence[Group], matrices: Sequence[timeline.Clocks], start: timeline.Clocks = timeline.IDENTITY
) -> Phases:
    """Seconds by phase of a step of these groups, whose parts have these clock matrices; a phase's time is what it adds
    to the latest clock."""
    clocks, done = start, 0.0
    phases: Phases = dict.fromkeys(PHASES, 0.0)
    given = iter(matrices)
    for group in groups:
        once: Phases = {}
        blocks: list[timeline.Clocks] = []
        for part in group.parts:
            blocks.append(next(given).power(part.repeat))
            clocks = clocks.then(blocks[-1])
            once[part.phase] = once.get(part.phase, 0.0) + clocks.end - done
            done = clocks.end
        if group.repeat > 1:
            clocks = clocks.then(reduce(timeline.Clocks.then, blocks).power(group.repeat - 1))
        # further micro-batches split as the first one does
        scale = 1.0 + (clocks.end - done) / sum(once.values()) if group.repeat > 1 else 1.0
        for phase, seconds in once.items():
            phases[phase] = phases[phase] + seconds * scale
        done = clocks.end
    phases["total"] = sum(phases[p] for p in PHASES)
    return phases


def exchanged(
    built: Step, on: DeviceProfile, by: Host, durations: Sequence[Seconds], matrices: Sequence[timeline.Clocks],
    phases: Phases,
) -> Communication:  # fmt: skip
    """What the step of one of several GPUs exchanges, with the others and with the host.

    Args:
        durations, matrices: of its parts: seconds of ops, clocks.
        phases: what those clocks make.
    """
    quiet, unhosted = list(matrices), list(matrices)
    taking: Phases = dict.fromkeys(PHASES, 0.0)
    nbytes, calls = ALONE.nbytes.copy(), ALONE.calls.copy()
    for i, ((part, times), seconds) in enumerate(zip(built.parts(), durations, strict=True)):
        if any(costs.offloads(op) for op in part.ops):
            unhosted[i] = _clocks(part, seconds.without_offloading(part), on, by)
        sent = [(op, alone) for op, alone in zip(part.ops, seconds.alone, strict=True) if exchanges(op)]
        if not sent:
            continue
        quiet[i] = _clocks(part, seconds.without_collectives(part), on, by)
        for op, alone in sent:
            kind = KIND_OF[op.name]
            taking[part.phase] = taking[part.phase] + alone * times
            nbytes[kind] = nbytes[kind] + message_bytes(op) * times
            calls[kind] += times
    taking["total"] = sum(taking[phase] for phase in PHASES)
    exposed, offloading = longer(phases, composed(built.groups, quiet)), NO_TIME
    if built.setup.offload != "none":
        offloading = longer(phases, composed(built.groups, unhosted))
    return Communication(exposed, hidden(taking, exposed), nbytes, calls, offloading)


def hidden(taking: Phases, exposed: Phases) -> Phases:
    """Of what collectives take by themselves what the step is not longer for, by phase.

    A phase may be longer than its collectives take, for those begun in the one before it, or those of other ranks.
    """
    total = np.maximum(0.0, taking["total"] - exposed["total"])
    return _shared_out(total, {phase: np.maximum(0.0, taking[phase] - exposed[phase]) for phase in PHASES})


def _shared_out(total: Any, to: Phases) -> Phases:
    """A total and the phases that it is of, as `to` has them."""
    whole = sum(to.values())
    share = total / np.where(whole > 0.0, whole, 1.0)
    return {**{phase: seconds * share for phase, seconds in to.items()}, "total": total}


def _clocks(part: Part, seconds: Seconds, on: DeviceProfile, by: Host) -> timeline.Clocks:
    return part_costs.clocks(PartWork.of(part), seconds, on.kind, by)[0]


def longer(phases: Phases, shorter: Phases) -> Phases:
    """By how much a step is longer than another one, shared out to the phases that are."""
    total = np.maximum(0.0, phases["total"] - shorter["total"])  # less than the sum where one phase waits for another
    return _shared_out(total, {phase: np.maximum(0.0, phases[phase] - shorter[phase]) for phase in PHASES})
