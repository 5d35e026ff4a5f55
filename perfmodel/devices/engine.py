"""What the Python of a training engine or of a parallel form costs the host, beside what its model costs.

An engine runs its own code around every module, for each of its parameters, and on every gradient; FSDP also around
every unit:
`data/engines/NAME.toml` has its cost in modules of the host (one `nn.Module` call), so that it follows the host that is
predicted for. `perfmodel validate engine` measures it.
"""

from dataclasses import replace
from functools import cache
from typing import Any

from ..errors import UserError
from ..resources import DATA, is_file, mapping, read_toml
from .host import Host

FOLDER = DATA / "engines"
COSTS = ("fetch", "release", "reduce", "settle", "wrap")  # fields of Host
MOST = 1000.0  # modules: no hook takes so long


@cache
def ratios(name: str) -> dict[str, float]:
    """An engine's costs in modules of the host; none of one without a file.

    Raises:
        UserError: a missing, mistyped or negative figure.
    """
    path = FOLDER / f"{name}.toml"
    if not is_file(path):
        return {}
    found = mapping(read_toml(path).get("modules"), f"{path}: [modules]")
    for cost in COSTS:
        value = found.get(cost)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < MOST:
            raise UserError(f"{path}: [modules] {cost} must be a number of modules from 0 to {MOST:.0f}, got {value!r}")
    return {cost: float(found[cost]) for cost in COSTS}


def under(host: Host, name: str) -> Host:
    """The host as it dispatches for an engine or form; one without a file needs no more than what a host file says."""
    costs: dict[str, Any] = {cost: ratio * host.module for cost, ratio in ratios(name).items()}
    return replace(host, **costs) if costs else host
