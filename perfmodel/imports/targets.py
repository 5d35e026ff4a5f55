"""Target layers as PEFT has them: names, `all-linear`, or a regex of whole paths; weights that Axolotl unfreezes."""

import re

from ..errors import UserError
from .keys import Keys

NAME = re.compile(r"[\w.-]+")  # what is no more than the name of a module
RANGE = re.compile(r".+\[\d*(:\d*)?\]")  # Axolotl's pattern of some rows of a parameter
OLD, NEW = "block_sparse_moe", "mlp"  # a mixture's name in transformers 4 and 5


def as_targets(keys: Keys, key: str, *, alone_is_regex: bool = False) -> tuple[str, ...]:
    """Targets as a method takes them, each once; a regex stands between slashes.

    Args:
        alone_is_regex: whether the only entry of a list is a regex, too.

    Raises:
        UserError: neither names nor a regex.
    """
    value = keys.get(key)
    if alone_is_regex and isinstance(value, list) and len(value) == 1:
        (value,) = value
    if isinstance(value, str) and value.lower() == "all-linear":
        return ("all-linear",)
    if not isinstance(value, str) or ("," in value and NAME.fullmatch(value.replace(",", "").replace(" ", ""))):
        names = keys.names(key)
        odd = next((name for name in names if not NAME.fullmatch(name)), None)
        if odd is not None:
            raise UserError(f"{keys.origin}: {key} {odd!r} is no name of a module; a regex stands alone, not in a list")
        return ("all-linear",) if names == ("all-linear",) else tuple(dict.fromkeys(names))
    if "/" in value:
        raise UserError(f"{keys.origin}: {key} {value!r} is neither a list of names nor a regex of them")
    return (f"/{value}/",)


def unfrozen(keys: Keys, patterns: tuple[str, ...]) -> str:
    """Axolotl's patterns, of which a path has to match the beginning, as one regex of whole paths between slashes.

    A point stands for itself (`LayerNamePattern` of axolotl/utils/freeze.py).

    Raises:
        UserError: a pattern of some rows of a parameter, or one with a slash.
    """
    renamed = [pattern.replace(OLD, NEW) for pattern in patterns]
    if renamed != list(patterns):
        keys.differ(f"{OLD} as {NEW}, its name in transformers 5", "unfrozen_parameters")
    for pattern in renamed:
        if RANGE.fullmatch(pattern) or "/" in pattern:
            raise UserError(f"{keys.origin}: unfrozen_parameters {pattern!r}: some rows of a weight are not modelled")
    escaped = (re.sub(r"\.(?!\+)", r"\\.", pattern) for pattern in renamed)
    return "/" + "|".join(f"(?:{pattern}).*" for pattern in escaped) + "/"
