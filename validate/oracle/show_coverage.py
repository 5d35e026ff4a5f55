"""What `perfmodel validate coverage` prints."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from perfmodel.partitions import Workers
from perfmodel.report.plain import print_json, show, table
from perfmodel.report.progress import progress

from . import coverage
from .coverage import CoverageRow


def show_coverage(*, quick: bool, output: Path | None, workers: Workers, as_json: bool) -> bool:
    """Trace model types and tuners, print which can be traced and why others cannot; returns whether enough can.

    With `output` every row goes into that table at once, and what stands in it already is not traced again.
    """
    rows = coverage.read_coverage(output) if output and output.exists() else []
    known = {(row.kind, row.name) for row in rows}
    models = [model for model in coverage.model_types(quick=quick) if model not in known]
    names = [name for name in coverage.tuners() if ("tuner", name) not in known]
    with progress() as bar:
        task = bar.add_task("tracing", total=len(models) + len(names))
        for row in coverage.cover(models, names, lambda name: bar.update(task, description=name), workers):
            rows.append(row)
            if output:
                coverage.append_row(output, row)
            bar.advance(task)
    if as_json:
        print_json([{**asdict(row), "ok": row.ok} for row in rows])
    else:
        _print(rows)
    return coverage.enough(rows)


def _print(rows: Sequence[CoverageRow]) -> None:
    cells = ([row.kind, row.name, _how(row), f"{row.seconds:.1f} s"] for row in rows if row.ok)
    show(table(("", "type", "blocks traced", "took"), cells, left=(0, 1), title="traced"))
    refused = [row for row in rows if not row.ok]
    if refused:
        show("\nnot traced", bold=True)
    for row in refused:
        show(f"  {row.kind} {row.name}: {row.reason}")
    for kind in dict.fromkeys(row.kind for row in rows):
        of_kind = [row for row in rows if row.kind == kind]
        show(f"{kind}: {sum(row.ok for row in of_kind)} of {len(of_kind)}")


def _how(row: CoverageRow) -> str:
    return f"{row.traced} of {row.blocks}" if row.traced < row.blocks else "all"
