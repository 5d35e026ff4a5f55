"""What one run of a part takes: device seconds of its ops, and its clock matrix."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..devices import price
from ..devices.host import Host
from ..devices.profile import DeviceProfile
from ..program.op import Op
from ..program.part import Part
from ..program.streams import COMPUTE, HOST
from ..recording.reuse import Shared
from ..recording.step import Step
from . import contention, intervals, timeline
from .contention import Seconds
from .work import CallCost, PartWork


def part_durations(built: Step, on: DeviceProfile, shared: Shared | None = None) -> list[Seconds]:
    """The device seconds of every part's ops; all that are not yet known are priced in one go.

    `shared` also receives the `Call`s of the parts.
    """
    shared = shared or Shared()
    new = [part for part, _ in built.parts() if part not in shared.durations]
    seconds, calls = _priced([op for part in new for op in part.ops], on, shared)
    start = 0
    for part in new:
        rows = slice(start, start + len(part.ops))
        alone = contention.on_the_slowest(part, seconds[rows], on)
        shared.durations[part] = contention.beside_streams(part, alone, on)
        shared.calls[part] = calls[rows]
        start = rows.stop
    return [shared.durations[part] for part, _ in built.parts()]


def _priced(ops: Sequence[Op], on: DeviceProfile, shared: Shared) -> tuple[np.ndarray, list[CallCost]]:
    """Device seconds of each op, and what else it takes; equal ones are worked out once, where no dim is an array."""
    first: dict[Any, Op] = {}  # by what they call; views are all alike
    try:
        alike = [first.setdefault(None if op.view else op.call, op) for op in ops]
    except TypeError:
        return price.durations(ops, on), [CallCost.of(op) for op in ops]
    prices = shared.prices
    new = {call: op for call, op in first.items() if call not in prices}
    if new:
        distinct = list(new.values())
        made = zip(price.durations(distinct, on).tolist(), map(CallCost.of, distinct), strict=True)
        prices.update(zip(new, made, strict=True))
    known = {op: prices[call] for call, op in first.items()}
    return np.array([known[op][0] for op in alike]), [known[op][1] for op in alike]


def clocks(
    work: PartWork, seconds: Seconds, kind: str, by: Host, *, graphs: bool = False
) -> tuple[timeline.Clocks, dict[str, Any]]:
    """The clock matrix of one run of a part, and its device-busy seconds by component.

    Args:
        seconds: of its ops.
        kind: of the device.
        graphs: whether a CUDA graph runs it.
    """
    if not len(seconds.alone):
        return timeline.IDENTITY, {}
    busy = work.busy(seconds.added)
    for apart in (intervals.COLLECTIVE, intervals.OFFLOAD):
        busy.pop(apart, None)  # the clocks of the whole step say what of it nothing hides
    if graphs and kind == "cuda":  # nothing to dispatch: the device runs through
        return timeline.advance_clock(COMPUTE, timeline.total(seconds.added)), busy
    dispatch = by.dispatched(work.host, kind)
    dispatch = dispatch.reshape(len(dispatch), *(1,) * (seconds.alone.ndim - 1))
    if kind == "cpu":  # one clock: the host does the work itself
        return timeline.advance_clock(HOST, timeline.total(dispatch) + timeline.total(seconds.alone)), busy
    if work.cores is not None:  # the host's own work
        dispatch = dispatch + np.where(work.cores.reshape(dispatch.shape), seconds.alone, 0.0)
    row = timeline.ClockRow(dispatch, seconds.alone, work.host.launched, work.waits, work.runs, seconds.added)
    return timeline.of_row(row, by.launch), busy


def seconds_of(parts: list[Part], on: DeviceProfile, by: Host) -> Any:
    """Seconds of parts that run in a row, from all clocks at 0."""
    together = timeline.IDENTITY
    for part in parts:
        seconds = contention.beside_streams(part, price.durations(part.ops, on), on)
        together = together.then(clocks(PartWork.of(part), seconds, on.kind, by)[0].power(part.repeat))
    return together.end
