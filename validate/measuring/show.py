"""What `perfmodel validate measure` prints."""

import warnings
from pathlib import Path
from typing import Any

from perfmodel.report import units
from perfmodel.report.progress import progress
from perfmodel.report.terminal import console, table

from . import run


def show_measure(device: str, grid: str, output: Path, *, threads: int | None, rounds: int | None, seed: int) -> bool:
    """Measure a grid and print the cells; returns whether one failed (out of memory is a result, not a failure)."""
    warnings.filterwarnings("ignore")
    plan = run.plan(grid, device, threads=threads, rounds=rounds, seed=seed)
    with progress(auto_refresh=False) as bar:  # without a thread: measuring forks
        task = bar.add_task("loading", total=len(plan.visits()))

        def tick(done: int, total: int, label: str) -> None:
            bar.update(task, completed=done, total=total, description=label[:60])
            bar.refresh()

        found = run.measure(plan, output, tick)
    visits = [r for r in found if r["kind"] == "visit"]
    console.print(table("", ("cell", "round", "step", "spread", "peak memory", ""), map(_row, visits), left=1))
    failed = [r for r in visits if r["status"] == "error"]
    console.print(f"\n{len(visits)} visits of {len({r['id'] for r in visits})} cells, {len(failed)} failed: {output}")
    return bool(failed)


def _row(r: dict[str, Any]) -> list[Any]:
    name = r["id"].rpartition(" ")[0]
    if r["status"] != "ok":
        return [name, r["round"], "", "", "", f"{r['status']}: {r['message']}"[:60]]
    spread, peak = f"{100 * r['spread']:.0f} %", units.nbytes(r["memory"]["peak"])
    return [name, r["round"], units.seconds(r["median_s"]["step"]), spread, peak, ""]
