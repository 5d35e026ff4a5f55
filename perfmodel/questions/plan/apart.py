"""A plan in partitions: the search for what fits, for a few devices and one method each.

A partition says what was found: what a method gives up to fit on a device, or why it does not. The step of what was
found is predicted again where the plan is put together, so that nothing but words and numbers goes into files.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from ...devices.profile import DeviceProfile
from ...errors import UserError
from ...methods import Method
from ...partitions import Columns, Partitions
from ...recording.record import no_collector
from .fitting import concessions
from .planning import TOGETHER, Outcomes, Planner
from .runs import PlannedRun

AND = " and "


def outcomes(planner: Planner, kept: Partitions, told: Callable[[int], None]) -> Outcomes:
    """What becomes of each method on each device, of partitions that are computed where they are not there yet."""
    kept.fill((partial(searched, planner, *search) for search in searches(planner)), told)
    found: Outcomes = {}
    with no_collector():
        for number, (devices, method) in enumerate(searches(planner)):
            columns = kept.columns(number)
            for on, *row in zip(devices, columns["given_up"], columns["why"], columns["refused"], strict=True):
                found[on.slug, method.spec()] = _outcome(planner, on, method, *row)
    return {(on.slug, m.spec()): found[on.slug, m.spec()] for on in planner.devices for m in planner.methods}


def searches(planner: Planner) -> list[tuple[tuple[DeviceProfile, ...], Method]]:
    """Devices and method of each partition."""
    starts = range(0, len(planner.devices), TOGETHER)
    return [(planner.devices[start : start + TOGETHER], method) for method in planner.methods for start in starts]


def searched(planner: Planner, devices: tuple[DeviceProfile, ...], method: Method) -> list[Columns]:
    """The rows of a partition."""
    found = planner.outcomes(devices, [method])
    runs = [o if isinstance(o, PlannedRun) else None for o in found.values()]
    return [{
        "device": np.array([device for device, _ in found]), "method": np.array([method for _, method in found]),
        "given_up": np.array([AND.join(run.given_up) if run else "" for run in runs]),
        "why": np.array(["" if isinstance(o, PlannedRun) else str(o) for o in found.values()]),
        "refused": np.array([isinstance(o, UserError) for o in found.values()]),
    }]  # fmt: skip


def _outcome(
    planner: Planner, on: DeviceProfile, method: Method, given_up: str, why: str, refused: bool
) -> PlannedRun | UserError | str:
    if why:
        return UserError(why) if refused else str(why)
    tried = (concession for stage in concessions(planner.setup, method) for concession in stage)
    chosen = next(concession for concession in tried if AND.join(concession.given_up) == given_up)
    return planner.run(on, method, chosen, planner.fitting.predicted(chosen, on))
