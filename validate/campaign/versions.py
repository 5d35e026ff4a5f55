"""What is installed beside what the tape was written for.

Where the two differ, calls and kernels are compared with a trace of the installed program on fake tensors instead of
the tape; times and memory are predicted by the tape all the same.
"""

import re
from importlib.metadata import PackageNotFoundError, requires
from typing import Any

from packaging.requirements import Requirement

from perfmodel.program.installed import PACKAGES, installed

TORCH = "2.13"  # the minor version whose calls the tape records
SHOWN = (
    "torch", "transformers", "peft", "triton", "bitsandbytes", "flash-attn", "liger-kernel", "accelerate", "deepspeed"
)  # fmt: skip


def modelled() -> dict[str, str]:
    """Package -> the versions that the tape was written for."""
    try:
        lines = requires("perfmodel") or []
    except PackageNotFoundError:  # run from a folder that was never installed
        lines = []
    wanted = {r.name: str(r.specifier) for r in map(Requirement, lines) if r.name in ("transformers", "peft")}
    return {"torch": f"=={TORCH}.*", **wanted}


def other() -> list[str]:
    """The packages whose installed version is another than the tape's."""
    found = {name: installed(name) for name in PACKAGES}
    wanted = modelled()
    return [name for name, have in found.items() if not have or not _fits(have, wanted.get(name, "==0"))]


def _fits(have: str, wanted: str) -> bool:
    """Whether a version is one of those wanted; the build behind a + does not count."""
    plain = re.split(r"[+]", have)[0]
    return bool(Requirement(f"x{wanted}").specifier.contains(plain, prereleases=True))


def installed_versions() -> dict[str, Any]:
    """Package -> version or None, of all that a campaign may use."""
    return {name: installed(name) for name in SHOWN}
