"""Goes through a plan within a budget: resumes, skips what cannot run, bounds what hangs, records every unit whole."""

import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch

from perfmodel.devices.profile import DeviceProfile
from perfmodel.errors import UserError

from ..checking.machine import name_of
from ..measuring import environment, records
from ..measuring.records import Record
from ..measuring.run import load_modules
from . import versions
from .guide import expected, guide, memory_of
from .ledger import Ledger
from .plan import CampaignPlan, HostProgram, Unit, Visit
from .work import HERE, Settings, worker_of
from .worker import Worker, WorkTimeout

Progress = Callable[[float, str], None]  # share of the budget that is spent, what comes next

FILE = "records.jsonl"
RESERVE, MOST_RESERVE = 0.15, 60.0  # of the budget, and seconds, that are kept for the fit and the page
START = 120.0  # s: the longest that a worker may take to say where it runs
QUICK = {"host": 1.5, "microbench": 0.4}  # s: what a unit takes before any was timed
BUILDING = {"cuda": 12.0, "cpu": 2.0}  # s of a visit besides its steps: building, counting, profiling
COMPILING = 90.0  # s that torch.compile takes
PROFILED = 4.0  # steps that counting and profiling take
SLOWEST, GRACE = 4.0, 20.0  # a unit may take so many times what was expected, and so many seconds more
OVERTIME = 10.0  # s: a unit that was begun in time may take so much longer than the budget
LATEST = 9  # units of a kind whose pace tells that of the next
PACES = (0.1, 5.0)  # least and most that a pace corrects
NO_TIME = "no time left"


@dataclass
class CampaignRun:
    """What a call of the campaign did.

    Attributes:
        environment: the record of where it ran.
        units: all of the plan, in order.
        open: unit -> why it was not measured although it was its turn: too large, a package is missing, no time left.
        seconds: how long the units took.
    """

    environment: Record
    units: list[Unit]
    ledger: Ledger
    open: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def left(self) -> list[Unit]:
        """Units that wait for another call."""
        done = self.ledger.done
        return [u for u in self.units if u.id not in done]


def run_campaign(
    plan: CampaignPlan, device: str, folder: Path, seconds: float, *, threads: int | None = None,
    progress: Progress = lambda share, label: None,
) -> CampaignRun:  # fmt: skip
    """Measure for so many seconds, less what the fit will need, and record what came of it in `folder`.

    Raises:
        UserError: no such device here, a folder that cannot be written, holds another machine's campaign, or is being
            written to by another one.
    """
    begin = time.perf_counter()
    end = begin + seconds - min(MOST_RESERVE, RESERVE * seconds)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror})") from None
    path = folder / FILE
    settings = Settings(
        device, threads or torch.get_num_threads(), plan.warm_up, plan.steps, traced=bool(versions.other())
    )
    with records.only_writer(path):
        ledger = Ledger(path)
        worker = Worker(worker_of(settings))
        try:
            progress(0.0, "loading")
            here = _here(worker, ledger, plan)
            on = guide(here)
            ran = CampaignRun(here, plan.units(device, on), ledger)
            _Turn(ran, worker, settings, on, begin, end, progress).all()
        finally:
            worker.close()
            ledger.flush()
    ran.seconds = time.perf_counter() - begin
    return ran


def _here(worker: Worker, ledger: Ledger, plan: CampaignPlan) -> Record:
    """The environment's record, appended if the file does not hold the like yet.

    Raises:
        UserError: no such device, or the records are of another machine.
    """
    try:
        found = worker(HERE, START)
    except WorkTimeout:
        raise UserError(f"the device did not answer within {START:.0f} s") from None
    if "kind" not in found:
        raise UserError(str(found["message"]).removeprefix("UserError: "))
    for before in (r for r in ledger.records if r["kind"] == "environment"):
        if (was := _in_words(before)) != _in_words(found):
            raise UserError(f"{ledger.path}: holds the campaign of {was}: name another --output here")
        if before["id"] == found["id"]:
            return before
    record = {**found, "plan": plan.name, "started": round(time.time(), 1)}
    ledger.keep(record, now=True)
    return record


def _in_words(here: Record) -> str:
    """What the units of one campaign, and so the rows of its fit, have in common."""
    host, torch_version = here["host"], here["software"].get("torch")
    beside = f" beside a {host.get('cpu')}" if here["device"] == "cuda" else ""
    return f"{name_of(here)}{beside} with {host.get('threads')} threads, torch {torch_version}"


@dataclass
class _Turn:
    """One call's way through the units."""

    ran: CampaignRun
    worker: Worker
    settings: Settings
    on: DeviceProfile
    begin: float
    end: float
    progress: Progress
    loaded: set[str] = field(default_factory=set)
    predicted: dict[str, tuple[float, float]] = field(default_factory=dict)
    pace: dict[str, deque[float]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=LATEST)))

    def all(self) -> None:
        """Every unit that is not done, until the time is over."""
        for r in self.ran.ledger.records:
            if "elapsed_s" in r:
                self.pace[r["kind"]].append(r["elapsed_s"] / r["expected_s"])
        done = self.ran.ledger.done
        for unit in self.ran.units:
            if unit.id in done:
                continue
            now = time.perf_counter()
            self.progress(min(1.0, (now - self.begin) / (self.end - self.begin)), unit.id)
            if now >= self.end:
                self.ran.open[unit.id] = NO_TIME
            elif hindrance := self._hindrance(unit):
                status, message = hindrance
                self.ran.open[unit.id] = message
                self.ran.ledger.keep_once({**self._head(unit), "status": status, "message": message})
            else:
                self._begin(unit)

    def _begin(self, unit: Unit) -> None:
        """Do a unit if it is expected to fit into the time that is left."""
        self._prepare(unit)
        expects = self._expects(unit)
        guess = expects * self._correction(unit)
        left = self.end - time.perf_counter()
        if guess > left:
            self.ran.open[unit.id] = NO_TIME
            return
        allowed = SLOWEST * guess + GRACE
        start = time.perf_counter()
        try:
            found = self.worker(unit.work, min(allowed, left + OVERTIME))
        except WorkTimeout:
            if allowed > left + OVERTIME:  # the budget's end came first: it has its turn in another call
                self.ran.open[unit.id] = NO_TIME
                return
            found = {"status": "late", "message": f"ended after {allowed:.0f} s: expected {guess:.0f} s"}
        took = time.perf_counter() - start
        self._keep(unit, found, {"expected_s": round(expects, 3), "elapsed_s": round(took, 3)})

    def _prepare(self, unit: Unit) -> None:
        """Before the first visit of a stage on a CPU, load what its programs need: every visit has a new process."""
        if isinstance(unit.work, Visit) and self.settings.device == "cpu" and unit.stage not in self.loaded:
            self.loaded.add(unit.stage)
            self.worker.close()
            load_modules([u.work.cell for u in self.ran.units if u.stage == unit.stage and isinstance(u.work, Visit)])

    def _keep(self, unit: Unit, found: Record, times: Record) -> None:
        """Record a unit; a visit whose process died is one that failed."""
        visit = unit.work if isinstance(unit.work, Visit) else None
        if visit and "kind" not in found and found["status"] in records.STOPPED:
            found = {**visit.head(), **found}
        self.ran.ledger.keep({**self._head(unit), **found, **times}, now=visit is not None)
        self.pace[_kind(unit)].append(times["elapsed_s"] / times["expected_s"])
        failed = found.get("status", "ok") != "ok"
        if (visit and self.settings.device == "cpu") or failed:
            self.worker.close()  # a visit on a CPU starts from the same heap; a failure may have spoilt a GPU's context

    def _head(self, unit: Unit) -> Record:
        return {"kind": "unmeasured", "unit": unit.id, "stage": unit.stage, "environment": self.ran.environment["id"]}

    def _hindrance(self, unit: Unit) -> tuple[str, str] | None:
        """(status, reason) of a unit that cannot run here as things are."""
        missing = [name for name in unit.needs if find_spec(name) is None]
        if missing:
            return "missing", f"{', '.join(missing)} not installed"
        if not isinstance(unit.work, Visit):
            return None
        setup = unit.work.cell.setup
        if self.settings.device == "cpu" and "bf16" in (setup.dtype, setup.amp) and not environment.native_bf16():
            return "skipped", "this CPU does not compute bf16 natively"
        try:
            peak = self._prediction(unit.work)[1]
        except UserError as error:
            return "skipped", str(error)
        most = memory_of(self.ran.environment)
        if peak > most:
            return "skipped", f"needs {peak / 1e9:.1f} GB by prediction, there are {most / 1e9:.1f} GB"
        return None

    def _prediction(self, visit: Visit) -> tuple[float, float]:
        """Predicted seconds of a step, and bytes at its peak."""
        if visit.cell.id not in self.predicted:
            self.predicted[visit.cell.id] = expected(visit.cell, self.on)
        return self.predicted[visit.cell.id]

    def _expects(self, unit: Unit) -> float:
        """Seconds that a unit should take, before any of its kind was timed."""
        if not isinstance(unit.work, Visit):
            return QUICK[_kind(unit)]
        steps = self.settings.warm_up + self.settings.steps + PROFILED
        compiling = COMPILING if unit.work.cell.setup.compile != "none" else 0.0
        return BUILDING[self.settings.device] + compiling + steps * self._prediction(unit.work)[0]

    def _correction(self, unit: Unit) -> float:
        """How much longer the last units of its kind took than they should."""
        least, most = PACES
        seen = self.pace[_kind(unit)]
        return min(most, max(least, median(seen))) if seen else 1.0


def _kind(unit: Unit) -> str:
    """The kind of record that a unit leaves."""
    if isinstance(unit.work, Visit):
        return "visit"
    return "host" if isinstance(unit.work, HostProgram) else "microbench"
