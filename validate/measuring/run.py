"""The measurement of a grid: every cell several times, in random order, resumed where it stopped."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from perfmodel import architectures, methods
from perfmodel.devices import own
from perfmodel.errors import UserError
from perfmodel.tracing.programs.references import apply_any
from perfmodel.tracing.programs.updates import make_optimizer

from . import allocator, cells, environment, isolate, records
from .cells import Cell, Grid
from .loop import check_cell
from .team import Team
from .visit import visit

Progress = Callable[[int, int, str], None]  # visits done, visits in all, what comes next


@dataclass(frozen=True)
class MeasuringPlan:
    """What to measure and how.

    Attributes:
        device: cpu or cuda.
        threads: of the CPU.
        seed: of the order of visits.
    """

    grid: Grid
    device: str
    threads: int
    seed: int = 0

    def visits(self) -> list[tuple[int, Cell]]:
        """(round, cell) in the order in which they run."""
        return list(self.grid.visits(self.seed))


def plan(
    grid: str, device: str, *, threads: int | None = None, rounds: int | None = None, seed: int = 0
) -> MeasuringPlan:
    """A plan for this machine; on a CPU without bf16 arithmetic the bf16 cells are left out.

    Raises:
        UserError: no such device here, a grid that `cells.load_grid` refuses, or a program that is not measured.
    """
    environment.check_device(device)
    found = cells.load_grid(grid, device)
    for cell in found.cells:
        check_cell(cell)
    if device == "cpu" and not environment.native_bf16():
        kept = tuple(c for c in found.cells if "bf16" not in (c.setup.dtype, c.setup.amp))
        found = replace(found, cells=kept)
        if not kept:
            raise UserError(f"grid {grid}: all its cells are bf16, which this CPU does not compute natively")
    return MeasuringPlan(
        replace(found, rounds=rounds or found.rounds), device, threads or torch.get_num_threads(), seed
    )


def measure_cells(
    plan: MeasuringPlan, output: Path, progress: Progress = lambda done, total, label: None, team: Team | None = None
) -> list[dict[str, Any]]:
    """Run the visits that have no record yet, append one record each, and return all records of the file.

    Args:
        team: the processes that share every step; all of them call this, the first keeps the records.

    Raises:
        UserError: the file cannot be read or written, or another measurement is writing to it.
        TeamFailed: a visit of a team failed; it is recorded, and running again goes on behind it.
    """
    if team and not team.first:
        return _follow(plan, output, team)
    with records.only_writer(output):
        before = records.read_records(output) if output.exists() else []
        here, named = _environment(plan, output, before), team.name if team else str
        known = records.done(before, here)
        todo = [v for v in plan.visits() if (v[0], named(v[1].id)) not in known]
        alone = plan.device == "cpu" and team is None and isolate.can_fork()
        if not alone:
            torch.set_num_threads(plan.threads)
        if alone:
            load_modules([cell for _, cell in todo])
        if team:
            team.agree((todo, here))
        for i, (number, cell) in enumerate(todo):
            progress(i, len(todo), cell.id)
            started = time.time()
            work = partial(_visit, plan, cell, number, team)
            found = isolate.run_forked(work) if alone else work()
            took = {"started": round(started, 1), "elapsed_s": round(time.time() - started, 2)}
            _keep(output, {**_head(cell, number, here, team), **took}, found, team)
            if not alone and environment.spoilt(found):
                raise UserError(f"{cell.id}: {found['message']}: recorded; run again to go on behind it")
        progress(len(todo), len(todo), "done")
        return records.read_records(output)


class TeamFailed(Exception):
    """One process of a team failed, and the others wait for it: the team must be started again."""


def _follow(plan: MeasuringPlan, output: Path, team: Team) -> list[dict[str, Any]]:
    """Another process's part of `measure`: the visits that the first one chose."""
    torch.set_num_threads(plan.threads)
    chosen: tuple[list[tuple[int, Cell]], str] = team.agree(None)
    todo, here = chosen
    for number, cell in todo:
        _keep(output, _head(cell, number, here, team), _visit(plan, cell, number, team), team)
    return []


def _head(cell: Cell, number: int, environment: str, team: Team | None) -> dict[str, Any]:
    head = {"kind": "visit", "id": cell.id, "round": number, "environment": environment, "cell": cell.as_dict()}
    if team is None:
        return head
    return {**head, "id": team.name(cell.id), "parallel": team.as_dict()}


def _keep(output: Path, head: dict[str, Any], found: dict[str, Any], team: Team | None) -> None:
    """Append the record of a visit; of a team the first process does so, or the first that fails."""
    if team and found["status"] != "ok":
        if team.first_to(f"record {head['round']} {head['id']}"):
            records.append_records(output, {**head, **found, "rank": team.rank})
        raise TeamFailed(f"{head['id']} on process {team.rank}: {found['message']}")
    if team:
        steps = team.gather(found["median_s"]["step"])
        found = {**found, "step_of_each": steps}
    if team is None or team.first:
        records.append_records(output, {**head, **found})


def _visit(plan: MeasuringPlan, cell: Cell, number: int, team: Team | None) -> dict[str, Any]:
    torch.set_num_threads(plan.threads)
    if plan.device == "cpu":
        allocator.keep_freed_memory()
    grid = plan.grid
    return visit(
        cell, plan.device, threads=plan.threads, warm_up=grid.warm_up, steps=grid.steps, whole=number == 0, team=team
    )  # fmt: skip


def load_modules(cells: list[Cell]) -> None:
    """Import in this process whatever the cells' programs import on the way, so that no forked visit does it again."""
    from torch.profiler import profile as profiler

    from perfmodel.tracing.programs.models import build_model

    for cell in {(c.config.name, c.method): c for c in cells}.values():
        architecture = architectures.from_config(cell.config)
        method = methods.parse(cell.method).bind(architecture)
        apply_any(build_model(cell.config, cell.setup), method, architecture, cell.setup)
    weight = torch.nn.Parameter(torch.ones(1))  # a step of one element starts no threads
    update = make_optimizer([weight], "adamw-loop")
    with profiler():
        weight.sum().backward()  # type: ignore[no-untyped-call]
    update.step()
    update.zero_grad()


def _environment(plan: MeasuringPlan, output: Path, before: list[dict[str, Any]]) -> str:
    """The id of the environment's record, which is appended if the file does not hold the like yet."""
    found = environment.describe(plan.device, plan.threads)
    name = environment.identity(found)
    if not any(r.get("kind") == "environment" and r["id"] == name for r in before):
        head = {"kind": "environment", "id": name, "grid": plan.grid.name, "seed": plan.seed, "started": time.time()}
        if own.find(own.CALIBRATED):
            found["calibration"] = own.CALIBRATED
        records.append_records(output, {**head, **found})
    return name
