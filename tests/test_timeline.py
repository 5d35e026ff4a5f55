"""The max-plus product against an op-by-op simulation of the two clocks.

The closed forms (cumulative sums, powers by squaring) replace a loop over a hundred thousand ops; the loop is the
definition, so it is the reference here.
"""

from collections.abc import Iterable
from dataclasses import fields, replace
from functools import reduce
from typing import Any

import numpy as np
import pytest
from helpers import METHODS, NAMES, step_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perfmodel.calls import costs
from perfmodel.devices import host as hosts
from perfmodel.devices import price, profile
from perfmodel.devices.host import Host
from perfmodel.prediction import timeline
from perfmodel.prediction.predict import step_time
from perfmodel.prediction.timeline import IDENTITY, NEVER, SYNC, Clocks
from perfmodel.program.op import Op
from perfmodel.program.part import PHASES
from perfmodel.recording.step import Step

quick = settings(deadline=None, max_examples=200, derandomize=True)
few = settings(
    quick, max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
spans = st.integers(0, 1000).map(float)  # whole numbers: sums are exact in any order
rows = st.lists(st.tuples(spans, spans), min_size=1, max_size=25)


def clocks_of(row: list[tuple[float, float]], launch: float) -> Clocks:
    dispatch, duration = (np.array(x) for x in zip(*row, strict=True))
    return timeline.of_ops(dispatch, duration, launch)


@st.composite
def matrices(draw: st.DrawFn) -> Clocks:
    """Any matrix that ops and synchronisations can make."""
    pieces = [clocks_of(row, draw(spans)) for row in draw(st.lists(rows, min_size=1, max_size=3))]
    return timeline.of_synced(pieces) if draw(st.booleans()) else reduce(Clocks.then, pieces)


@quick
@given(row=rows, launch=spans)
def test_the_closed_form_equals_the_simulation(row: list[tuple[float, float]], launch: float) -> None:
    """Every time that the tool prints rests on this identity."""
    dispatch, duration = zip(*row, strict=True)
    host, device = timeline.simulate(dispatch, duration, launch)
    clocks = clocks_of(row, launch)
    assert (clocks.hh, max(clocks.hd, clocks.dd)) == (host, device)
    assert clocks.end == max(host, device)


@quick
@given(a=matrices(), b=matrices(), c=matrices())
def test_the_product_is_associative_and_has_an_identity(a: Clocks, b: Clocks, c: Clocks) -> None:
    """Only therefore may a layer be composed first and raised to its power later."""
    assert a.then(b).then(c) == a.then(b.then(c))
    assert IDENTITY.then(a) == a == a.then(IDENTITY)


@quick
@given(a=matrices(), n=st.integers(0, 40))
def test_a_power_equals_the_unrolled_product(a: Clocks, n: int) -> None:
    """80 layers are seven squarings; one wrong bit of the exponent would lose layers."""
    assert a.power(n) == reduce(Clocks.then, [a] * n, IDENTITY)


@quick
@given(row=rows, cut=st.integers(0, 25), launch=spans)
def test_a_row_may_be_cut_anywhere(row: list[tuple[float, float]], cut: int, launch: float) -> None:
    """Where one part of a step ends and the next begins must not matter."""
    cut = min(cut, len(row))
    parts = [clocks_of(r, launch) for r in (row[:cut], row[cut:]) if r]
    assert reduce(Clocks.then, parts) == clocks_of(row, launch)


@quick
@given(row=rows, launch=spans)
def test_a_free_host_leaves_the_busy_time_and_one_launch(row: list[tuple[float, float]], launch: float) -> None:
    """The device-bound limit: nothing but the sum of durations."""
    clocks = clocks_of([(0.0, duration) for _, duration in row], launch)
    assert clocks.end == launch + sum(duration for _, duration in row)


@quick
@given(row=rows, launch=spans)
def test_an_infinitely_fast_device_leaves_the_host_time(row: list[tuple[float, float]], launch: float) -> None:
    """The launch-bound limit, in which small models and adapters live."""
    clocks = clocks_of([(dispatch, 0.0) for dispatch, _ in row], launch)
    assert clocks.hh == sum(dispatch for dispatch, _ in row)
    assert clocks.end == clocks.hh + launch


@quick
@given(row=rows, launch=spans, at=st.integers(0, 24), more=spans, which=st.sampled_from((0, 1)))
def test_time_never_falls_when_an_op_takes_longer(
    row: list[tuple[float, float]], launch: float, at: int, more: float, which: int
) -> None:
    """A slower kernel or a slower host never makes a step faster."""
    at %= len(row)
    op = list(row[at])
    op[which] += more
    slower = clocks_of([*row[:at], (op[0], op[1]), *row[at + 1 :]], launch)
    assert slower.end >= clocks_of(row, launch).end


@quick
@given(a=matrices(), b=matrices(), host=spans, device=spans)
def test_a_synchronisation_makes_both_clocks_the_later_one(a: Clocks, b: Clocks, host: float, device: float) -> None:
    """After `loss.item()` the host cannot run ahead, and work after it starts from one instant."""
    later = max(host, device)
    assert np.maximum(host + SYNC.hh, device + SYNC.dh) == later
    assert np.maximum(host + SYNC.hd, device + SYNC.dd) == later
    assert a.then(SYNC).then(b).end == a.end + b.end
    assert a.then(SYNC).then(b).end >= a.then(b).end


def test_ops_that_launch_nothing_leave_the_device_alone() -> None:
    """Views cost host time only."""
    clocks = timeline.of_ops(np.ones(3), np.zeros(3), 5.0, np.zeros(3, bool))
    assert (clocks.hh, clocks.hd, clocks.dd) == (3.0, NEVER, 0.0)


# whole steps

CUDA = profile.load("l40s")
HOST = hosts.load()
COSTS = {f.name: getattr(HOST, f.name) for f in fields(Host) if isinstance(getattr(HOST, f.name), float)}
FREE = replace(HOST, **dict.fromkeys(COSTS, 0.0))


def durations(ops: Iterable[Op], *_: Any) -> np.ndarray:
    """A stand-in for prices: anything deterministic, from nothing to far more than a launch."""
    return np.array([(op.bytes_written % 97) * 1e-6 if on_device(op) else 0.0 for op in ops])


def on_device(op: Op) -> bool:
    return not op.view and not op.attrs.host


def unrolled(step: Step, host: Host) -> tuple[float, float]:
    """Host and device clocks at the end of a step, op by op, layer by layer, micro-batch by micro-batch."""
    h = d = 0.0
    for group in step.groups:
        for part in [p for _ in range(group.repeat) for p in group.parts]:
            for _ in range(part.repeat):
                for op, dispatch, duration in zip(
                    part.ops, host.dispatch(part, CUDA.kind), durations(part.ops), strict=True
                ):
                    h += dispatch
                    if on_device(op):
                        d = max(d, h + host.launch) + duration
                    if costs.synchronises(op):
                        h = d = max(h, d)
    return h, d


def check_against_simulation(monkeypatch: pytest.MonkeyPatch, speed: float, step: Step) -> None:
    monkeypatch.setattr(price, "durations", durations)
    host = replace(HOST, **{name: cost * speed for name, cost in COSTS.items()})
    phases = step_time(step, CUDA, host).phases
    assert phases["total"] == pytest.approx(max(unrolled(step, host)), rel=1e-9)
    assert sum(phases[p] for p in PHASES) == pytest.approx(phases["total"])


speeds = st.sampled_from((0.01, 0.1, 1.0, 10.0))


@few
@given(
    name=st.sampled_from(NAMES), method=st.sampled_from(METHODS), layers=st.integers(1, 5), accum=st.integers(1, 2),
    optimizer=st.sampled_from(("adamw", "adamw-loop", "sgd")), speed=speeds,
)  # fmt: skip
def test_the_time_of_a_step_equals_its_simulation_op_by_op(
    monkeypatch: pytest.MonkeyPatch, name: str, method: str, layers: int, accum: int, optimizer: str, speed: float
) -> None:
    """Parts, powers and synchronisations put together: the whole step has no other reference."""
    step = step_of(name, method, layers=layers, grad_accum=accum, optimizer=optimizer)
    check_against_simulation(monkeypatch, speed, step)


@few
@given(name=st.sampled_from(NAMES), method=st.sampled_from(METHODS), accum=st.integers(3, 5), speed=speeds)
def test_the_time_of_many_micro_batches_equals_their_simulation_op_by_op(
    monkeypatch: pytest.MonkeyPatch, name: str, method: str, accum: int, speed: float
) -> None:
    """The second micro-batch starts on a device that is still busy, so it is not n times the first one's end."""
    check_against_simulation(monkeypatch, speed, step_of(name, method, grad_accum=accum))


@few
@given(name=st.sampled_from(NAMES), method=st.sampled_from(METHODS), accum=st.integers(1, 3))
def test_a_step_on_a_free_host_takes_the_devices_busy_time(
    monkeypatch: pytest.MonkeyPatch, name: str, method: str, accum: int
) -> None:
    """Then the device never waits, and the launch-bound share is zero."""
    monkeypatch.setattr(price, "durations", durations)
    time = step_time(step_of(name, method, grad_accum=accum), CUDA, FREE)
    assert time.phases["total"] == pytest.approx(time.device_busy)
    assert time.launch_bound_share == pytest.approx(0.0, abs=1e-9)


@few
@given(name=st.sampled_from(NAMES), method=st.sampled_from(METHODS))
def test_a_step_on_an_infinitely_fast_device_takes_the_hosts_time(
    monkeypatch: pytest.MonkeyPatch, name: str, method: str
) -> None:
    """Then the whole step is launch-bound, and only dispatches count."""
    monkeypatch.setattr(price, "durations", lambda ops, on: np.zeros(len(ops)))
    step = step_of(name, method)
    host = replace(HOST, launch=0.0)
    time = step_time(step, CUDA, host)
    assert time.phases["total"] == pytest.approx(sum(n * host.dispatch(p, CUDA.kind).sum() for p, n in step.parts()))
    assert time.launch_bound_share == pytest.approx(1.0)
