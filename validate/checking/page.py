"""`perfmodel validate check --html FILE`: what a check found, on one page that opens offline."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from perfmodel import units
from perfmodel.program.installed import installed
from perfmodel.report.charts.crossing import COLOURS
from perfmodel.report.exhibits import both_forms
from perfmodel.report.page import render
from perfmodel.resources import write_text
from perfmodel.today import today

from ..accuracy import BASELINE
from . import tables
from .check import SEVERAL, Report
from .machine import name_of
from .parity import ParityPoint, parity_svg
from .summary import RATIO_MEAN, STEP_MEAN

TEMPLATE = Path(__file__).parent / "page.html.j2"


def write_check_page(found: Report, path: Path, command: str) -> None:
    """Write the page.

    Raises:
        UserError: it cannot be written, or Jinja2 is not installed.
    """
    write_text(path, render(check_context(found, command), TEMPLATE))


def check_context(found: Report, command: str) -> dict[str, Any]:
    """What the template shows."""
    of_cells = tables.cell_tables(found.every, found.pairs)
    unmeasured, different = tables.unmeasured_rows(found.cells), tables.numbered(found.every)
    shared, unpredicted = tables.shared_rows(found.shared), tables.unpredicted_rows(found.unpredicted)
    lines = [*found.lines, *(replace(line, name=f"{SEVERAL}: {line.name}") for line in found.shared_lines)]
    return {
        **bare(found.environments, command),
        "machines": ["; ".join(tables.machine_lines(found, name)) for name in found.machines],
        "answer": tables.verdict_line(found),
        "limits": page_table(tables.LIMIT_COLUMNS, map(tables.limit_cells, found.limits), "left4"),
        "plots": _plots(found) if found.every else [],
        "lines": page_table(tables.LINE_COLUMNS, map(tables.line_cells, lines)),
        "phases": page_table(tables.PHASE_COLUMNS, map(tables.phase_cells, lines)),
        "shared": page_table(tables.SHARED_COLUMNS, shared, "left4") if shared else None,
        "unpredicted": page_table(tables.UNPREDICTED_COLUMNS, unpredicted, "left2") if unpredicted else None,
        "cells": [{"title": title, "table": page_table(tables.CELL_COLUMNS, rows)} for title, rows in of_cells],
        "unmeasured": page_table(("cell", ""), unmeasured, "left2") if unmeasured else None,
        "different": page_table(tables.DIFFERENCE_COLUMNS, different, "left2") if different else None,
    }


def bare(environments: dict[str, Any], command: str) -> dict[str, Any]:
    """What the page shows of records that nothing was checked of."""
    return {
        "title": "Predicted against measured",
        "machines": [name_of(r) for r in environments.values()],
        "environments": [{"name": name, "facts": _facts(r)} for name, r in environments.items()],
        "signature": f"perfmodel {installed('perfmodel') or '(not installed)'}, {today().isoformat()}. Made by:",
        "command": command,
    }


def page_table(heads: Any, rows: Any, table_style: str = "") -> dict[str, Any]:
    """A table for the template."""
    return {"heads": list(heads), "rows": list(rows), "style": table_style}


def _plots(found: Report) -> list[dict[str, Any]]:
    methods = list(dict.fromkeys(o.measured.cell.method for o in found.every))
    colours = {method: COLOURS[i % len(COLOURS)] for i, method in enumerate(methods)}
    steps = [
        ParityPoint(o.seconds, o.predicted_seconds, colours[o.measured.cell.method],
              f"{o.measured.name}: {units.seconds(o.seconds)}, predicted {units.seconds(o.predicted_seconds)}")
        for o in found.every
    ]  # fmt: skip
    ratios = [
        ParityPoint(p.measured, p.predicted, colours[p.other.measured.cell.method],
              f"{p.other.measured.name}: {p.measured:.2f}x, predicted {p.predicted:.2f}x")
        for p in found.pairs
    ]  # fmt: skip
    legend = [{"name": method, "colour": colour, "told": ""} for method, colour in colours.items()]
    plots = [_plot("Step time", steps, "step time", _round_seconds, STEP_MEAN, legend)]
    if ratios:
        title = f"Speed-up over {BASELINE}"
        plots.append(_plot(title, ratios, "speed-up", lambda r: f"{r:.3g}x", RATIO_MEAN, legend))
    return plots


def _plot(
    title: str, points: list[ParityPoint], what: str, told: Any, band: float, legend: list[dict[str, str]]
) -> dict[str, Any]:
    drawn = both_forms(lambda width: parity_svg(points, title, what, told, band, width))
    caption = f"Each dot a cell. On the diagonal prediction and measurement agree; the thin lines are {band:.0%} off."
    return {"title": title, "picture": drawn, "legend": legend, "caption": caption.replace("%", " %")}


def _round_seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def _facts(environment: dict[str, Any]) -> list[tuple[str, str]]:
    """An environment's record as rows of text, nested tables by dotted names."""
    shown = {k: v for k, v in environment.items() if k not in ("schema", "kind", "id", "started")}
    return [(name, str(value)) for name, value in _flat(shown) if value not in ("", None, {}, [])]


def _flat(values: dict[str, Any], before: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found += _flat(value, f"{before}{name}.")
        else:
            found.append((before + name, " ".join(map(str, value)) if isinstance(value, list) else value))
    return found
