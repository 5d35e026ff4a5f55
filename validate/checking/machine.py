"""Which profile and host predict the records of an environment."""

from dataclasses import dataclass

from perfmodel.devices import host as hosts
from perfmodel.devices import profile
from perfmodel.devices.host import Host
from perfmodel.devices.profile import DeviceProfile
from perfmodel.errors import UserError

from ..measuring.records import Record

DEFAULT_HOST = "default"


@dataclass(frozen=True)
class Machine:
    """A device and the host that feeds it."""

    on: DeviceProfile
    by: Host


def machine_of(environment: Record, device: str | None = None, host: str | None = None) -> Machine:
    """What predicts the records of an environment.

    Args:
        environment: its record.
        device, host: what the user chose; else the machine's own calibration if the record names one, else the profile
            of the same GPU or CPU, and the host that goes with it.

    Raises:
        UserError: no such profile, a profile of another kind of device, or none for this machine.
    """
    own = environment.get("calibration", {})
    chosen = device or own.get("device")
    on = profile.load(chosen) if chosen else _same(environment)
    if on.kind != environment["device"]:
        raise UserError(f"the records are of a {environment['device']} device, {on.slug} is a {on.kind}: use --device")
    return Machine(on, hosts.resolve(host or own.get("host") or DEFAULT_HOST, on))


def _same(environment: Record) -> DeviceProfile:
    """The bundled profile of the machine that measured."""
    name = name_of(environment)
    if found := profile.by_makers_name(name):
        return found
    raise UserError(
        f"no profile of {name!r}: make one with `perfmodel calibrate --device {environment['device']}`, or choose one "
        "with --device"
    )


def name_of(environment: Record) -> str:
    """The maker's name of the device that measured."""
    table, name = ("gpu", "name") if environment["device"] == "cuda" else ("host", "cpu")
    found = environment.get(table)
    return str(found.get(name, "")) if isinstance(found, dict) else ""
