"""A cell as it was measured, beside what the model predicts of it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from perfmodel.prediction.predict import Prediction, predict

from ..accuracy import Pair, paired
from ..measuring.cells import Cell
from ..measuring.names import short, unified
from ..measuring.records import Record
from .counted import Counts, Difference, as_counts, calls_of, collectives_of, differences, kernels_of
from .machine import Machine
from .ranks import Sharing


@dataclass(frozen=True)
class Measured:
    """All visits of one cell in one environment.

    Attributes:
        environment: id of the environment's record.
        status: ok, oom or error; of the visit that went furthest.
        seconds: phase or `step` -> every timed step of every visit.
        peak: highest live bytes on the device; 0 if no visit came to an end.
        calls: non-view ATen calls by phase and name; empty if no visit counted them.
        kernels: device kernels by phase and by the ATen call that launched them; empty on a CPU.
        traced: calls and kernels of a trace of the installed program, where it may be another than the tape's.
        shared: how several processes shared the step; None: it was of one.
    """

    cell: Cell
    environment: str
    status: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak: int = 0
    calls: Counts = field(default_factory=dict)
    kernels: Counts = field(default_factory=dict)
    traced: dict[str, Counts] = field(default_factory=dict)
    shared: Sharing | None = None

    @property
    def place(self) -> str:
        """Model and setup in words: what all methods of a group share."""
        return f"{self.cell.place} {self.shared.name}" if self.shared else self.cell.place

    @property
    def name(self) -> str:
        """The cell in words."""
        return f"{self.cell.name} {self.shared.name}" if self.shared else self.cell.name

    def median(self, what: str) -> float:
        """Median seconds of a phase or of the step."""
        return median(self.seconds[what])


def cells_of(records: Iterable[Record]) -> list[Measured]:
    """The measured cells of a file, visits of a cell in one environment taken together."""
    visits: dict[tuple[str, str], list[Record]] = {}
    for r in records:
        if r["kind"] == "visit":
            visits.setdefault((r["environment"], r["id"]), []).append(r)
    return [_together(environment, members) for (environment, _), members in visits.items()]


def _together(environment: str, visits: list[Record]) -> Measured:
    cell = Cell.from_dict(visits[0]["cell"])
    good = [r for r in visits if r["status"] == "ok"]
    shared = Sharing.of(good or visits)
    if not good:
        worst = "error" if any(r["status"] == "error" for r in visits) else "oom"
        return Measured(cell, environment, worst, shared=shared)
    seconds = {name: [s for r in good for s in r["seconds"][name]] for name in good[0]["seconds"]}
    peak = max(r["memory"]["peak"] for r in good)
    calls: Counts = next((r["calls"] for r in good if "calls" in r), {})
    by_call: dict[str, Any] = next((r["profile"]["by_call"] for r in good if "by_call" in r.get("profile", {})), {})
    kernels = {phase: {name: n for name, (n, _) in table.items()} for phase, table in by_call.items()}
    traced: dict[str, Counts] = next((r["traced"] for r in good if "traced" in r), {})
    return Measured(cell, environment, "ok", seconds, peak, calls, kernels, traced, shared)


@dataclass(frozen=True)
class CellOutcome:
    """A measured cell with its prediction; errors are signed and relative to what was measured."""

    measured: Measured
    predicted: Prediction
    calls: list[Difference]
    kernels: list[Difference]
    messages: list[Difference] = field(default_factory=list)

    @property
    def differences(self) -> list[Difference]:
        """All numbers that are not as predicted."""
        return [*self.calls, *self.kernels, *self.messages]

    @property
    def counted(self) -> bool:
        """Whether anything of it was counted; a compiled step's calls are not."""
        return bool(self.measured.calls or self.measured.kernels or self.measured.traced)

    @property
    def communication(self) -> float:
        """Predicted share of the step in which a collective is under way."""
        sent = self.predicted.time.communication
        return float((sent.exposed["total"] + sent.hidden["total"]) / self.predicted.time.phases["total"])

    @property
    def seconds(self) -> float:
        """Measured seconds of a step."""
        return self.measured.median("step")

    @property
    def predicted_seconds(self) -> float:
        """Predicted seconds of a step."""
        return float(self.predicted.time.phases["total"])

    @property
    def slack(self) -> float:
        """Measured times are not rounded."""
        return 0.0

    @property
    def error(self) -> float:
        """Of the step's time."""
        return self.predicted_seconds / self.seconds - 1

    @property
    def memory_error(self) -> float:
        """Of peak memory."""
        return float(self.predicted.memory.peak) / self.measured.peak - 1

    @property
    def inside(self) -> bool:
        """Whether the measured time lies in the predicted interval."""
        return bool(self.predicted.time.low <= self.seconds <= self.predicted.time.high)

    def phase_error(self, phase: str) -> float:
        """Of one phase's time."""
        return float(self.predicted.time.phases[phase]) / self.measured.median(phase) - 1


def evaluate_cell(measured: Measured, machine: Machine) -> CellOutcome:
    """Predict a cell that was measured to its end, under the versions of the software that measured it.

    Raises:
        UserError: several processes shared a step that cannot be predicted.
    """
    cell, shared = measured.cell, measured.shared
    setup = replace(cell.setup, stack=machine.stack)
    setup = shared.setup(setup, machine) if shared else setup
    p = predict(cell.config, cell.method, setup, machine.on, host=machine.by)
    assert p.step is not None  # a cell is one setup, not a grid
    traced = measured.traced  # of the installed program, if the tape may have been written for another
    calls, kernels = measured.calls, measured.kernels if cell.setup.compile == "none" else {}
    on_tape = shared.calls(calls_of(p.step)) if shared else calls_of(p.step)
    sent = shared.messages if shared else {}
    return CellOutcome(
        measured,
        p,
        differences(calls, traced.get("calls") or on_tape, unified) if calls else [],
        differences(kernels, traced.get("kernels") or kernels_of(p.step), short) if kernels else [],
        differences(as_counts(sent), as_counts(collectives_of(p.step))) if sent else [],
    )


def cell_pairs(outcomes: Sequence[CellOutcome]) -> list[Pair[CellOutcome]]:
    """Every method with full fine-tuning of the same model in the same setup and environment."""

    def group(o: CellOutcome) -> tuple[str, str, str]:
        m = o.measured
        return m.environment, m.cell.group, m.shared.name if m.shared else ""

    return paired(outcomes, group, lambda o: o.measured.cell.method)
