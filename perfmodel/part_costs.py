"""What one run of a part takes: device seconds of its ops, clocks of host and device, counts."""

from typing import Any

import numpy as np

from . import costs, intervals, timeline, zero
from .devices import price
from .devices.host import Host
from .devices.profile import DeviceProfile
from .sharing import Shared
from .step import Step
from .tape.dims import Dim, summed
from .tape.op import Part


def counts(part: Part) -> dict[str, Dim]:
    """What one run of a part takes."""
    ops = [op for op in part.ops if not op.view]
    flops = [costs.flops(op) for op in ops]
    return {
        "flops": summed(flops),
        "recomputed": summed(n for n, op in zip(flops, ops, strict=True) if op.recompute),
        "bytes": summed([x for op in ops for x in (op.bytes_read, op.bytes_written)]),
        "kernels": summed([costs.kernels(op) for op in ops]),
        "dispatches": len(ops),
    }


def durations(built: Step, on: DeviceProfile, shared: Shared | None = None) -> list[np.ndarray]:
    """The device seconds of every part's ops; all that are not yet known are priced in one go."""
    shared = shared or Shared()
    known = shared.durations
    new = [part for part, _ in built.parts() if part not in known]
    ends = np.cumsum([len(part.ops) for part in new])[:-1]
    seconds = np.split(price.durations([op for part in new for op in part.ops], on, shared.prices), ends)
    if built.zero:
        seconds = [zero.beside(part, t, on) for part, t in zip(new, seconds, strict=True)]
    known.update(zip(new, seconds, strict=True))
    return [known[part] for part, _ in built.parts()]


def clocks(
    part: Part, duration: np.ndarray, on: DeviceProfile, by: Host, *, graphs: bool = False
) -> tuple[timeline.Clocks, dict[str, Any]]:
    """The clock matrix of one run of a part, and its device-busy seconds by component."""
    if not len(duration):
        return timeline.IDENTITY, {}
    if graphs and on.kind == "cuda":  # nothing to dispatch: the device runs through
        busy = duration.sum(axis=0)
        return timeline.Clocks(0.0, timeline.NEVER, timeline.NEVER, busy), _components(part, duration)
    dispatch = by.dispatch(part, on.kind)
    dispatch = dispatch.reshape(len(dispatch), *(1,) * (duration.ndim - 1))
    launched = np.array([op.launched for op in part.ops])
    synced = [i for i, op in enumerate(part.ops) if costs.synchronises(op)]
    pieces, start = [], 0
    for stop in [*(i + 1 for i in synced), len(part.ops)]:
        rows = slice(start, stop)
        pieces.append(timeline.of_ops(dispatch[rows], duration[rows], by.launch, launched[rows]))
        start = stop
    matrix = timeline.of_synced(pieces)
    if on.kind == "cpu":  # one clock: the host does the work itself
        both = dispatch.sum(axis=0) + duration.sum(axis=0)
        matrix = timeline.Clocks(both, both, both, both)
    return matrix, _components(part, duration)


def _components(part: Part, duration: np.ndarray) -> dict[str, Any]:
    rows: dict[str, list[int]] = {}
    for i, op in enumerate(part.ops):
        if not op.view:
            dtype = op.inputs[-1].dtype if op.inputs else "fp32"
            rows.setdefault(intervals.component(costs.kind(op), dtype), []).append(i)
    return {name: duration[of_name].sum(axis=0) for name, of_name in rows.items()}


def seconds_of(parts: list[Part], on: DeviceProfile, by: Host) -> Any:
    """Seconds of parts that run in a row, from both clocks at 0."""
    both = timeline.IDENTITY
    for part in parts:
        both = both.then(clocks(part, price.durations(part.ops, on), on, by)[0].power(part.repeat))
    return both.end
