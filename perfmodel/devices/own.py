"""Where a user's own device and host files live: what `perfmodel calibrate` writes and `--device NAME` finds.

The folder is $PERFMODEL_HOME, or else perfmodel/ in the user's folder for configuration ($XDG_CONFIG_HOME, %APPDATA% on
Windows, ~/.config); devices/ and hosts/ lie in it.
"""

import os
import re
from contextlib import suppress
from pathlib import Path

from ..errors import UserError

CALIBRATED = "mine"  # the name that `perfmodel calibrate` gives this machine's profile unless told otherwise
NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


def home() -> Path:
    """The folder of the user's own files; it need not exist.

    Raises:
        UserError: the user has no folder, as in a container that runs under a number without a name.
    """
    base = os.environ.get("APPDATA" if os.name == "nt" else "XDG_CONFIG_HOME") or "~/.config"
    found = os.path.expanduser(os.environ.get("PERFMODEL_HOME") or os.path.join(base, "perfmodel"))
    if found.startswith("~"):
        raise UserError(f"{found}: no such home folder: set PERFMODEL_HOME to a folder for your own files")
    return Path(found)


def path(name: str, kind: str = "devices") -> Path:
    """The file of an own device or host ("hosts").

    Raises:
        UserError: the name is none that a file can have everywhere.
    """
    if not NAME.fullmatch(name):
        raise UserError(f"the name {name!r} must be of small letters, digits, '.', '_' and '-', as in 'my-box'")
    return home() / kind / f"{name}.toml"


def find(name: str, kind: str = "devices") -> Path | None:
    """The file of that name (in any case) if there is one; a link that leads nowhere is one, and a fault."""
    if not NAME.fullmatch(name.lower()):
        return None
    with suppress(UserError):
        found = path(name.lower(), kind)
        return found if os.path.lexists(found) else None
    return None


def calibrated(kind: str = "devices") -> list[str]:
    """The user's own devices or hosts."""
    with suppress(UserError):
        return sorted(p.stem for p in (home() / kind).glob("*.toml"))
    return []
