"""`perfmodel validate fit --records FILE`: the host's costs from real steps.

A few factors on groups of host costs are fitted to the phases of measured cells. Cells are split by whole groups (all
methods of one model in one setup): every third group is left out of the fit, and the errors that the file states are on
those.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from perfmodel.devices.host import Host
from perfmodel.devices.profile import DeviceProfile
from perfmodel.errors import UserError
from perfmodel.prediction.times import step_time
from perfmodel.program.part import PHASES

from ..checking.check import Progress, check_records
from ..checking.machine import Machine, name_of
from ..checking.outcomes import CellOutcome, cell_pairs
from ..checking.summary import Line, line
from ..fitting.judging import FitCaveats, settled

FACTORS = {  # factor -> the host's costs that it scales: as many as the phases of a step can tell apart
    "forward": ("call", "view", "module", "adapter", "checkpoint"),
    "backward": ("backward_call", "backward_view", "node", "hook"),
    "optimizer": ("tensor", "loop_call", "optimizer_call"),
    "launch": ("launch_call", "launch"),
}
PRIOR = 0.5  # relative sigma of a host cost before the records are seen: hosts of one kind differ by about this
NOISE = 0.05  # relative sigma of a measured phase
LEFT_OUT = 3  # every so-manieth group is left out
LARGEST = np.log(5.0)  # factors stay within a fifth and five


@dataclass(frozen=True)
class Refit:
    """A fit that was done.

    Attributes:
        caveats: factors that no cell tells, which stay 1, and those that went as far as they may: then kernels are
            mispriced, not the host.
        before, after: errors on the cells left out.
    """

    host: Host
    machine: Machine
    where: str
    factors: dict[str, float]
    caveats: FitCaveats
    fitted: int
    left_out: int
    before: Line
    after: Line


def refit(
    paths: Sequence[Path], *, device: str | None, host: str | None, progress: Progress = lambda done, total, label: None
) -> Refit:
    """Fit the factors to the records of one machine.

    Raises:
        UserError: records of several machines, or too few groups to leave some out.
    """
    found = check_records(paths, device=device, host=host, progress=progress)
    if len(found.machines) > 1:
        raise UserError(f"the records are of {len(found.machines)} environments: a host belongs to one machine")
    (name, machine), *_ = found.machines.items()
    fit, held = split_by_groups(found.outcomes)
    if not fit or not held:
        raise UserError("a fit needs cells of at least two models or setups: one group is left out to judge it")
    factors, caveats = fit_factors(fit, machine)
    by = scaled(machine.by, factors)
    after = [retimed(o, machine.on, by) for o in held]
    return Refit(
        _named(by, name_of(found.environments[name]), len(fit)), machine, name_of(found.environments[name]),
        factors, caveats, len(fit), len(held),
        line("left out", held, cell_pairs(held)), line("left out", after, cell_pairs(after)),
    )  # fmt: skip


def split_by_groups(outcomes: Sequence[CellOutcome]) -> tuple[list[CellOutcome], list[CellOutcome]]:
    """(fit, left out) by whole groups; the same groups whatever the order of the records."""
    groups = sorted({o.measured.cell.group for o in outcomes}, key=lambda g: hashlib.sha256(g.encode()).digest())
    away = set(groups[::LEFT_OUT]) if len(groups) > 1 else set()
    return (
        [o for o in outcomes if o.measured.cell.group not in away],
        [o for o in outcomes if o.measured.cell.group in away],
    )


def fit_factors(outcomes: Sequence[CellOutcome], machine: Machine) -> tuple[dict[str, float], FitCaveats]:
    """The factors with which the phases of some cells come out best, each held near 1 by its prior."""
    names = [name for name in FACTORS if name != "launch" or machine.on.kind == "cuda"]
    measured = np.log([[o.measured.median(phase) for phase in PHASES] for o in outcomes])

    def price(x: np.ndarray) -> np.ndarray:
        by = scaled(machine.by, dict(zip(names, np.exp(x), strict=True)))
        rows = [step_time(*_priced(o, machine.on, by)).phases for o in outcomes]
        return np.array([[float(phases[phase]) for phase in PHASES] for phases in rows])

    def residuals(x: np.ndarray) -> np.ndarray:
        return np.concatenate([(np.log(price(x)) - measured).ravel() / NOISE, x / PRIOR])

    usual = np.zeros(len(names))
    limits = usual - LARGEST, usual + LARGEST
    end = least_squares(residuals, usual, bounds=limits, loss="soft_l1", diff_step=[1e-3] * len(names)).x
    x, caveats = settled(names, end, usual, limits, price)
    return dict(zip(names, map(float, np.exp(x)), strict=True)), caveats


def scaled(by: Host, factors: Mapping[str, float]) -> Host:
    """A host with groups of its costs multiplied."""
    return replace(by, **{cost: getattr(by, cost) * factors[name] for name in factors for cost in FACTORS[name]})


def retimed(o: CellOutcome, on: DeviceProfile, by: Host) -> CellOutcome:
    """The same cell with another host: its kernels keep their prices."""
    return replace(o, predicted=replace(o.predicted, time=step_time(*_priced(o, on, by))))


def _priced(o: CellOutcome, on: DeviceProfile, by: Host) -> tuple[Any, ...]:
    return o.predicted.step, on, by, o.predicted.durations


def _named(by: Host, where: str, cells: int) -> Host:
    software = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    source = f"{by.source}; refitted {date.today()} to {cells} cells measured on {where} ({software})"
    return replace(by, name=f"{by.name}, refitted", source=source)


def no_better(found: Refit) -> str:
    """Why the fit is not to be kept, in one line; empty if cells that it did not see are predicted no worse by it."""
    before, after = found.before.step.mean, found.after.step.mean
    if after <= before:
        return ""
    errors = f"{100 * before:.1f} % before, {100 * after:.1f} % after"
    return f"steps of the cells left out of the fit are predicted worse by it ({errors}): nothing was written"


def refit_provenance(found: Refit) -> dict[str, Any]:
    """What the host file says about the fit."""
    residuals = {f"{phase}_mean": found.after.phases[phase].mean for phase in PHASES}
    return {
        "date": str(date.today()), "machine": found.where, "device": found.machine.on.slug,
        "base": found.machine.by.name, "cells_fitted": found.fitted, "cells_left_out": found.left_out,
        **{f"factor_{name}": factor for name, factor in found.factors.items()},
        **{key: list(names) for key, names in asdict(found.caveats).items()},
        "step_mean": found.after.step.mean, "step_median": found.after.step.median, "step_p90": found.after.step.p90,
        **residuals,
    }  # fmt: skip
