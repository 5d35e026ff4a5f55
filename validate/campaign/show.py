"""What `perfmodel validate campaign` prints and writes: the page, and the summary for scripts."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from perfmodel import units
from perfmodel.report.plain import print_json, show, table
from perfmodel.report.progress import filling, stoppable
from perfmodel.resources import write_text

from ..checking import tables
from ..measuring import environment
from ..quiet import without_warnings_of_packages
from . import plan as plans
from .finish import Finding, finish
from .page import write_campaign_page
from .run import CampaignRun, run_campaign
from .tables import STAGE_COLUMNS, VERSION_COLUMNS, not_measured, stage_rows, stages, version_line, version_rows

PAGE, SUMMARY = "page.html", "summary.json"


def show_campaign(
    device: str, folder: Path, seconds: float, *, plan: Path | None, threads: int | None, as_json: bool
) -> None:
    """Go on with a campaign for so many seconds, fit and check what there is, and tell of it."""
    without_warnings_of_packages()
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # this process keeps off CUDA, so that it may fork
    chosen = plans.load_plan(plan, device)
    with stoppable(f"what was measured is in {folder}; the same command goes on behind it"), filling() as tick:
        ran = run_campaign(chosen, device, folder, seconds, threads=threads, progress=tick)
        tick(1.0, "fitting and checking")
        found = finish(ran.ledger.records, ran.environment, ran.ledger.path)
    summary = summarised(ran, found)
    write_text(folder / SUMMARY, json.dumps(summary, indent=1) + "\n")
    write_campaign_page(ran, found, folder / PAGE, command=f"perfmodel {' '.join(sys.argv[1:])}")
    if as_json:
        print_json(summary)
    else:
        _print(ran, found, folder)


def summarised(ran: CampaignRun, found: Finding) -> dict[str, Any]:
    """The campaign so far as plain values."""
    return {
        "device": ran.environment["device"],
        "environment": ran.environment["id"],
        "seconds": round(ran.seconds, 1),
        "units": {"done": len(ran.units) - len(ran.left), "all": len(ran.units)},
        "stages": [dict(zip(("stage", "done", "left", "failed", "seconds"), row, strict=True)) for row in stages(ran)],
        "not_measured": [{"unit": name, "reason": reason} for name, reason in not_measured(ran)],
        "versions": [dict(zip(VERSION_COLUMNS, row, strict=True)) for row in version_rows(ran.environment)],
        "counts": version_line(ran),
        "missing": found.missing,
        "blocks": {name: asdict(fit.errors) for name, fit in found.fits.items()},
        "host": {name: asdict(errors) for name, errors in found.host.items()},
        "check": found.report.as_dict() if found.report else None,
    }


def _print(ran: CampaignRun, found: Finding, folder: Path) -> None:
    show(table(STAGE_COLUMNS, stage_rows(ran)))
    show(f"\n{version_line(ran)}")
    if occupied := environment.occupied(ran.environment):
        show(occupied, colour="yellow")
    for line in found.missing:
        show(f"missing: {line}")
    if found.report:
        lines = map(tables.line_cells, found.report.lines)
        show("\n" + table(tables.LINE_COLUMNS, lines, title="mean |relative error|"))
        show(f"\n{tables.verdict_line(found.report)}", bold=True)
    show(
        f"\n{len(ran.units) - len(ran.left)} of {len(ran.units)} units done, in {units.seconds(ran.seconds)}: {folder}"
    )
