"""`perfmodel validate check`: read records, predict every cell, compare."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Report:
    """A check that was done.

    Attributes:
        environments: id of an environment -> its record.
        machines: id of an environment -> what predicted its records.
        cells: every measured cell, those that failed or ran out of memory too.
    """

    environments: dict[str, Record]
    machines: dict[str, Machine]
    cells: list[Measured]
    outcomes: list[CellOutcome]

    @property
    def pairs(self) -> list[Pair[CellOutcome]]:
        """All speed-ups over full fine-tuning."""
        return cell_pairs(self.outcomes)

    @property
    def lines(self) -> list[Line]:
        """Errors by method, model and in all; none without an outcome."""
        return lines(self.outcomes) if self.outcomes else []

    @property
    def limits(self) -> list[Limit]:
        """The promises."""
        return promises(self.cells, self.outcomes)

    @property
    def holds(self) -> bool:
        """Whether all promises are kept."""
        return all(limit.holds for limit in self.limits)

    def as_dict(self) -> dict[str, Any]:
        """The JSON of `validate check`."""
        return {
            "holds": self.holds,
            "machines": [
                {"environment": name, "device": m.on.slug, "host": m.by.name} for name, m in self.machines.items()
            ],
            "limits": [{"name": x.name, "value": x.value, "limit": x.most, "holds": x.holds} for x in self.limits],
            "summary": [line.as_dict() for line in self.lines],
            "cells": [_cell(o) for o in self.outcomes],
            "not_measured": [
                {"id": c.cell.id, "environment": c.environment, "status": c.status}
                for c in self.cells
                if c.status != "ok"
            ],
        }  # fmt: skip


def _cell(o: CellOutcome) -> dict[str, Any]:
    return {
        "id": o.measured.cell.id, "environment": o.measured.environment, "measured_s": o.seconds,
        "predicted_s": o.predicted_seconds, "error": o.error, "in_interval": o.inside,
        "phase_errors": {phase: o.phase_error(phase) for phase in ("forward", "backward", "optimizer")},
        "peak_bytes": o.measured.peak, "predicted_peak_bytes": int(o.predicted.memory.peak),
        "memory_error": o.memory_error,
        "differences": [vars(d) for d in (*o.calls, *o.kernels)],
    }  # fmt: skip


def check_records(
    paths: Sequence[Path],
    *,
    device: str | None = None,
    host: str | None = None,
    progress: Progress = lambda done, total, label: None,
) -> Report:
    """Compare the records of some files with predictions.

    Args:
        device, host: what to predict with (see `machine_of`).

    Raises:
        UserError: a file that cannot be read or holds no visits; no profile for the machine that measured.
    """
    found = [r for path in paths for r in records.read_records(path)]
    environments = {r["id"]: r for r in found if r["kind"] == "environment"}
    cells = [c for c in cells_of(found) if not c.parallel]
    if not cells:
        raise UserError(f"{', '.join(map(str, paths))}: no measured cells of one device to check")
    machines = {}
    for name in dict.fromkeys(c.environment for c in cells):
        if name not in environments:
            raise UserError(f"{', '.join(map(str, paths))}: no record of environment {name!r}, which cells name")
        machines[name] = machine_of(environments[name], device, host)
    outcomes = []
    done = [c for c in cells if c.status == "ok"]
    for i, cell in enumerate(done):
        progress(i, len(done), cell.cell.id)
        outcomes.append(evaluate_cell(cell, machines[cell.environment]))
    progress(len(done), len(done), "done")
    return Report({name: environments[name] for name in machines}, machines, cells, outcomes)
