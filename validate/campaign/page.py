"""The page of a campaign: what ran, what is left, with which versions, and then the page of `validate check --html`."""

from pathlib import Path
from typing import Any

from perfmodel.report.page import render
from perfmodel.resources import write_text
from perfmodel.units import percent

from ..checking import page as checking
from .finish import Finding
from .run import CampaignRun
from .tables import STAGE_COLUMNS, VERSION_COLUMNS, not_measured, stage_rows, version_line, version_rows

TEMPLATE = checking.TEMPLATE.with_name("campaign.html.j2")


def write_campaign_page(ran: CampaignRun, found: Finding, path: Path, command: str) -> None:
    """Write the page.

    Raises:
        UserError: it cannot be written, or Jinja2 is not installed.
    """
    write_text(path, render(campaign_context(ran, found, command), TEMPLATE))


def campaign_context(ran: CampaignRun, found: Finding, command: str) -> dict[str, Any]:
    """What the template shows."""
    here = ran.environment
    about = (
        checking.check_context(found.report, command) if found.report else checking.bare({here["id"]: here}, command)
    )
    failed = not_measured(ran)
    errors = [[f"{name}, left-out rows", str(f.rows_left_out), percent(f.errors.mean, 1)] for name, f in _fits(found)]
    errors += [[f"host, {name.replace('_', ' ')}", str(e.number), percent(e.mean, 1)] for name, e in found.host.items()]
    return {
        **about,
        "title": "Campaign",
        "checked": found.report is not None,
        "missing": found.missing,
        "stages": checking.page_table(STAGE_COLUMNS, stage_rows(ran)),
        "failed": checking.page_table(("unit", ""), failed, "left2") if failed else None,
        "fits": checking.page_table(("fit", "rows", "mean error"), errors) if errors else None,
        "versions": checking.page_table(VERSION_COLUMNS, version_rows(here), "left2"),
        "version_line": version_line(ran),
    }


def _fits(found: Finding) -> list[tuple[str, Any]]:
    return list(found.fits.items())
