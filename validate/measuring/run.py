"""The measurement of a grid: every cell several times, in random order, resumed where it stopped."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from perfmodel import architectures, methods
from perfmodel.errors import UserError

from ..updates import make_optimizer
from . import allocator, cells, environment, isolate, records
from .cells import Cell, Grid
from .visit import visit

Progress = Callable[[int, int, str], None]  # visits done, visits in all, what comes next


@dataclass(frozen=True)
class Plan:
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


def plan(grid: str, device: str, *, threads: int | None = None, rounds: int | None = None, seed: int = 0) -> Plan:
    """A plan for this machine; on a CPU without bf16 arithmetic the bf16 cells are left out.

    Raises:
        UserError: no such device here, or a grid that `cells.load` refuses.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device is visible to PyTorch here: use --device cpu")
    found = cells.load(grid, device)
    if device == "cpu" and not environment.native_bf16():
        kept = tuple(c for c in found.cells if "bf16" not in (c.setup.dtype, c.setup.amp))
        found = replace(found, cells=kept)
        if not kept:
            raise UserError(f"grid {grid}: all its cells are bf16, which this CPU does not compute natively")
    return Plan(replace(found, rounds=rounds or found.rounds), device, threads or torch.get_num_threads(), seed)


def measure(plan: Plan, output: Path, progress: Progress = lambda done, total, label: None) -> list[dict[str, Any]]:
    """Run the visits that have no record yet, append one record each, and return all records of the file.

    Raises:
        UserError: the file cannot be read or written, or another measurement is writing to it.
    """
    with records.only_writer(output):
        before = records.read(output) if output.exists() else []
        todo = [v for v in plan.visits() if (v[0], v[1].id) not in records.done(before)]
        alone = plan.device == "cpu" and isolate.possible()
        if not alone:
            torch.set_num_threads(plan.threads)
        here = _environment(plan, output, before) if todo else ""
        if alone:
            _load_modules([cell for _, cell in todo])
        for i, (number, cell) in enumerate(todo):
            progress(i, len(todo), cell.id)
            started = time.time()
            work = partial(_visit, plan, cell, number)
            found = isolate.run(work) if alone else work()
            head = {"kind": "visit", "id": cell.id, "round": number, "environment": here, "cell": cell.as_dict()}
            took = {"started": round(started, 1), "elapsed_s": round(time.time() - started, 2)}
            records.append(output, {**head, **took, **found})
        progress(len(todo), len(todo), "done")
        return records.read(output)


def _visit(plan: Plan, cell: Cell, number: int) -> dict[str, Any]:
    torch.set_num_threads(plan.threads)
    if plan.device == "cpu":
        allocator.keep_freed_memory()
    grid = plan.grid
    return visit(
        cell, plan.device, threads=plan.threads, warm_up=grid.warm_up, steps=grid.steps, whole=number == 0
    )  # fmt: skip


def _load_modules(cells: list[Cell]) -> None:
    """Import in this process whatever the cells' programs import on the way, so that no forked visit does it again."""
    from torch.profiler import profile as profiler

    from ..models import apply, build

    for cell in {(c.config.name, c.method): c for c in cells}.values():
        architecture = architectures.from_config(cell.config)
        apply(build(cell.config, cell.setup), methods.parse(cell.method).bind(architecture), architecture)
    weight = torch.nn.Parameter(torch.ones(1))  # a step of one element starts no threads
    update = make_optimizer([weight], "adamw-loop")
    with profiler():
        weight.sum().backward()  # type: ignore[no-untyped-call]
    update.step()
    update.zero_grad()


def _environment(plan: Plan, output: Path, before: list[dict[str, Any]]) -> str:
    """The id of the environment's record, which is appended if the file does not hold the like yet."""
    found = environment.describe(plan.device, plan.threads)
    name = environment.identity(found)
    if not any(r.get("kind") == "environment" and r["id"] == name for r in before):
        head = {"kind": "environment", "id": name, "grid": plan.grid.name, "seed": plan.seed, "started": time.time()}
        records.append(output, {**head, **found})
    return name
