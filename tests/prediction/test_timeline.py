"""The max-plus product against an op-by-op simulation of the clocks.

The closed forms (cumulative sums, powers by squaring) replace a loop over a hundred thousand ops; the loop is the
definition, so it is the reference here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from functools import reduce
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest
from helpers import METHODS, NAMES, step_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perfmodel.calls import costs
from perfmodel.devices import engine, price, profile
from perfmodel.devices import host as hosts
from perfmodel.devices.host import Host
from perfmodel.prediction import contention, timeline
from perfmodel.prediction.timeline import IDENTITY, NEVER, Clocks, wait
from perfmodel.prediction.times import step_time
from perfmodel.program.op import Op
from perfmodel.program.part import PHASES
from perfmodel.program.streams import COMMUNICATION, COMPUTE, COPY, HOST, MAIN, Run
from perfmodel.recording.step import Step

quick = settings(max_examples=200, derandomize=True)
few = settings(
    quick, max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
CLOCKS = (HOST, COMPUTE, COMMUNICATION, COPY, "event")
spans = st.integers(0, 1000).map(float)  # whole numbers: sums are exact in any order


class Call(NamedTuple):
    """One op of a program: seconds on the host and on its stream, what it takes from others, and where it runs."""

    dispatch: float
    duration: float
    taken: float = 0.0
    launched: bool = True
    synchronises: bool = False
    run: Run = MAIN


def simulate(program: Iterable[Call], launch: float, start: dict[str, float] | None = None) -> dict[str, float]:
    """The reference: a program op by op, every clock one number. Returns the clocks at its end."""
    now = start or dict.fromkeys(CLOCKS, 0.0)
    for call in program:
        on = call.run.on
        now[HOST] += call.dispatch
        now[on] = max([now[on], *(now[other] for other in call.run.after)])
        if call.launched:
            now[on] = max(now[on], now[HOST] + launch) + call.duration
            now[COMPUTE] += call.taken if on != COMPUTE else 0.0
        if call.synchronises:
            now[HOST] = max(now[HOST], now[on])
    return now


def clocks_of(program: Sequence[Call], launch: float) -> Clocks:
    """The same as a matrix."""
    column = {name: np.array([getattr(call, name) for call in program]) for name in Call._fields[:4]}
    waits = [i for i, call in enumerate(program) if call.synchronises]
    runs = [call.run for call in program]
    row = timeline.ClockRow(column["dispatch"], column["duration"], column["launched"], waits, runs, column["taken"])
    return timeline.of_row(row, launch)


def after(clocks: Clocks, start: dict[str, float]) -> dict[str, float]:
    """The clocks at the end of a stretch that they began as `start`."""
    return {end: max(start[x] + clocks.delay(x, end) for x in CLOCKS) for end in CLOCKS}


RUNS = (  # kernels, collectives of what they made, kernels that need those, copies, an event and what waits for it
    MAIN, Run(COMMUNICATION), Run(COMMUNICATION, after=(COMPUTE,)), Run(after=(COMMUNICATION,)), Run(COPY),
    Run(COPY, after=(COMPUTE, COMMUNICATION)), Run("event", after=(COMMUNICATION,)), Run(after=("event", COPY)),
)  # fmt: skip


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Any op: views and host work launch nothing, take no time of a stream and nothing of others."""
    run = draw(st.sampled_from(RUNS))
    rarely = st.sampled_from((False, False, False, True))
    if draw(rarely):
        return Call(draw(spans), 0.0, 0.0, False, draw(rarely), run)
    return Call(draw(spans), draw(spans), draw(spans), True, draw(rarely), run)


programs = st.lists(calls(), max_size=25)
plain = st.lists(st.tuples(spans, spans).map(lambda seconds: Call(*seconds)), min_size=1, max_size=25)
times = st.fixed_dictionaries(dict.fromkeys(CLOCKS, spans))
matrices = st.builds(clocks_of, programs, spans)


@quick
@given(program=programs, launch=spans, start=times)
def test_the_closed_form_equals_the_simulation(program: list[Call], launch: float, start: dict[str, float]) -> None:
    """Every time that the tool prints rests on this: any streams, waits and synchronisations, from any start."""
    clocks = clocks_of(program, launch)
    assert after(clocks, start) == simulate(program, launch, dict(start))
    assert clocks.end == max(simulate(program, launch).values())


@quick
@given(program=programs, launch=spans)
def test_a_grid_holds_what_its_points_hold(program: list[Call], launch: float) -> None:
    """A sweep is one product of arrays: each of its points equals the program of that point alone."""
    other = [call._replace(duration=2 * call.duration, taken=call.taken + 1.0) for call in program]
    points = [clocks_of(p, launch) for p in (program, other)]
    row = timeline.ClockRow(
        np.array([[call.dispatch] for call in program]).reshape(-1, 1),
        np.array([[a.duration, b.duration] for a, b in zip(program, other, strict=True)]).reshape(-1, 2),
        np.array([call.launched for call in program], bool),
        [i for i, call in enumerate(program) if call.synchronises],
        [call.run for call in program],
        np.array([[a.taken, b.taken] for a, b in zip(program, other, strict=True)]).reshape(-1, 2),
    )
    grid = timeline.of_row(row, launch).power(3)
    for i, point in enumerate(points):
        for x, y in product(CLOCKS, CLOCKS):
            assert np.broadcast_to(grid.delay(x, y), (2,))[i] == point.power(3).delay(x, y)


@quick
@given(a=matrices, b=matrices, c=matrices)
def test_the_product_is_associative_and_has_an_identity(a: Clocks, b: Clocks, c: Clocks) -> None:
    """Only therefore may a layer be composed first and raised to its power later."""
    assert a.then(b).then(c) == a.then(b.then(c))
    assert IDENTITY.then(a) == a == a.then(IDENTITY)


@quick
@given(a=matrices, n=st.integers(0, 40))
def test_a_power_equals_the_unrolled_product(a: Clocks, n: int) -> None:
    """80 layers are seven squarings; one wrong bit of the exponent would lose layers."""
    assert a.power(n) == reduce(Clocks.then, [a] * n, IDENTITY)


@quick
@given(program=programs, cut=st.integers(0, 25), launch=spans)
def test_a_row_may_be_cut_anywhere(program: list[Call], cut: int, launch: float) -> None:
    """Where one part of a step ends and the next begins must not matter."""
    whole, parts = clocks_of(program, launch), [clocks_of(row, launch) for row in (program[:cut], program[cut:])]
    for x, y in product(CLOCKS, CLOCKS):
        assert parts[0].then(parts[1]).delay(x, y) == whole.delay(x, y)


@quick
@given(row=plain, launch=spans)
def test_a_free_host_leaves_the_busy_time_and_one_launch(row: list[Call], launch: float) -> None:
    """The device-bound limit: nothing but the sum of durations."""
    clocks = clocks_of([call._replace(dispatch=0.0) for call in row], launch)
    assert clocks.end == launch + sum(call.duration for call in row)


@quick
@given(row=plain, launch=spans)
def test_an_infinitely_fast_device_leaves_the_host_time(row: list[Call], launch: float) -> None:
    """The launch-bound limit, in which small models and adapters live."""
    clocks = clocks_of([call._replace(duration=0.0) for call in row], launch)
    assert clocks.delay(HOST, HOST) == sum(call.dispatch for call in row)
    assert clocks.end == clocks.delay(HOST, HOST) + launch


@quick
@given(program=programs, launch=spans, at=st.integers(0, 24), more=spans, what=st.sampled_from(Call._fields[:3]))
def test_time_never_falls_when_an_op_takes_longer(
    program: list[Call], launch: float, at: int, more: float, what: str
) -> None:
    """A slower kernel or a slower host never makes a step faster, on no clock."""
    slower = list(program)
    for i in range(at, len(program), 25):
        slower[i] = program[i]._replace(**{what: getattr(program[i], what) + more})
    a, b = clocks_of(slower, launch), clocks_of(program, launch)
    assert all(a.delay(x, y) >= b.delay(x, y) for x, y in product(CLOCKS, CLOCKS))


@quick
@given(a=plain, b=plain, launch=spans, start=times, stream=st.sampled_from(CLOCKS[1:]))
def test_after_a_synchronisation_work_starts_from_one_instant(
    a: list[Call], b: list[Call], launch: float, start: dict[str, float], stream: str
) -> None:
    """After `loss.item()` the host cannot run ahead: what went before and what follows take what each takes alone."""
    first, second = ([call._replace(run=Run(stream)) for call in row] for row in (a, b))
    before, behind = clocks_of(first, launch), clocks_of(second, launch)
    assert before.then(wait(HOST, stream)).then(behind).end == before.end + behind.end
    assert before.then(behind).end <= before.end + behind.end
    assert after(wait(HOST, stream), start)[HOST] == max(start[HOST], start[stream])


@quick
@given(compute=spans, gather=spans, launch=spans)
def test_what_nobody_waits_for_runs_beside(compute: float, gather: float, launch: float) -> None:
    """A second stream hides behind the first, until an op of the first needs what it made."""
    beside = [Call(0.0, gather, run=Run(COMMUNICATION)), Call(0.0, compute)]
    assert clocks_of(beside, launch).end == launch + max(gather, compute)
    needed = [beside[0], beside[1]._replace(run=Run(after=(COMMUNICATION,)))]
    assert clocks_of(needed, launch).end == launch + gather + compute


def test_ops_that_launch_nothing_leave_the_device_alone() -> None:
    """Views cost host time only, and a clock that nothing touches costs nothing."""
    clocks = clocks_of([Call(1.0, 0.0, launched=False)] * 3, 5.0)
    assert clocks.ends == {HOST: {HOST: 3.0}}
    assert (clocks.delay(HOST, COMPUTE), clocks.delay(COMPUTE, COMPUTE)) == (NEVER, 0.0)


# whole steps

CUDA = profile.load("l40s")
DEFAULT = hosts.load()
COSTS = {f.name: getattr(DEFAULT, f.name) for f in fields(Host) if isinstance(getattr(DEFAULT, f.name), float)}
FREE = replace(DEFAULT, **dict.fromkeys(COSTS, 0.0))


def durations(ops: Iterable[Op], *_: Any) -> np.ndarray:
    """A stand-in for prices: anything deterministic, from nothing to far more than a launch."""
    return np.array([(op.bytes_written % 97) * 1e-6 if on_device(op) else 0.0 for op in ops])


def on_device(op: Op) -> bool:
    return not op.view and not op.attrs.host


def unrolled(step: Step, host: Host) -> dict[str, float]:
    """The clocks at the end of a step, op by op, layer by layer, micro-batch by micro-batch."""
    now = dict.fromkeys(CLOCKS, 0.0)
    by = engine.under(host, step.setup.engine)
    for group in step.groups:
        for part in [p for _ in range(group.repeat) for p in group.parts]:
            alone, added = contention.beside_streams(part, durations(part.ops), CUDA)
            program = [
                Call(dispatch, alone[i], added[i], on_device(op), costs.synchronises(op), op.runs)
                for i, (op, dispatch) in enumerate(zip(part.ops, by.dispatch(part, CUDA.kind), strict=True))
            ]
            for _ in range(part.repeat):
                now = simulate(program, host.launch, now)
    return now


def check_against_simulation(monkeypatch: pytest.MonkeyPatch, speed: float, step: Step) -> None:
    monkeypatch.setattr(price, "durations", durations)
    host = replace(DEFAULT, **{name: cost * speed for name, cost in COSTS.items()})
    phases = step_time(step, CUDA, host).phases
    assert phases["total"] == pytest.approx(max(unrolled(step, host).values()), rel=1e-9)
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
@given(
    name=st.sampled_from(NAMES), method=st.sampled_from(("full", "lora:r=4")), accum=st.integers(1, 3), speed=speeds,
    checkpoint=st.sampled_from(("none", "block")),
)  # fmt: skip
def test_the_time_of_a_step_on_two_streams_equals_its_simulation_op_by_op(
    monkeypatch: pytest.MonkeyPatch, name: str, method: str, accum: int, speed: float, checkpoint: str
) -> None:
    """ZeRO's reduction runs beside the backward pass, over layers and parts, until the host waits for it."""
    step = step_of(name, method, grad_accum=accum, engine="deepspeed-zero3", checkpoint=checkpoint)
    assert any(part.runs for part, _ in step.parts())
    check_against_simulation(monkeypatch, speed, step)


@pytest.mark.parametrize(("times", "left"), [(0.5, 0.0), (1.0, 0.0), (2.0, 0.5), (10.0, 0.9)])
def test_what_runs_beside_products_gets_the_bandwidth_that_they_leave(times: float, left: float) -> None:
    """By hand: products take three times what their bytes need, so two thirds of their time is free for a reduction."""
    step = step_of("llama", "full", engine="deepspeed-zero3")
    part = next(p for p, _ in step.parts() if p.runs is not None and p.phase == "backward")
    bytes_alone = [(op.bytes_read + op.bytes_written) / CUDA.hardware.memory_bandwidth for op in part.ops]
    apart = [op.launched and op.runs.on != COMPUTE for op in part.ops]
    product = [costs.kind(op) in ("gemm", "attention") for op in part.ops]
    assert any(apart)
    assert any(product)
    alone = np.array([3 * b if p else 0.0 for b, p in zip(bytes_alone, product, strict=True)])
    free = 2 / 3 * alone.sum()
    alone[apart] = times * free / sum(apart)
    found = contention.beside_streams(part, alone, CUDA)
    assert found.added[apart] == pytest.approx(left * alone[apart])
    assert (found.added[~np.array(apart)] == alone[~np.array(apart)]).all()


def test_on_a_cpu_nothing_runs_beside() -> None:
    """It has no streams: the reduction that a GPU hides behind its products takes its own time there."""
    step = step_of("llama", "full", engine="deepspeed-zero3")
    part = next(p for p, _ in step.parts() if p.runs is not None and p.phase == "backward")
    alone = durations(part.ops)
    on_gpu, on_cpu = (contention.beside_streams(part, alone, on) for on in (CUDA, profile.load("cpu-epyc-genoa-2c")))
    assert on_gpu.added.sum() < alone.sum()
    assert (on_cpu.added == alone).all()


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
    host = replace(DEFAULT, launch=0.0)
    time = step_time(step, CUDA, host)
    assert time.phases["total"] == pytest.approx(sum(n * host.dispatch(p, CUDA.kind).sum() for p, n in step.parts()))
    assert time.launch_bound_share == pytest.approx(1.0)
