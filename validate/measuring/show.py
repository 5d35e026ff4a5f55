"""What `perfmodel validate measure` prints."""

import os
from pathlib import Path
from typing import Any

from perfmodel import units
from perfmodel.errors import UserError
from perfmodel.report.plain import show, table
from perfmodel.report.progress import counting, stoppable

from ..quiet import without_warnings_of_packages
from . import environment, run, team
from .cells import Cell


def show_measure(
    device: str, grid: str, output: Path, *, threads: int | None, rounds: int | None, seed: int, parallel: str | None
) -> bool:
    """Measure a grid and print the cells; returns whether one failed (out of memory is a result, not a failure).

    Args:
        parallel: how the processes of torchrun share a step; the first of them prints.
    """
    without_warnings_of_packages()
    if parallel is None and team.under_torchrun():
        raise UserError(
            f"started by torchrun: say how the processes share a step, --parallel {' or '.join(team.KINDS)}"
        )
    plan = run.plan(grid, device, threads=threads, rounds=rounds, seed=seed)
    together = team.join(parallel, device) if parallel else None
    try:
        if together and together.size < 2:
            raise UserError(f"--parallel {parallel} needs several processes: {team.STARTED} {parallel} ...")
        found = _measure(plan, output, together)
    except run.TeamFailed as failure:
        print(
            f"perfmodel: {failure}\nperfmodel: recorded; run again to go on (torchrun --max-restarts does)", flush=True
        )
        os._exit(1)  # the others wait inside a collective, and so would an orderly end
    finally:
        team.leave()
    if together and not together.first:
        team.end(failed=False)
    visits = [r for r in found if r["kind"] == "visit"]
    show(table(("cell", "round", "step", "spread", "peak memory", ""), [_row(r) for r in visits], left=(0, 5)))
    failed = [r for r in visits if r["status"] == "error"]
    for told in filter(None, map(environment.occupied, (r for r in found if r["kind"] == "environment"))):
        show(told, colour="yellow")
    show(f"\n{len(visits)} visits of {len({r['id'] for r in visits})} cells, {len(failed)} failed: {output}")
    if together:
        team.end(bool(failed))
    return bool(failed)


def _measure(plan: run.MeasuringPlan, output: Path, together: team.Team | None) -> list[dict[str, Any]]:
    if together and not together.first:
        return run.measure_cells(plan, output, team=together)
    left = f"what was measured is in {output}; the same command goes on behind it"
    with stoppable(left), counting("loading", len(plan.visits()), forks=True) as tick:
        return run.measure_cells(plan, output, tick, together)


def _row(r: dict[str, Any]) -> list[str]:
    together = r.get("parallel")
    name = Cell.from_dict(r["cell"]).name + (f" {together['kind']} x{together['processes']}" if together else "")
    if r["status"] != "ok":
        return [name, str(r["round"]), "", "", "", f"{r['status']}: {r['message']}"[:60]]
    spread, peak = f"{100 * r['spread']:.0f} %", units.nbytes(r["memory"]["peak"])
    return [name, str(r["round"]), units.seconds(r["median_s"]["step"]), spread, peak, ""]
