"""What a check found in all: errors by group of cells, and the limits that predictions must keep."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from perfmodel.program.part import PHASES

from ..accuracy import BASELINE, Errors, Pair
from .outcomes import CellOutcome, Measured, cell_pairs

STEP_MEAN, STEP_MEDIAN, RATIO_MEAN, MEMORY_WORST = 0.15, 0.10, 0.08, 0.05  # largest |relative errors| that pass


@dataclass(frozen=True)
class Limit:
    """One promise: a figure and the most that it may be; counts are whole numbers, errors are shares."""

    name: str
    value: float
    most: float

    @property
    def holds(self) -> bool:
        """Whether the figure keeps the limit; one that could not be computed does not."""
        return self.value <= self.most

    @property
    def is_count(self) -> bool:
        """Whether the figure counts cells."""
        return self.most == 0


@dataclass(frozen=True)
class Line:
    """Errors of some cells that belong together."""

    name: str
    step: Errors
    phases: dict[str, Errors]
    ratio: Errors
    verdicts: tuple[int, int]  # right, of those that the measurement decides
    memory: Errors
    inside: float
    counts_differ: int
    counted: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values; what no cell can tell is None."""
        return {
            "cells": self.name, "step": _plain(self.step), "phases": {p: _plain(e) for p, e in self.phases.items()},
            "ratio": _plain(self.ratio), "verdicts": {"right": self.verdicts[0], "decided": self.verdicts[1]},
            "memory": _plain(self.memory), "in_interval": self.inside, "counts_differ": self.counts_differ,
            "counted": self.counted,
        }  # fmt: skip


def _plain(errors: Errors) -> dict[str, Any] | None:
    return asdict(errors) if errors.number else None


def line(name: str, outcomes: Sequence[CellOutcome], of_pairs: Sequence[Pair[CellOutcome]]) -> Line:
    """The errors of some cells and of some speed-ups."""
    clear = [p for p in of_pairs if p.decided]
    return Line(
        name,
        step=Errors.of(o.error for o in outcomes),
        phases={p: Errors.of(o.phase_error(p) for o in outcomes) for p in PHASES},
        ratio=Errors.of(p.error for p in of_pairs),
        verdicts=(sum(p.right for p in clear), len(clear)),
        memory=Errors.of(o.memory_error for o in outcomes),
        inside=sum(o.inside for o in outcomes) / len(outcomes),
        counts_differ=sum(bool(o.differences) for o in outcomes),
        counted=sum(o.counted for o in outcomes),
    )


def lines(outcomes: Sequence[CellOutcome]) -> list[Line]:
    """By method, model, dtype and how processes shared a step where there are several, and all."""
    ratios = cell_pairs(outcomes)
    found = []
    keys: tuple[Callable[[CellOutcome], str], ...] = (_method, _model, _dtype, _sharing)
    for key in keys:
        names = list(dict.fromkeys(map(key, outcomes)))
        for name in names if len(names) > 1 else []:
            members, of = [o for o in outcomes if key(o) == name], [p for p in ratios if key(p.other) == name]
            found.append(line(name, members, of))
    return [*found, line("all", outcomes, ratios)]


def _method(o: CellOutcome) -> str:
    return o.measured.cell.method


def _model(o: CellOutcome) -> str:
    return o.measured.cell.config.name


def _dtype(o: CellOutcome) -> str:
    setup = o.measured.cell.setup
    return f"autocast {setup.amp}" if setup.amp else setup.dtype


def _sharing(o: CellOutcome) -> str:
    return o.measured.shared.name if o.measured.shared else ""


def promises(cells: Sequence[Measured], outcomes: Sequence[CellOutcome]) -> list[Limit]:
    """The promises, with what the records say of them."""
    found = [Limit("cells that failed", sum(c.status == "error" for c in cells), 0)]
    if not any(c.status == "ok" for c in cells):
        found.append(Limit("cells, none of which came to its end", max(1, len(cells)), 0))
    if not outcomes:
        return found
    total = line("all", outcomes, cell_pairs(outcomes))
    if any(o.counted for o in outcomes):
        found.append(Limit("cells whose ATen calls differ", sum(bool(o.calls) for o in outcomes), 0))
    if any(o.measured.kernels for o in outcomes):
        found.append(Limit("cells whose kernels differ", sum(bool(o.kernels) for o in outcomes), 0))
    if any(o.measured.shared for o in outcomes):
        found.append(Limit("cells whose collectives or their bytes differ", sum(bool(o.messages) for o in outcomes), 0))
    found += [
        Limit("step time, mean error", total.step.mean, STEP_MEAN),
        Limit("step time, median error", total.step.median, STEP_MEDIAN),
        Limit("peak memory, worst error", total.memory.worst, MEMORY_WORST),
    ]
    if total.ratio.number:
        right, decided = total.verdicts
        found += [
            Limit(f"ratio to {BASELINE}, mean error", total.ratio.mean, RATIO_MEAN),
            Limit("wrong verdicts where the difference exceeds 10 %", decided - right, 0),
        ]
    return found
