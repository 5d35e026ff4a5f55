"""The packages that real programs come from: which versions are installed, and which work."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from ..errors import UserError
from .software import CURRENT

PACKAGES = ("torch", "transformers", "peft")
# The first minor versions whose programs can be traced (`tests/program/test_installed.py` says how that was found out).
OLDEST = {"torch": (2, 9), "transformers": (5, 0), "peft": (0, 20)}
INSTALL = "pip install 'perfmodel[validate]'"


def installed(package: str) -> str | None:
    """The version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def too_old() -> dict[str, str]:
    """The installed packages, with their versions, whose programs cannot be traced."""
    return {name: told for name in PACKAGES if (told := installed(name)) and _minor(told) < OLDEST[name]}


def unmirrored(packages: Sequence[str] = PACKAGES, version_of: Callable[[str], str | None] | None = None) -> list[str]:
    """The packages of other minor versions than the tape mirrors, each in words: of those installed, or as told."""
    mirrored, look_up = CURRENT.as_dict(), version_of or installed
    found = {name: told for name in packages if (told := look_up(name))}
    return [f"{n} {told} (mirrored: {mirrored[n]})" for n, told in found.items() if _minor(told) != _minor(mirrored[n])]


@contextmanager
def needed(what: str = "this command", *, traces: bool = True) -> Iterator[None]:
    """Around imports of what needs these packages: where one is missing or too old, one line says what to install.

    Args:
        what: begins the line.
        traces: whether they must be of versions that can be traced.

    Raises:
        UserError: one is missing, or too old.
    """
    if traces and (old := too_old()):
        wanted = ", ".join(f"{name} {'.'.join(map(str, OLDEST[name]))}" for name in old)
        found = ", ".join(f"{name} {told}" for name, told in old.items())
        raise UserError(f"{what} needs {wanted} or newer, and {found} is installed: {INSTALL}")
    try:
        if traces:
            for name in PACKAGES:
                import_module(name)  # some find only then that what they need themselves is of another version
        yield
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        why = f"{error.name} is missing" if missing else str(error).partition("\n")[0]
        raise UserError(f"{what} needs the validate extra ({why}): {INSTALL}") from None


def _minor(told: str) -> tuple[int, ...]:
    """Major and minor of a version; nothing for one that is none."""
    return tuple(map(int, re.findall(r"\d+", told)[:2]))


def hush() -> None:
    """Keep what transformers remarks of tiny models with random weights off the terminal; before it is imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
