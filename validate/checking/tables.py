"""The tables of a check as rows of text, for the terminal and the page."""

from collections import Counter
from collections.abc import Iterable

from perfmodel import units
from perfmodel.prediction.placed import placed
from perfmodel.program.part import PHASES

from ..accuracy import Pair
from .check import Report
from .machine import name_of
from .outcomes import CellOutcome, Measured
from .ranks import Sharing
from .summary import Limit, Line

CELL_COLUMNS = ("", "step", "predicted", "error", "speed-up", "predicted", "memory", "")
LINE_COLUMNS = ("cells", "", "step", "median", "p90", "ratio", "verdicts", "memory", "calls")
PHASE_COLUMNS = ("cells", *PHASES, "step in its interval")
DIFFERENCE_COLUMNS = ("phase", "call", "cells", "measured - predicted")
LIMIT_COLUMNS = ("", "found", "limit", "")
SHARED_COLUMNS = ("", "collectives", "bytes", "", "share", "predicted")  # the share of the step that they take
UNPREDICTED_COLUMNS = ("cells", "")
Rows = list[list[str]]


def verdict_line(found: Report) -> str:
    """The answer in one sentence."""
    exceeded = [limit.name for limit in found.limits if not limit.holds]
    what = f"{len(found.every)} cells and {len(found.pairs)} speed-ups checked"
    what += f", {len(found.unpredicted)} cells not predicted" if found.unpredicted else ""
    return f"{what}: all limits hold" if not exceeded else f"{what}. Over the limit: {'; '.join(exceeded)}"


def machine_lines(found: Report, environment: str) -> list[str]:
    """Where an environment's records come from, whose figures predict them, what to know of their times."""
    machine, record = found.machines[environment], found.environments[environment]
    several = [o.predicted.setup for o in found.shared if o.measured.environment == environment]
    nodes = dict.fromkeys(placed(setup, machine.on).node.file.slug for setup in several)
    figures = [f"device {machine.on.slug}", f"host {machine.by.name}", *(f"node {node}" for node in nodes)]
    lines = [f"records of {name_of(record)}", f"predicted with {', '.join(figures)}"]
    load, cores = (record["host"].get(name) for name in ("load", "cores"))
    by_the_wall = several and machine.on.kind == "cpu" and isinstance(load, float) and isinstance(cores, int)
    if by_the_wall and load > cores:
        lines.append(f"load {load:.1f} on {cores} cores as it began: times of several processes hold what else ran")
    return lines


def unmeasured_rows(cells: Iterable[Measured]) -> Rows:
    """Cells that did not run to their end, and why."""
    told = {"oom": "out of memory", "error": "failed"}
    return [[c.name, told[c.status]] for c in cells if c.status != "ok"]


def unpredicted_rows(unpredicted: Iterable[tuple[Measured, str]]) -> Rows:
    """How many cells of several processes cannot be predicted, and why."""
    return [[str(cells), why] for why, cells in Counter(why for _, why in unpredicted).items()]


def shared_rows(outcomes: Iterable[CellOutcome]) -> Rows:
    """What several processes exchanged in a step of each cell, and how long it took."""
    return [_exchanged(o, o.measured.shared) for o in outcomes if o.measured.shared]


def _exchanged(o: CellOutcome, shared: Sharing) -> list[str]:
    rows = [row for of_phase in shared.messages.values() for row in of_phase.values()]
    counted = [str(sum(n for n, _ in rows)), units.nbytes(sum(b for _, b in rows))] if rows else ["", ""]
    judged = ("differ" if o.messages else "exact") if rows else "not counted"
    took = "" if shared.communication is None else units.percent(shared.communication)
    return [o.measured.name, *counted, judged, took, units.percent(o.communication)]


def cell_tables(outcomes: Iterable[CellOutcome], pairs: Iterable[Pair[CellOutcome]]) -> list[tuple[str, Rows]]:
    """(title, rows) of every model in every setup; a row a method."""
    speedups = {id(p.other): p for p in pairs}
    tables: dict[str, Rows] = {}
    for o in sorted(outcomes, key=lambda o: (o.measured.place, o.measured.cell.method)):
        tables.setdefault(o.measured.place, []).append(_cell(o, speedups.get(id(o))))
    return list(tables.items())


def _cell(o: CellOutcome, pair: Pair[CellOutcome] | None) -> list[str]:
    ratio = [f"{pair.measured:.2f}x", f"{pair.predicted:.2f}x"] if pair else ["", ""]
    remarks = ["wrong verdict"] if pair and pair.decided and not pair.right else []
    remarks += ["calls differ"] if o.calls or o.kernels else []
    remarks += ["collectives differ"] if o.messages else []
    times = [units.seconds(o.seconds), units.seconds(o.predicted_seconds), signed_percent(o.error)]
    return [o.measured.cell.method, *times, *ratio, signed_percent(o.memory_error, 2), ", ".join(remarks)]


def line_cells(line: Line) -> list[str]:
    """One row of the summary."""
    right, decided = line.verdicts
    return [
        line.name, str(line.step.number),
        *(units.percent(e, 1) for e in (line.step.mean, line.step.median, line.step.p90)),
        units.percent(line.ratio.mean, 1), f"{right}/{decided}" if decided else "", units.percent(line.memory.mean, 2),
        f"{line.counts_differ} differ" if line.counts_differ else "exact" if line.counted else "not counted",
    ]  # fmt: skip


def phase_cells(line: Line) -> list[str]:
    """The same cells' phases."""
    return [line.name, *(units.percent(line.phases[p].mean, 1) for p in PHASES), units.percent(line.inside)]


def numbered(outcomes: Iterable[CellOutcome]) -> Rows:
    """Differences of counts, equal ones of several cells taken together."""
    same = Counter(
        (d.phase, d.name, d.measured - d.predicted) for o in outcomes for d in o.differences
    )  # fmt: skip
    return [[phase, name, str(cells), f"{off:+d}"] for (phase, name, off), cells in same.most_common()]


def limit_cells(limit: Limit) -> list[str]:
    """One row of the promises: what it is, found, limit, whether it holds."""
    told = [f"{x:.0f}" if limit.is_count else units.percent(x, 1) for x in (limit.value, limit.most)]
    return [limit.name, *told, "ok" if limit.holds else "exceeded"]


def signed_percent(share: float, digits: int = 1) -> str:
    """A signed error as text."""
    return f"{100 * share:+.{digits}f} %"
