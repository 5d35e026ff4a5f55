"""What one run of a part takes: device seconds of its ops, its clock matrix, counts."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ..calls import costs
from ..devices import price
from ..devices.host import Host
from ..devices.profile import DeviceProfile
from ..program.dims import Dim, summed
from ..program.op import Op
from ..program.part import Part
from ..program.streams import COMPUTE, HOST
from ..recording.reuse import Shared
from ..recording.step import Step
from . import contention, intervals, timeline
from .contention import Seconds

K = TypeVar("K")
V = TypeVar("V")


def recalled(known: dict[K, V], key: K, make: Callable[[], V]) -> V:
    """What is known under a key (of `Shared`), made if it is not."""
    if key not in known:
        known[key] = make()
    return known[key]


class CallCost(NamedTuple):
    """What one op takes, whatever part it runs in.

    Attributes:
        read, written: bytes.
        component: of `intervals`, what prices it; empty for a view.
        waits: whether the host waits for the device.
    """

    flops: Dim = 0
    read: Dim = 0
    written: Dim = 0
    kernels: Dim = 0
    component: str = ""
    waits: bool = False

    @classmethod
    def of(cls, op: Op) -> "CallCost":
        """Work it out."""
        if op.view:
            return VIEW
        component = intervals.component(costs.kind(op), costs.operand_dtype(op))
        waits = costs.synchronises(op)
        return cls(costs.flops(op), op.bytes_read, op.bytes_written, costs.kernels(op), component, waits)


VIEW = CallCost()


def counts(part: Part, calls: Sequence[CallCost] | None = None) -> dict[str, Dim]:
    """What one run of a part takes.

    Args:
        calls: of its ops, if they are known.
    """
    calls = calls or [CallCost.of(op) for op in part.ops]
    own = [call for call in calls if call.component]
    return {
        "flops": summed([call.flops for call in own]),
        "recomputed": summed([call.flops for op, call in zip(part.ops, calls, strict=True) if op.recompute]),
        "bytes": summed([x for call in own for x in (call.read, call.written)]),
        "kernels": summed([call.kernels for call in own]),
        "dispatches": len(own),
    }


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
        shared.durations[part] = contention.beside_streams(part, seconds[rows], on)
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
    part: Part,
    seconds: Seconds,
    on: DeviceProfile,
    by: Host,
    *,
    graphs: bool = False,
    calls: Sequence[CallCost] | None = None,
) -> tuple[timeline.Clocks, dict[str, Any]]:
    """The clock matrix of one run of a part, and its device-busy seconds by component.

    Args:
        seconds: of its ops.
        graphs: whether a CUDA graph runs it.
        calls: of its ops, if they are known.
    """
    if not len(seconds.alone):
        return timeline.IDENTITY, {}
    calls = calls or [CallCost.of(op) for op in part.ops]
    work = _components(calls, seconds.added)
    work.pop(intervals.COLLECTIVE, None)  # the clocks of the whole step say what of it nothing hides
    if graphs and on.kind == "cuda":  # nothing to dispatch: the device runs through
        return timeline.advance_clock(COMPUTE, timeline.total(seconds.added)), work
    dispatch = by.dispatch(part, on.kind)
    dispatch = dispatch.reshape(len(dispatch), *(1,) * (seconds.alone.ndim - 1))
    if on.kind == "cpu":  # one clock: the host does the work itself
        return timeline.advance_clock(HOST, timeline.total(dispatch) + timeline.total(seconds.alone)), work
    row = timeline.ClockRow(
        dispatch,
        seconds.alone,
        np.array([op.launched for op in part.ops]),
        [i for i, call in enumerate(calls) if call.waits],
        part.runs,
        seconds.added,
    )
    return timeline.of_row(row, by.launch), work


def _components(calls: Sequence[CallCost], duration: np.ndarray) -> dict[str, Any]:
    busy: dict[str, Any] = {}
    of_grid = duration.ndim > 1
    for call, seconds in zip(calls, duration if of_grid else duration.tolist(), strict=True):
        name = call.component
        if name in busy:
            busy[name] += seconds
        elif name:
            busy[name] = seconds.copy() if of_grid else seconds
    return busy


def seconds_of(parts: list[Part], on: DeviceProfile, by: Host) -> Any:
    """Seconds of parts that run in a row, from all clocks at 0."""
    together = timeline.IDENTITY
    for part in parts:
        seconds = contention.beside_streams(part, price.durations(part.ops, on), on)
        together = together.then(clocks(part, seconds, on, by)[0].power(part.repeat))
    return together.end
