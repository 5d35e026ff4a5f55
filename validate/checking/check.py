"""`perfmodel validate check`: read records, predict every cell, compare."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from perfmodel.errors import UserError

from ..accuracy import Pair
from ..measuring import records
from ..measuring.records import Record
from .machine import Machine, machine_of
from .outcomes import CellOutcome, Measured, cell_pairs, cells_of, evaluate_cell
from .summary import Limit, Line, lines, promises

Progress = Callable[[int, int, str], None]
SEVERAL = "several processes"


@dataclass(frozen=True)
class Report:
    """A check that was done.

    Attributes:
        environments: id of an environment -> its record.
        machines: id of an environment -> what predicted its records.
        cells: every measured cell, those that failed or ran out of memory too.
        outcomes: of the cells that one process ran.
        shared: of those that several processes ran.
        unpredicted: cells of several processes, each with the reason why it cannot be predicted.
    """

    environments: dict[str, Record]
    machines: dict[str, Machine]
    cells: list[Measured]
    outcomes: list[CellOutcome]
    shared: list[CellOutcome] = field(default_factory=list)
    unpredicted: list[tuple[Measured, str]] = field(default_factory=list)

    @property
    def every(self) -> list[CellOutcome]:
        """Outcomes of one process and of several."""
        return [*self.outcomes, *self.shared]

    @property
    def pairs(self) -> list[Pair[CellOutcome]]:
        """All speed-ups over full fine-tuning, each of as many processes."""
        return cell_pairs(self.every)

    @property
    def lines(self) -> list[Line]:
        """Errors by method, model and in all; none without an outcome."""
        return lines(self.outcomes) if self.outcomes else []

    @property
    def shared_lines(self) -> list[Line]:
        """The same of several processes, by how they shared a step too."""
        return lines(self.shared) if self.shared else []

    @property
    def limits(self) -> list[Limit]:
        """The promises, for one process and for several."""
        alone, together = ([c for c in self.cells if bool(c.shared) == several] for several in (False, True))
        found = promises(alone, self.outcomes) if alone else []
        of_several = promises(together, self.shared) if together else []
        return [*found, *(replace(limit, name=f"{SEVERAL}: {limit.name}") for limit in of_several)]

    @property
    def holds(self) -> bool:
        """Whether all promises are kept."""
        return all(limit.holds for limit in self.limits)

    def as_dict(self) -> dict[str, Any]:
        """The JSON of `validate check`."""
        return {
            "holds": self.holds,
            "machines": [
                {"environment": name, "device": m.on.slug, "host": m.by.name, **({"node": m.node} if m.node else {})}
                for name, m in self.machines.items()
            ],
            "limits": [{"name": x.name, "value": x.value, "limit": x.most, "holds": x.holds} for x in self.limits],
            "summary": [line.as_dict() for line in self.lines],
            "summary_of_several": [line.as_dict() for line in self.shared_lines],
            "cells": [_cell(o) for o in self.every],
            "not_measured": [
                {"id": c.cell.id, "environment": c.environment, "status": c.status}
                for c in self.cells
                if c.status != "ok"
            ],
            "not_predicted": [
                {"id": c.cell.id, "environment": c.environment, **_of_several(c), "why": why}
                for c, why in self.unpredicted
            ],
        }  # fmt: skip


def _of_several(c: Measured) -> dict[str, Any]:
    return {"parallel": c.shared.kind, "processes": c.shared.processes} if c.shared else {}


def _cell(o: CellOutcome) -> dict[str, Any]:
    told = _of_several(o.measured)
    if o.measured.shared:
        told |= {"communication_share": o.measured.shared.communication, "predicted_share": o.communication}
    return {
        "id": o.measured.cell.id, "environment": o.measured.environment, "measured_s": o.seconds,
        "predicted_s": o.predicted_seconds, "error": o.error, "in_interval": o.inside,
        "phase_errors": {phase: o.phase_error(phase) for phase in ("forward", "backward", "optimizer")},
        "peak_bytes": o.measured.peak, "predicted_peak_bytes": int(o.predicted.memory.peak),
        "memory_error": o.memory_error,
        "differences": [vars(d) for d in o.differences], **told,
    }  # fmt: skip


def check_records(
    paths: Sequence[Path],
    *,
    device: str | None = None,
    host: str | None = None,
    node: str | None = None,
    progress: Progress = lambda done, total, label: None,
) -> Report:
    """Compare the records of some files with predictions.

    Args:
        device, host, node: what to predict with (see `machine_of`).

    Raises:
        UserError: a file that cannot be read or holds no visits; no profile for the machine that measured; nothing that
            can be predicted.
    """
    found = [r for path in paths for r in records.read_records(path)]
    environments = {r["id"]: r for r in found if r["kind"] == "environment"}
    cells = cells_of(found)
    if not cells:
        raise UserError(f"{', '.join(map(str, paths))}: no measured cells to check")
    machines = {}
    for name in dict.fromkeys(c.environment for c in cells):
        if name not in environments:
            raise UserError(f"{', '.join(map(str, paths))}: no record of environment {name!r}, which cells name")
        machines[name] = machine_of(environments[name], device, host, node)
    report = Report({name: environments[name] for name in machines}, machines, cells, [])
    done = [c for c in cells if c.status == "ok"]
    for i, cell in enumerate(done):
        progress(i, len(done), cell.cell.id)
        try:
            outcome = evaluate_cell(cell, machines[cell.environment])
        except UserError as fault:
            if cell.shared is None:
                raise
            report.unpredicted.append((cell, str(fault)))
        else:
            (report.shared if cell.shared else report.outcomes).append(outcome)
    progress(len(done), len(done), "done")
    if report.unpredicted and not report.every:
        raise UserError(f"{', '.join(map(str, paths))}: {report.unpredicted[0][1]}")
    return report
