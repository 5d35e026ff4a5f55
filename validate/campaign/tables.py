"""The tables of a campaign as rows of text, for the terminal and the page."""

from perfmodel import units

from ..measuring.records import Record
from . import versions
from .ledger import OPEN
from .run import NO_TIME, CampaignRun

STAGE_COLUMNS = ("stage", "done", "left", "failed", "time")
VERSION_COLUMNS = ("package", "installed", "modelled")
FAILED = ("error", "late")


def stages(ran: CampaignRun) -> list[tuple[str, int, int, int, float]]:
    """(stage, units done, units left, units that failed, seconds) in the order of the plan."""
    done = {r["unit"]: r for r in ran.ledger.records if "unit" in r and r.get("status") not in OPEN}
    rows = []
    for name in dict.fromkeys(u.stage for u in ran.units):
        members = [u.id for u in ran.units if u.stage == name]
        found = [done[u] for u in members if u in done]
        failed = sum(r.get("status") in FAILED for r in found)
        seconds = round(sum(r["elapsed_s"] for r in found), 1)
        rows.append((name, len(found), len(members) - len(found), failed, seconds))
    return rows


def stage_rows(ran: CampaignRun) -> list[list[str]]:
    """The same as text."""
    return [
        [name, str(done), str(left), str(failed or ""), units.seconds(seconds) if seconds else ""]
        for name, done, left, failed, seconds in stages(ran)
    ]  # fmt: skip


def not_measured(ran: CampaignRun) -> list[tuple[str, str]]:
    """(unit, why) of what ran and failed, and of what could not be begun; not of what only waits for its turn."""
    ended = [(r["unit"], f"{r['status']}: {r['message']}") for r in ran.ledger.records if _failed(r)]
    return [*ended, *((unit, reason) for unit, reason in ran.open.items() if reason != NO_TIME)]


def _failed(record: Record) -> bool:
    return "unit" in record and record.get("status", "ok") not in ("ok", *OPEN)


def version_rows(environment: Record) -> list[list[str]]:
    """Package, version of the campaign's environment, and the versions that the tape was written for."""
    wanted = versions.modelled()
    return [[name, have, wanted.get(name, "")] for name, have in environment["packages"].items()]


def version_line(ran: CampaignRun) -> str:
    """What calls and kernels are compared with."""
    here = [r for r in ran.ledger.records if r["kind"] == "visit" and r["status"] == "ok"]
    traced = sum("traced" in r for r in here)
    if not traced and not versions.other():
        return "calls and kernels are compared with the tape, which was written for the installed versions"
    told = f"{', '.join(versions.other()) or 'packages'} of other versions than the tape was written for"
    failed = [r for r in here if "untraced" in r]
    line = f"{told}: calls and kernels of {traced} visits are compared with a trace of the installed program"
    return f"{line}, those of {len(failed)} that cannot be traced with the tape" if failed else line
