"""A job on every device that could run it: what it takes, what has to be given up to fit, which is cheapest, fastest,
or cheapest before a deadline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from itertools import chain, product
from os import PathLike
from typing import Any

import numpy as np

from ... import units
from ...devices import profile
from ...devices.device import Device, GivenDevice, profile_of
from ...devices.host import GivenHost
from ...devices.profile import DeviceProfile
from ...errors import UserError, check_kind, check_number, one_of, one_or_several
from ...methods import Method
from ...prediction.given import setup_given
from ...prediction.predict import Model, Prediction, architecture_of, method_of
from ...recording.collector import no_collector
from ...recording.reuse import recalled
from ...setup import Setup
from ...shown import Shown
from ...today import today as date_of_today
from ..counts import Refused, possible
from ..knobs import in_half_of
from . import job as jobs
from .fitting import Fitting, Relaxation, tried
from .job import Job, JobCounts
from .prices import KINDS, GivenPrices, known_prices, price_of, typed_prices
from .runs import HOUR, PlannedRun, planned_run, seconds_of_job

Devices = GivenDevice | Sequence[GivenDevice]
Key = tuple[str, int, str]  # device, number of GPUs, method
Outcomes = dict[Key, PlannedRun | UserError | str]  # the run, or why there is none
TOGETHER = 16  # devices of a partition: a step is recorded once for all of them
TIE = 0.02  # of dollars or hours: what is closer than this is the same
TYPED = ("batch", "grad_accum")  # options that fix the micro-batch beside a global batch


@dataclass(frozen=True)
class Plan(Shown):
    """The answer of `plan`.

    Attributes:
        model: its name.
        methods: their specs, as they were asked for.
        job: what is trained.
        runs: one for each device, number of GPUs and method that fits, by dollars; what has no price comes last, by
            hours.
        left_out: device, number of GPUs, method -> why it is none of the runs.
        too_large: those of them that fit in none of the ways that were tried.
        dtype: that products were asked for in; a GPU without bf16 units takes fp16 in its place.
        deadline: hours, None for none.
        grid_co2: g of CO2 for a kWh, None if it was not given.
        today: that prices are as old as.
    """

    model: str
    methods: tuple[str, ...]
    job: Job
    runs: list[PlannedRun]
    left_out: dict[Key, str]
    too_large: frozenset[Key]
    dtype: str
    deadline: float | None
    grid_co2: float | None
    today: date

    def of(self, method: str | None = None) -> list[PlannedRun]:
        """The runs of a method that was asked for, QLoRA in its place included; of all if None."""
        if method is None:
            return self.runs
        return [run for run in self.runs if run.asked == method]

    def cheapest(self, method: str | None = None) -> list[PlannedRun]:
        """The run of least dollars, and those that cost the same to 2 %; nothing without prices."""
        return _best([run for run in self.of(method) if run.dollars is not None], _dollars, _hours)

    def fastest(self, method: str | None = None) -> list[PlannedRun]:
        """The run of least hours, and those that take as long to 2 %."""
        return _best(self.of(method), _hours, _dollars)

    def in_time(self, method: str | None = None) -> list[PlannedRun]:
        """The cheapest of those whose upper bound is before the deadline, with those that cost the same."""
        if self.deadline is None:
            return []
        before = [run for run in self.of(method) if run.interval[1] <= self.deadline * HOUR]
        return _best([run for run in before if run.dollars is not None], _dollars, _hours)

    @property
    def unpriced(self) -> list[str]:
        """Devices that fit and have no known price."""
        return list(dict.fromkeys(run.device for run in self.runs if run.price is None))

    def as_dict(self) -> dict[str, Any]:
        """The JSON of `plan` (SI units, bytes, USD)."""
        as_dict = partial(PlannedRun.as_dict, today=self.today, grid_co2=self.grid_co2)

        def named(runs: list[PlannedRun]) -> list[dict[str, Any]]:
            return [{"device": run.device, "gpus": run.gpus, "method": run.method} for run in runs]

        work = self.runs[0].work if self.runs else None
        return {
            "model": self.model,
            "methods": list(self.methods),
            "job": {
                **{name: getattr(self.job, name) for name in Job.__dataclass_fields__},
                **({} if work is None else {
                    "rows": work.rows, "tokens": work.tokens, "computed_tokens": work.computed,
                }),
            },
            "deadline_h": self.deadline,
            "cheapest": named(self.cheapest()), "fastest": named(self.fastest()), "in_time": named(self.in_time()),
            "runs": [as_dict(run) for run in self.runs],
            "left_out": [
                {"device": d, "gpus": n, "method": m, "why": why} for (d, n, m), why in self.left_out.items()
            ],
            "no_price": self.unpriced,
        }  # fmt: skip


def _dollars(run: PlannedRun) -> float:
    return float("inf") if run.dollars is None else run.dollars


def _hours(run: PlannedRun) -> float:
    return run.seconds


def _best(runs: list[PlannedRun], by: Any, then: Any) -> list[PlannedRun]:
    """The run that is least by one figure (by another one where several are), and those not to be told from it."""
    least = min(map(by, runs), default=None)
    alike = [] if least is None else [run for run in runs if by(run) <= least * (1 + TIE)]
    return sorted(alike, key=lambda run: (by(run), then(run)))


def planner_of(
    model: Model,
    methods: str | Method | Sequence[str | Method] = ("full", "lora"),
    setup: Setup | None = None,
    device: Devices | None = None,
    *,
    job: Job | None = None,
    global_batch: int | None = None,
    micro: bool | None = None,
    gpus: int | Sequence[int] | None = None,
    price: GivenPrices = (),
    price_kind: str = KINDS[0],
    deadline: float | None = None,
    node_power: float | None = None,
    grid_co2: float | None = None,
    today: date | None = None,
    host: GivenHost = "default",
    **options: Any,
) -> "Planner":
    """What plans a job; `perfmodel.plan` says what it takes and raises.

    Args:
        micro: whether the setup's micro-batch stays where a global batch is given; None: where it is typed.
    """
    about = {name: options.pop(name) for name in Job.__dataclass_fields__ if name in options}
    if about and job is not None:
        raise UserError(f"give a job, or {', '.join(about)} to make one: not both")
    job = Job(**about) if job is None else job
    check_kind("job", job, Job, "a Job; its fields go as options, such as samples=50_000")
    one_of("price_kind", price_kind, KINDS)
    _check(deadline=deadline, node_power=node_power, grid_co2=grid_co2)
    if micro is None:
        micro = setup is not None or any(name in options for name in TYPED)
    architecture = architecture_of(model)
    if gpus is None:
        gpus = setup_given(setup, {}).gpus

    def of_gpus(count: int) -> Setup:
        each = setup_given(setup, {**options, "gpus": count}, architecture)
        jobs.check_single(each)
        return jobs.with_global_batch(each, global_batch, micro=micro)

    counts = one_or_several("gpus", gpus, int)
    if not counts:
        raise UserError("gpus must be one number of GPUs or several, got none")
    setups, refused = possible(of_gpus, np.ravel(counts).tolist())
    given = one_or_several("methods", methods, (str, Method))
    bound = list({m.spec(): m for m in (method_of(method).bind(architecture) for method in given)}.values())
    if not given:
        raise UserError("a plan needs a method, such as lora:r=16")
    devices = tuple(planned_devices(device))
    typed = typed_prices(price, {on.slug for on in devices})
    planner = Planner(
        Fitting(architecture, host), job, tuple(setups.values()), devices, tuple(bound),
        price_kind, typed, node_power, deadline, grid_co2, today or date_of_today(), refused,
    )  # fmt: skip
    for each in planner.setups:  # a job that cannot be counted is refused before anything is predicted
        planner.work(each)
    return planner


def _check(**positive: float | None) -> None:
    for name, value in positive.items():
        if value is not None:
            check_number(name, value)
        if value is not None and not 0 <= value < float("inf"):
            raise UserError(f"{name} must be a number from 0, got {value}")


def planned_devices(device: Devices | None) -> list[DeviceProfile]:
    """The profiles of devices; of None all GPUs of the catalogue, own ones first.

    Raises:
        UserError: an unknown device, or an empty list.
    """
    if device is None:
        known = [*profile.own_profiles()[0], *map(profile.load, profile.names())]
        return [on for on in known if on.kind == "cuda"]
    found = one_or_several("device", device, (str, PathLike, DeviceProfile, Device))
    if not found:
        raise UserError("a plan needs a device; leave it out for all GPUs of the catalogue")
    return list({on.slug: on for on in map(profile_of, found)}.values())


def in_half_of_device(setup: Setup, on: DeviceProfile) -> Setup:
    """The setup in the 16-bit dtype that a GPU has units for, where it has none for bf16."""
    return replace(setup, **in_half_of(on.hardware.half, setup).setup)


@dataclass
class Planner:
    """Plans a job: what its runs have in common.

    Attributes:
        setups: one for each number of GPUs.
        refused: numbers of GPUs that are none of the setups.
    """

    fitting: Fitting
    job: Job
    setups: tuple[Setup, ...]
    devices: tuple[DeviceProfile, ...]
    methods: tuple[Method, ...]
    kind: str
    typed: Mapping[str, float]
    node: float | None
    deadline: float | None
    grid_co2: float | None
    today: date
    refused: Refused

    def __post_init__(self) -> None:
        self.counted: dict[tuple[Any, ...], JobCounts] = {}
        self.prices = known_prices()

    def work(self, setup: Setup) -> JobCounts:
        """The job in numbers, which hang on the micro-batch and the GPUs."""
        sizes = setup.batch, setup.grad_accum, setup.gpus
        return recalled(self.counted, sizes, partial(jobs.job_counts, self.job, setup))

    def question(self) -> dict[str, Any]:
        """What is searched for, in plain values: planners of one question find the same."""
        from ..asked import plain_question

        return plain_question(
            "plan", self.fitting.architecture, self.methods, self.setups[0], self.fitting.host,
            [(on, int(setup.gpus)) for setup in self.setups for on in self.devices], job=repr(self.job),
            sizes=[(setup.gpus, setup.batch, setup.grad_accum) for setup in self.setups],
            devices_of_a_partition=TOGETHER,
        )  # fmt: skip

    def plan(self, outcomes: Outcomes | None = None) -> Plan:
        """The plan.

        Args:
            outcomes: of each device, number of GPUs and method, where they are known already.

        Raises:
            UserError: no device takes any of the methods, for the reason of the first.
        """
        each = (self.outcomes(setup, self.devices, self.methods) for setup in self.setups)
        found = dict(chain.from_iterable(of.items() for of in each)) if outcomes is None else outcomes
        refused = [outcome for outcome in found.values() if isinstance(outcome, UserError)]
        if refused and len(refused) == len(found):
            raise refused[0]
        places = product(self.refused, self.devices, self.methods)
        found |= {(on.slug, gpus, m.spec()): self.refused[gpus] for gpus, on, m in places}
        too_large = frozenset(key for key, outcome in found.items() if isinstance(outcome, str))
        found = {key: self._once(outcome) for key, outcome in found.items()}
        runs = [outcome for outcome in found.values() if isinstance(outcome, PlannedRun)]
        return Plan(
            model=self.fitting.architecture.name,
            methods=tuple(m.spec() for m in self.methods),
            job=self.job,
            runs=sorted(runs, key=lambda run: (_dollars(run), run.seconds)),
            dtype=self.setups[0].computes_in,
            left_out={key: str(why) for key, why in found.items() if not isinstance(why, PlannedRun)},
            too_large=too_large,
            deadline=self.deadline,
            grid_co2=self.grid_co2,
            today=self.today,
        )

    def _once(self, outcome: PlannedRun | UserError | str) -> PlannedRun | UserError | str:
        """The outcome, but why there is none where it is that of another method that was asked for."""
        if not isinstance(outcome, PlannedRun) or (ran := outcome.method) == outcome.asked:
            return outcome
        known = ran in {m.spec() for m in self.methods}
        return f"fits as {ran}, which is asked for, too" if known else outcome

    def outcomes(self, setup: Setup, devices: Sequence[DeviceProfile], methods: Sequence[Method]) -> Outcomes:
        """What becomes of each method on each device, on as many GPUs as a setup has."""
        gpus = int(setup.gpus)
        with no_collector():
            return {
                (on.slug, gpus, method.spec()): self.outcome(setup, on, method) for on in devices for method in methods
            }

    def outcome(self, setup: Setup, on: DeviceProfile, method: Method) -> PlannedRun | UserError | str:
        """The run of a method on a device, or why there is none: an error where it is refused."""
        try:
            run = self.on(setup, on, method)
        except UserError as error:
            return error
        if run is None:
            least = self.fitting.least(in_half_of_device(setup, on), method, on)
            under = f" under {setup.parallel}" if int(setup.gpus) > 1 else ""
            return f"needs {units.nbytes(least)} at least{under}, having tried {tried(method)}"
        return run

    def on(self, setup: Setup, on: DeviceProfile, method: Method) -> PlannedRun | None:
        """The run of a method on a device; None if nothing fits."""

        def seconds(p: Prediction) -> float:
            return sum(seconds_of_job(self.job, self.work(p.setup), p).values())

        found = self.fitting.best(in_half_of_device(setup, on), method, on, seconds)
        if found is None:
            return None
        return self.run(on, method, *found)

    def run(self, on: DeviceProfile, method: Method, relaxation: Relaxation, p: Prediction) -> PlannedRun:
        """The run of a prediction."""
        return planned_run(
            p, on, self.job, self.work(p.setup), asked=method.spec(), given_up=relaxation.given_up,
            price=price_of(on.slug, self.kind, self.typed, self.prices), node=self.node,
        )  # fmt: skip
