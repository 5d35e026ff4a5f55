"""One unit of a campaign, done in a worker: everything here may touch the device."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from perfmodel.errors import UserError
from perfmodel.methods import parse

from ..calibration import hosts
from ..checking.counted import calls_of, kernels_of
from ..measuring import allocator, environment
from ..measuring.cells import Cell
from ..measuring.records import Record
from ..measuring.visit import visit
from ..microbench import run, wider_kernels  # noqa: F401, the blocks that only a campaign has
from ..microbench.designs import MicroCase
from ..microbench.kernels import release_pools
from ..microbench.stopwatch import Stopwatch, stopwatch
from .plan import HostProgram, Visit
from .versions import installed_versions

HERE = "environment"  # what to ask a worker for to learn where it runs


@dataclass(frozen=True)
class Settings:
    """How units run.

    Attributes:
        threads: of the CPU.
        traced: whether the counts of a trace of the installed program go into the records.
    """

    device: str
    threads: int
    warm_up: int
    steps: int
    traced: bool


def worker_of(settings: Settings) -> Callable[[Any], Record]:
    """The function that a worker runs: the record of a unit's work."""

    def work(thing: Any) -> Record:
        torch.set_num_threads(settings.threads)
        if settings.device == "cpu":
            allocator.keep_freed_memory()
        if thing == HERE:
            return here(settings)
        if isinstance(thing, Visit):
            return visit_record(thing, settings)
        return host_program(thing) if isinstance(thing, HostProgram) else bench(thing, settings)

    return work


def here(settings: Settings) -> Record:
    """The environment's record, packages that a campaign may use included."""
    environment.check_device(settings.device)
    found = environment.describe(settings.device, settings.threads)
    found["packages"] = {name: have or "not installed" for name, have in installed_versions().items()}
    return {"kind": "environment", "id": environment.identity(found), **found}


def bench(case: MicroCase, settings: Settings) -> Record:
    """A microbenchmark's record."""
    return run.attempt(case, settings.device, _watch(settings.device, settings.threads))


@lru_cache
def _watch(device: str, threads: int) -> Stopwatch:
    return stopwatch(device, threads)


def host_program(program: HostProgram) -> Record:
    """Seconds by phase of a tiny program on one thread of the CPU."""
    torch.set_num_threads(1)
    config, method, checkpoint, optimizer = program.values
    timed = hosts.time_program(config, method, checkpoint, optimizer)
    what = {"model": config.name, "config": config.values, "method": method}
    return {
        "kind": "host", "program": {**what, "checkpoint": checkpoint, "optimizer": optimizer},
        "seconds": timed.seconds,
    }  # fmt: skip


def visit_record(work: Visit, settings: Settings) -> Record:
    """A visit's record; where the installed program may be another than the tape's, with the counts of its trace."""
    first = work.round == 0
    release_pools(settings.device)  # what microbenchmarks before it held
    found = visit(
        work.cell, settings.device, threads=settings.threads, warm_up=settings.warm_up, steps=settings.steps,
        whole=first,
    )  # fmt: skip
    if first and settings.traced and found["status"] == "ok":
        try:
            found["traced"] = traced_cell(work.cell, settings.device)
        except UserError as error:
            found["untraced"] = str(error)
    return {**work.head(), **found}


def traced_cell(cell: Cell, device: str) -> dict[str, Any]:
    """Calls, and on a GPU kernels, by phase and name, of a trace of the installed program.

    Raises:
        UserError: it cannot be traced.
    """
    from perfmodel.tracing import traced as tracing

    capability = "8.0"
    if device == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
    model, method, program = tracing.trace_model(cell.config, parse(cell.method), cell.setup, device, capability)
    built = tracing.step_of(model, method, cell.setup, device, capability, program)
    return {"calls": calls_of(built), **({"kernels": kernels_of(built)} if device == "cuda" else {})}
