"""A plan in partitions: the search for what fits, for a few devices and one method each.

A partition says what was found: what a method gives up to fit on a device, or why it does not. The step of what was
found is predicted again where the plan is put together, so that nothing but words and numbers goes into files.
"""

from collections.abc import Callable
from functools import partial
from itertools import product

import numpy as np

from ...devices.profile import DeviceProfile
from ...errors import UserError
from ...methods import Method
from ...partitions import Columns, Partitions
from ...recording.collector import no_collector
from ...setup import Setup
from .fitting import relaxations
from .planning import TOGETHER, Outcomes, Planner, in_half_of_device
from .runs import PlannedRun

AND = " and "


def outcomes(planner: Planner, kept: Partitions, told: Callable[[int], None]) -> Outcomes:
    """What becomes of each method on each device, of partitions that are computed where they are not there yet."""
    kept.fill((partial(searched, planner, *search) for search in searches(planner)), told)
    found: Outcomes = {}
    with no_collector():
        for number, (setup, devices, method) in enumerate(searches(planner)):
            columns = kept.columns(number)
            for on, *row in zip(devices, columns["given_up"], columns["why"], columns["refused"], strict=True):
                found[on.slug, int(setup.gpus), method.spec()] = _outcome(planner, setup, on, method, *row)
    places = product(planner.setups, planner.devices, planner.methods)
    keys = [(on.slug, int(setup.gpus), method.spec()) for setup, on, method in places]
    return {key: found[key] for key in keys}


def searches(planner: Planner) -> list[tuple[Setup, tuple[DeviceProfile, ...], Method]]:
    """Setup, devices and method of each partition."""
    starts = range(0, len(planner.devices), TOGETHER)
    each = product(planner.setups, planner.methods, starts)
    return [(setup, planner.devices[start : start + TOGETHER], method) for setup, method, start in each]


def searched(planner: Planner, setup: Setup, devices: tuple[DeviceProfile, ...], method: Method) -> list[Columns]:
    """The rows of a partition."""
    found = planner.outcomes(setup, devices, [method])
    runs = [o if isinstance(o, PlannedRun) else None for o in found.values()]
    return [{
        "device": np.array([device for device, _, _ in found]), "gpus": np.array([gpus for _, gpus, _ in found]),
        "method": np.array([method for _, _, method in found]),
        "given_up": np.array([AND.join(run.given_up) if run else "" for run in runs]),
        "why": np.array(["" if isinstance(o, PlannedRun) else str(o) for o in found.values()]),
        "refused": np.array([isinstance(o, UserError) for o in found.values()]),
    }]  # fmt: skip


def _outcome(
    planner: Planner, setup: Setup, on: DeviceProfile, method: Method, given_up: str, why: str, refused: bool
) -> PlannedRun | UserError | str:
    if why:
        return UserError(why) if refused else str(why)
    tried = (relaxation for stage in relaxations(in_half_of_device(setup, on), method) for relaxation in stage)
    chosen = next(relaxation for relaxation in tried if AND.join(relaxation.given_up) == given_up)
    return planner.run(on, method, chosen, planner.fitting.predicted(chosen, on))
