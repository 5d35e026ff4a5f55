"""The time of a pipeline: its ranks on clocks of their own, which wait for one another's messages.

Every rank has the clocks of a step (`timeline`): its passes are matrices, which advance them. A message begins once
both of its ends have come to it and the one before it in its direction is through, and takes what the link between the
two takes; who waits for it goes on when it has come. The step ends with the last rank. Time in which a rank waits
although messages take none is the bubble: with stages of equal time t, m micro-batches and p stages, (p - 1) t.

NCCL buffers a few megabytes, so that a small send may end before its receive began, and lets messages of one direction
between two ranks pass each other where they were begun apart: both are left out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import numpy as np

from ..calls.collectives import KIND_OF, exchanges, message_bytes
from ..devices import engine
from ..devices.host import Host
from ..devices.profile import DeviceProfile
from ..program.dims import MixedStructure
from ..program.part import PHASES, Part
from ..program.streams import COMPUTE, HOST
from ..recording.parallel.schedules import BACKWARD, FORWARD, Pass, Post, Wait
from ..recording.pipeline import RankStep
from ..recording.reuse import Shared
from ..values import immutable
from . import intervals, memory, part_costs, timeline
from .communication import ALONE, Communication, Phases, hidden, longer
from .timeline import Clocks, Seconds, later
from .times import Time
from .work import PartWork


@immutable
class StageFigures:
    """One rank of a pipeline.

    Attributes:
        blocks: first and last block of each of its stages.
        in_flight: the most micro-batches whose backward is outstanding.
        forward, backward: seconds of one micro-batch by itself, all its stages together.
        waiting: seconds of the step in which it waits for other ranks.
        peak: bytes.
    """

    rank: int
    blocks: list[list[int]]
    in_flight: int
    forward: Any
    backward: Any
    waiting: Any
    peak: Any

    def as_dict(self) -> dict[str, Any]:
        """Plain values (SI units)."""
        return {
            "rank": self.rank, "blocks": self.blocks, "micro_batches_in_flight": self.in_flight,
            "forward_s": self.forward, "backward_s": self.backward, "waiting_s": self.waiting, "peak_bytes": self.peak,
        }  # fmt: skip


@immutable
class Pipelined:
    """A pipeline priced.

    Attributes:
        time: of the step; its components are those of the busiest rank.
        busiest: that whose device works longest, whose work is answered; fullest: the one whose memory is.
        durations: device seconds of the busiest rank's parts.
    """

    time: Time
    busiest: int
    fullest: int
    stages: list[StageFigures]
    durations: list[Any]

    @property
    def bubble(self) -> Seconds:
        """Seconds in which the busiest rank waits although messages take no time."""
        return self.time.components[intervals.BUBBLE]

    @property
    def note(self) -> str:
        """Whose figures are answered."""
        return (
            f"pipeline: work is that of rank {self.busiest}, the busiest one, memory that of rank {self.fullest}, the "
            "fullest one, parameters those of all; the gradient's norm is summed over stages"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values (SI units)."""
        share = self.bubble / self.time.phases["total"]
        stages = [stage.as_dict() for stage in self.stages]
        return {
            "bubble_s": self.bubble, "bubble_share": share, "busiest_rank": self.busiest, "fullest_rank": self.fullest,
            "ranks": stages,
        }  # fmt: skip


@dataclass(eq=False)
class PricedParts:
    """Clock matrices of parts, of a job as it is (`sends`) or of one whose GPUs exchange all at once."""

    on: DeviceProfile
    by: Host
    shared: Shared
    sends: bool

    def __post_init__(self) -> None:
        self.known: dict[Part, tuple[Clocks, dict[str, Any]]] = {}

    def priced(self, part: Part) -> tuple[Clocks, dict[str, Any]]:
        """Of one run, with its seconds by component."""
        if part not in self.known:
            seconds = self.shared.durations[part]
            if not self.sends:
                seconds = seconds.without_collectives(part)
            work = PartWork.of(part, self.shared.calls.get(part))
            self.known[part] = part_costs.clocks(work, seconds, self.on.kind, self.by)
        return self.known[part]

    def in_a_row(self, parts: Sequence[Part]) -> Clocks:
        """Of several with their repeats."""
        together = timeline.IDENTITY
        for part in parts:
            together = together.then(self.priced(part)[0].power(part.repeat))
        return together


class RankClocks:
    """A rank as it goes through its order."""

    def __init__(self, ours: RankStep, priced: PricedParts) -> None:
        self.ours, self.priced = ours, priced
        self.now: dict[str, Seconds] = {}
        self.place = 0
        self.made: dict[Any, Clocks] = {}
        self.waited: Seconds = 0.0

    def advance(self, parts: Sequence[Part]) -> None:
        """Run parts."""
        key = tuple(map(id, parts))
        if key not in self.made:
            self.made[key] = self.priced.in_a_row(parts)
        ends = self.made[key].ends
        self.now |= {end: _latest(self.now, paths) for end, paths in ends.items()}

    def begin(self, parts: Sequence[Part]) -> Seconds:
        """The host begins messages; returns when, for the device."""
        host = self.now.get(HOST, 0.0)
        for part in parts:
            host = host + self.priced.priced(part)[0].delay(HOST, HOST)
        self.now[HOST] = host
        return host if self.priced.on.kind == "cpu" else later(self.now.get(COMPUTE, 0.0), host + self.priced.by.launch)

    def wait(self, until: Seconds) -> None:
        """The stream waits; on a CPU the host."""
        clock = HOST if self.priced.on.kind == "cpu" else COMPUTE
        before = self.now.get(clock, 0.0)
        self.now[clock] = later(before, until)
        self.waited = self.waited + (self.now[clock] - before)

    @property
    def end(self) -> Seconds:
        """When all is done."""
        latest: Seconds = 0.0
        for clock in self.now.values():
            latest = later(latest, clock)
        return latest


def _latest(now: dict[str, Seconds], paths: Any) -> Seconds:
    found: Seconds = timeline.NEVER
    for start, delay in paths.items():
        found = later(found, now.get(start, 0.0) + delay)
    return found


def run_through(
    ranks: Sequence[RankStep], priced: PricedParts, takes: Callable[[Pass], Seconds] | None
) -> list[RankClocks]:
    """All ranks through their orders, up to their gradients.

    Args:
        takes: seconds of the message behind a pass; None: nobody waits for any.
    """
    clocks = [RankClocks(ours, priced) for ours in ranks]
    begun: dict[Pass, Seconds] = {}  # by the first of the two
    come: dict[Pass, Seconds] = {}
    free: dict[tuple[str, int], Seconds] = {}

    def go_on(at: RankClocks) -> bool:
        """One action; whether there was one."""
        if at.place == len(at.ours.actions):
            return False
        action, parts = at.ours.actions[at.place]
        if isinstance(action, Post):
            now = at.begin(parts)
            for done in (*action.sends, *action.receives) if takes is not None else ():
                if done not in begun:
                    begun[done] = now
                    continue
                assert takes is not None
                link = done.way, done.stage
                start = later(later(begun[done], now), free.get(link, 0.0))
                come[done] = free[link] = start + takes(done)
        elif isinstance(action, Wait):
            needed = (*action.post.sends, *action.post.receives) if takes is not None else ()
            if any(done not in come for done in needed):
                return False
            for done in needed:
                at.wait(come[done])
        else:
            at.advance(parts)
        at.place += 1
        return True

    going = True
    while going:
        going = False
        for at in clocks:
            while go_on(at):
                going = True
    assert all(at.place == len(at.ours.actions) for at in clocks), "a schedule whose ranks wait in a circle"
    return clocks


def priced_pipeline(ranks: Sequence[RankStep], on: DeviceProfile, by: Host) -> Pipelined:
    """Time and memory of a pipeline."""
    first = ranks[0].step
    setup, network, shared = first.setup, on.network, Shared()
    assert network is not None
    by = engine.under(by, first.engine)
    durations = [part_costs.part_durations(ours.step, on, shared) for ours in ranks]
    message, width = ranks[0].message.nbytes, setup.gpus // setup.pp
    onward = [network.between(message, (rank, (rank + 1) % setup.pp), width) for rank in range(setup.pp)]

    def takes(done: Pass) -> Seconds:
        return onward[(done.stage if done.way == FORWARD else done.stage - 1) % setup.pp]

    sent, free = (PricedParts(on, by, shared, sends) for sends in (True, False))
    real, ideal = run_through(ranks, sent, takes), run_through(ranks, free, lambda done: 0.0)
    alone = run_through(ranks, free, None)
    spans = [_ended(clocks, clips=setup.clip_grad) for clocks in (real, ideal)]
    own = [_ended([at], clips=False).total for at in alone]
    peaks = [memory.peak_bytes(ours.step) for ours in ranks]
    works = [_works(ours, free) for ours in ranks]
    busy = [sum(seconds.values()) for seconds in works]  # of the device: ranks that wait for the host are all alike
    busiest, fullest = _most(busy), _most(peaks)
    phases, quiet = (_phases(ranks[busiest], sent, span) for span in spans)
    exchanged = _exchanged(ranks[busiest], shared, phases, quiet, takes)
    bubble = np.maximum(0.0, quiet["total"] - own[busiest])
    stages = [
        StageFigures(
            ours.rank, [[s.blocks.start, s.blocks.stop - 1] for s in ours.stages], ours.in_flight,
            *_one_micro_batch(ours, free), at.waited, peak,
        )
        for ours, at, peak in zip(ranks, real, peaks, strict=True)
    ]  # fmt: skip
    time = _time(works[busiest], on, phases, exchanged, bubble)
    return Pipelined(time, busiest, fullest, stages, durations[busiest])


def _most(of_ranks: Sequence[Any]) -> int:
    """The rank that has most.

    Raises:
        MixedStructure: it is not the same all over the grid.
    """
    at = np.argmax(np.broadcast_arrays(*of_ranks), axis=0)
    if np.any(at != at.flat[0]):
        raise MixedStructure(at == at.flat[0])
    return int(at.flat[0])


class Span(NamedTuple):
    """When the last gradient is there, and when all is done."""

    gradients: Seconds
    total: Seconds


def _ended(clocks: Sequence[RankClocks], *, clips: bool) -> Span:
    """Clipping and the optimizer behind the passes of ranks; clipping begins where the last one comes to it."""
    gradients = reduce(later, [at.end for at in clocks])
    for at in clocks:
        if clips:
            at.wait(gradients)
        at.advance(at.ours.update)
    return Span(gradients, reduce(later, [at.end for at in clocks]))


def _one_micro_batch(ours: RankStep, priced: PricedParts) -> tuple[Seconds, Seconds]:
    """Seconds of both passes of a micro-batch by themselves, all stages of a rank together."""
    middle = min(1, ours.step.setup.grad_accum - 1)
    found = dict.fromkeys((FORWARD, BACKWARD), 0.0)
    for action, parts in ours.actions:
        if isinstance(action, Pass) and action.micro == middle:
            found[action.way] = found[action.way] + priced.in_a_row(parts).end
    return found[FORWARD], found[BACKWARD]


def _phases(ours: RankStep, priced: PricedParts, span: Span) -> Phases:
    """The seconds of a step by phase: until its gradients are there, forward and backward share them as their work."""
    forward, backward = _one_micro_batch(ours, priced)
    share = forward / (forward + backward)
    phases: Phases = {
        "forward": span.gradients * share, "backward": span.gradients * (1.0 - share),
        "optimizer": span.total - span.gradients,
    }  # fmt: skip
    return {**phases, "total": sum(phases[phase] for phase in PHASES)}


def _exchanged(
    ours: RankStep, shared: Shared, phases: Phases, quiet: Phases, takes: Callable[[Pass], Seconds]
) -> Communication:
    """What a rank exchanges; a message counts at both of its ends."""
    taking: Phases = dict.fromkeys(PHASES, 0.0)
    nbytes, calls = ALONE.nbytes.copy(), ALONE.calls.copy()
    for part, times in ours.step.parts():
        for op, alone in zip(part.ops, shared.durations[part].alone, strict=True):
            if exchanges(op):
                kind = KIND_OF[op.name]
                nbytes[kind], calls[kind] = nbytes[kind] + message_bytes(op) * times, calls[kind] + times
                if kind != "send_recv":
                    taking[part.phase] = taking[part.phase] + alone * times
    for action, _ in ours.actions:
        for done in (*action.sends, *action.receives) if isinstance(action, Post) else ():
            taking[done.way] = taking[done.way] + takes(done)
    taking["total"] = sum(taking[phase] for phase in PHASES)
    exposed = longer(phases, quiet)
    return Communication(exposed, hidden(taking, exposed), nbytes, calls, ALONE.offloading)


def _works(ours: RankStep, priced: PricedParts) -> dict[str, Any]:
    """Seconds of a rank's device by component."""
    components: dict[str, Any] = {}
    for part, times in ours.step.parts():
        for name, busy in priced.priced(part)[1].items():
            components[name] = components.get(name, 0.0) + busy * times
    return components


def _time(works: dict[str, Any], on: DeviceProfile, phases: Phases, exchanged: Communication, bubble: Seconds) -> Time:
    """The time of a step with the work of one rank as its components."""
    components, total = dict(works), phases["total"]
    components[intervals.COLLECTIVE] = exchanged.exposed["total"]
    busy = sum(components.values())
    components[intervals.BUBBLE] = bubble
    components["host"] = np.maximum(0.0, total - busy - bubble)
    low, high = intervals.interval_bounds(total, intervals.step_sigma(components, total, on))
    return Time(phases, low, high, busy, components["host"] / total, components, exchanged)
