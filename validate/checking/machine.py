"""Which profile, host and versions of the software predict the records of an environment."""

from dataclasses import dataclass, field
from typing import Any

from perfmodel.devices import host as hosts
from perfmodel.devices import own, profile
from perfmodel.devices.host import Host
from perfmodel.devices.profile import DeviceProfile
from perfmodel.errors import UserError
from perfmodel.program.installed import unmirrored
from perfmodel.program.software import SoftwareStack

from ..measuring.records import Record


@dataclass(frozen=True)
class Machine:
    """A device, the host that feeds it, and the versions of the software that both run.

    Attributes:
        node: what several processes stand in, as the user chose it; None: by the device.
        threads: of a process that measured.
        others: packages that it ran under in other versions than the tape mirrors, in words.
    """

    on: DeviceProfile
    by: Host
    stack: SoftwareStack
    node: str | None = None
    threads: int = 1
    others: list[str] = field(default_factory=list)


def machine_of(
    environment: Record, device: str | None = None, host: str | None = None, node: str | None = None
) -> Machine:
    """What predicts the records of an environment.

    Args:
        environment: its record.
        device, host: what the user chose; else what `perfmodel calibrate` made of the machine that measured, else a
            bundled profile of it, each with the host of the same name if there is one, else with the default host.
        node: what the user chose for several processes.

    Raises:
        UserError: no such profile, a profile of another kind of device, or none for this machine.
    """
    name = name_of(environment)
    on = profile.load(device) if device else _calibrated(environment) or _bundled(environment)
    if on is None:
        of = "" if environment["device"] == "cuda" else f" with {environment['host'].get('threads')} threads"
        raise UserError(
            f"no profile of {name!r}{of}: make one with `perfmodel calibrate --device {environment['device']}`, or "
            "choose one with --device"
        )
    if on.kind != environment["device"]:
        raise UserError(f"the records are of a {environment['device']} device, {on.slug} is a {on.kind}: use --device")
    beside = own.find(on.slug, "hosts") or on.slug in hosts.names()
    by, threads = hosts.host_of(host or (on.slug if beside else "default"), on), environment["host"].get("threads")
    return Machine(
        on, by, installed_stack(environment), node, threads if isinstance(threads, int) else 1,
        unmirrored(version_of=_versions(environment).get),
    )  # fmt: skip


def installed_stack(environment: Record) -> SoftwareStack:
    """The versions of the software that measured."""
    gpu = environment.get("gpu")
    cuda = gpu.get("cuda") if isinstance(gpu, dict) else None
    return SoftwareStack.installed({"cuda": cuda, **_versions(environment)})


def _versions(environment: Record) -> dict[str, Any]:
    software = environment.get("software")
    return {name: str(told) for name, told in software.items()} if isinstance(software, dict) else {}


def _calibrated(environment: Record) -> DeviceProfile | None:
    """The user's own profile of the machine that measured, if it lies here."""
    name = environment.get("calibration", own.CALIBRATED)
    if not isinstance(name, str) or not own.find(name):
        return None
    found = profile.load(name)
    return found if found.name == name_of(environment) and _as_measured(found, environment) else None


def _bundled(environment: Record) -> DeviceProfile | None:
    found = profile.bundled_by_makers_name(name_of(environment))
    return found if found and _as_measured(found, environment) else None


def _as_measured(on: DeviceProfile, environment: Record) -> bool:
    """Whether a profile is of the kind of device that measured; a CPU's also of as many threads."""
    if on.kind != environment["device"]:
        return False
    return on.kind == "cuda" or environment["host"].get("threads") in (None, on.hardware.sm_count)


def name_of(environment: Record) -> str:
    """The maker's name of the device that measured."""
    table, name = ("gpu", "name") if environment["device"] == "cuda" else ("host", "cpu")
    found = environment.get(table)
    return str(found.get(name, "")) if isinstance(found, dict) else ""
