"""What a question asks in plain values, so that its partitions are told from those of another one."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..architectures import Architecture
from ..devices import host as hosts
from ..devices.host import GivenHost
from ..devices.profile import DeviceProfile
from ..methods import Method
from ..partitions import fingerprint
from ..prediction.placed import placed
from ..setup import Setup


def plain_question(
    command: str, architecture: Architecture, methods: Sequence[Method], setup: Setup, host: GivenHost,
    places: Sequence[tuple[DeviceProfile, int]], **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """What a command asks of some numbers of GPUs of some devices: questions that are equal have the same answers.

    Args:
        more: what else decides.

    Raises:
        UserError: an unknown host, or GPUs that stand in no known node.
    """
    devices = {on.slug: on for on, _ in places}
    files = [hosts.host_of(host, on) for on in devices.values()]
    nodes = [placed(replace(setup, gpus=gpus), on).node for on, gpus in places if gpus > 1]
    return {
        "command": command, "model": architecture.name, "methods": [m.spec() for m in methods],
        "devices": list(devices), **setup.as_dict(), **more,
        "contents of files": fingerprint(architecture, methods, devices, files, nodes, setup.lengths),
    }  # fmt: skip
