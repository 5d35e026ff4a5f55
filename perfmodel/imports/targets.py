"""Target layers as PEFT has them: a list of names, one name, `all-linear`, or a regex of whole paths."""

import re

from ..errors import UserError
from .keys import Keys

NAME = re.compile(r"[\w.-]+")  # what is no more than the name of a module


def as_targets(keys: Keys, key: str) -> tuple[str, ...]:
    """Targets as a method takes them; a regex stands between slashes.

    Raises:
        UserError: neither names nor a regex.
    """
    value = keys.get(key)
    if isinstance(value, str) and value.lower() == "all-linear":
        return ("all-linear",)
    if not isinstance(value, str) or ("," in value and NAME.fullmatch(value.replace(",", "").replace(" ", ""))):
        names = keys.names(key)
        odd = next((name for name in names if not NAME.fullmatch(name)), None)
        if odd is not None:
            raise UserError(f"{keys.origin}: {key} {odd!r} is no name of a module; a regex stands alone, not in a list")
        return ("all-linear",) if names == ("all-linear",) else names
    if "/" in value:
        raise UserError(f"{keys.origin}: {key} {value!r} is neither a list of names nor a regex of them")
    return (f"/{value}/",)
