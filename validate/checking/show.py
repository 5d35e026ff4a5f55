"""What `perfmodel validate check` prints."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from perfmodel.report.plain import show, table
from perfmodel.report.progress import counting

from . import tables
from .check import SEVERAL, Report, check_records

MOST_DIFFERENCES = 30  # listed; --json has all


def show_check(
    paths: Sequence[Path], *, device: str | None, host: str | None, node: str | None, html: Path | None,
    plot: Path | None, as_json: bool,
) -> bool:  # fmt: skip
    """Check records and print what was found; returns whether all limits hold."""
    with counting("predicting") as tick:
        found = check_records(paths, device=device, host=host, node=node, progress=tick)
    if html:
        from .page import write_check_page

        write_check_page(found, html, command=f"perfmodel {' '.join(sys.argv[1:])}")
    if plot:
        from ..plots import Point, plot_parity

        points = [
            Point(o.measured.cell.method, o.seconds, o.predicted_seconds, o.predicted.time.low, o.predicted.time.high)
            for o in found.every
        ]
        plot_parity(points, plot, f"{len(points)} measured cells (dashed: ±25 %)")
    if as_json:
        json.dump(found.as_dict(), sys.stdout, indent=1)
        sys.stdout.write("\n")
        return found.holds
    _print(found)
    for written in (html, plot):
        if written:
            show(f"written: {written}")
    return found.holds


def _print(found: Report) -> None:
    for name in found.machines:
        for told in tables.machine_lines(found, name):
            show(told)
    for title, rows in tables.cell_tables(found.every, found.pairs):
        _section(title, tables.CELL_COLUMNS, rows)
    for of, lines in (("", found.lines), (f", {SEVERAL}", found.shared_lines)):
        if lines:
            _section(f"mean |relative error|{of}", tables.LINE_COLUMNS, list(map(tables.line_cells, lines)))
            phases = list(map(tables.phase_cells, lines))
            _section(f"mean |relative error| of the phases{of}", tables.PHASE_COLUMNS, phases)
    if shared := tables.shared_rows(found.shared):
        _section(
            "what the processes exchanged, and for which share of the step", tables.SHARED_COLUMNS, shared, left=(0, 3)
        )
    if unpredicted := tables.unpredicted_rows(found.unpredicted):
        _section("not predicted", tables.UNPREDICTED_COLUMNS, unpredicted, left=(1,))
    if unmeasured := tables.unmeasured_rows(found.cells):
        _section("not measured", ("cell", ""), unmeasured, left=(0, 1))
    if different := tables.numbered(found.every):
        _section("counts that differ", tables.DIFFERENCE_COLUMNS, different[:MOST_DIFFERENCES], left=(0, 1))
        if len(different) > MOST_DIFFERENCES:
            show(f"and {len(different) - MOST_DIFFERENCES} more: see --json")
    _section("limits", tables.LIMIT_COLUMNS, [tables.limit_cells(x) for x in found.limits], left=(0, 3))
    show(f"\n{tables.verdict_line(found)}", bold=True)


def _section(title: str, heads: Sequence[str], rows: tables.Rows, left: Sequence[int] = (0,)) -> None:
    show("\n" + table(heads, rows, left=left, title=title))
