"""The plan of a campaign: units of work, those first that tell most for their time.

A plan is a TOML file: the counts and [models.NAME] tables of a grid (`validate.measuring.cells`), and [[stages]] that
run one after another. A stage has a `name` and one or more of

    blocks = ["gemm bf16", ...]    blocks of microbenchmarks, taking turns; `most` cases of each
    programs = 12                  so many tiny programs that show the host's costs
    [[stages.cells]]               training steps: models, methods, setups
    [[stages.around]]              the same at the sequence lengths around the predicted break-even of the last method,
                                   `longest` at the most
    needs = ["bitsandbytes"]       packages without which none of it runs

What a stage shares with an earlier one is done once.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

from perfmodel.devices.profile import DeviceProfile
from perfmodel.errors import UserError, nearest
from perfmodel.resources import is_file, read_toml

from ..calibration import hosts
from ..measuring import cells
from ..measuring.cells import COUNTS, GRIDS, Cell
from ..microbench import designs, wider
from ..microbench.designs import MicroCase
from .guide import around

KEYS = ("name", "blocks", "most", "programs", "cells", "around", "longest", "needs")
SEED = 0
LONGEST = 2048  # tokens of a sequence around the break-even


@dataclass(frozen=True)
class Visit:
    """One visit of a cell."""

    cell: Cell
    round: int

    def head(self) -> dict[str, Any]:
        """What its record begins with, however it ends."""
        return {"kind": "visit", "id": self.cell.id, "round": self.round, "cell": self.cell.as_dict()}


@dataclass(frozen=True)
class HostProgram:
    """A tiny program whose steps show the host's costs: an entry of `hosts.host_programs`."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Unit:
    """What is measured at once and recorded whole.

    Attributes:
        id: the same in every call of a campaign; no other unit has it.
        needs: packages without which it cannot run.
    """

    id: str
    stage: str
    work: MicroCase | Visit | HostProgram
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class CampaignPlan:
    """Stages as they stand in the file, and the counts of a visit."""

    name: str
    where: str
    stages: tuple[dict[str, Any], ...]
    models: dict[str, Any]
    rounds: int
    warm_up: int
    steps: int

    def units(self, device: str, on: DeviceProfile) -> list[Unit]:
        """All units in order, each once.

        Args:
            on: predicts where verdicts turn.

        Raises:
            UserError: a model, method or setup that does not exist or does not fit.
        """
        found: dict[str, Unit] = {}
        for stage in self.stages:
            for work in _of_stage(self, stage, device, on):
                unit = Unit(_id(work), stage["name"], work, tuple(stage.get("needs", ())))
                found.setdefault(unit.id, unit)
        return list(found.values())


def load_plan(name: Path | None, device: str) -> CampaignPlan:
    """The bundled plan of a kind of device, or one's own by path.

    Raises:
        UserError: no such file, broken TOML, stages of another form.
    """
    path = name or GRIDS / f"{device}-campaign.toml"
    if not is_file(path):
        raise UserError(f"no such plan: {path}")
    table, where = read_toml(path), str(path)
    for key in table:
        if key not in (*COUNTS, "models", "stages"):
            raise UserError(f"{where}: unknown key {key!r}: {nearest(key, [*COUNTS, 'models', 'stages'])}")
    stages = table.get("stages")
    if not isinstance(stages, list) or not stages:
        raise UserError(f"{where}: a plan holds [[stages]] tables")
    for stage in stages:
        _check(stage, device, where)
    given = {"rounds": 1, **{key: value for key, value in table.items() if key in COUNTS}}
    counts = {key: cells.grid_count(given.get(key, usual), key, where) for key, usual in COUNTS.items()}
    plan = CampaignPlan(path.stem, where, tuple(stages), table.get("models", {}), **counts)
    for stage in stages:
        _cells(plan, stage.get("cells", []))  # complains before anything runs
    return plan


@cache
def _blocks(device: str) -> dict[str, list[MicroCase]]:
    return wider.campaign_blocks(device, designs.DTYPES)


def _check(stage: Any, device: str, where: str) -> None:
    if not isinstance(stage, dict) or not isinstance(stage.get("name"), str):
        raise UserError(f"{where}: every [[stages]] table has a name")
    for key in stage:
        if key not in KEYS:
            raise UserError(f"{where}: unknown key {key!r} in [[stages]]: {nearest(key, KEYS)}")
    for key in ("most", "programs", "longest"):
        cells.grid_count(stage.get(key, 1), key, where)
    for key in ("cells", "around", "blocks", "needs"):
        if not isinstance(stage.get(key, []), list):
            raise UserError(f"{where}: {key} of stage {stage['name']!r} must be a list")
    known = _blocks(device)
    for block in stage.get("blocks", []):
        if not isinstance(block, str) or block not in known:
            raise UserError(f"{where}: unknown block of microbenchmarks {block!r}: {nearest(str(block), known)}")


def _of_stage(
    plan: CampaignPlan, stage: dict[str, Any], device: str, on: DeviceProfile
) -> Iterator[MicroCase | Visit | HostProgram]:
    known = _blocks(device)
    lists = [known[block][: stage.get("most")] for block in stage.get("blocks", [])]
    for turn in zip_longest(*lists):
        yield from (case for case in turn if case is not None)
    programs = list(hosts.host_programs())
    random.Random(SEED).shuffle(programs)  # so that the first few are of every kind
    yield from (HostProgram(values) for values in programs[: stage.get("programs", 0)])
    chosen = list(_cells(plan, stage.get("cells", [])))
    for block in stage.get("around", []):
        chosen += around(_cells(plan, [block]), on, stage.get("longest", LONGEST))
    yield from (Visit(cell, number) for number in range(plan.rounds) for cell in chosen)


def _cells(plan: CampaignPlan, blocks: list[Any]) -> tuple[Cell, ...]:
    return cells.parse_grid({"models": plan.models, "cells": blocks}, plan.name, plan.where).cells if blocks else ()


def _id(work: MicroCase | Visit | HostProgram) -> str:
    if isinstance(work, Visit):
        return f"step {work.cell.id} round {work.round}"
    if isinstance(work, HostProgram):
        config, method, checkpoint, optimizer = work.values
        return f"host {config.name} {method} {checkpoint} {optimizer}"
    sizes = " ".join(f"{name}={value}" for name, value in work.sizes)
    words = (work.block, work.op, work.dtype, work.layout, sizes, "backward" if work.backward else "")
    return " ".join(filter(None, words))
