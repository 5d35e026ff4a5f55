"""The keys and values that a config file holds, YAML or JSON."""

from functools import partial
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..resources import LARGEST, json_object, mapping, parsed, read_text

LARGEST_YAML = 2**20  # bytes
MOST_VALUES = 100_000  # those behind an alias count wherever it stands


def read_values(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML or JSON file.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    return _parsed(path, read_text(path, LARGEST if path.suffix == ".json" else LARGEST_YAML))


def values_alone(name: str, text: str) -> tuple[Path, dict[str, Any]]:
    """A file's name without its folders, and the keys and values of its text.

    Raises:
        UserError: a text that is too large, or holds something else.
    """
    path = Path(Path(name).name)
    if len(text.encode(errors="replace")) > LARGEST_YAML:
        raise UserError(f"{path}: larger than {LARGEST_YAML // 2**20} MiB, so not what is read here")
    return path, _parsed(path, text)


def _parsed(path: Path, text: str) -> dict[str, Any]:
    if path.suffix == ".json":
        return json_object(text, str(path))
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # that of C is ten times as fast
    values = mapping(parsed(text, partial(yaml.load, Loader=loader), "YAML", str(path), yaml.YAMLError), str(path))
    _check_size(values, path)
    return {str(key): value for key, value in values.items()}


def _check_size(values: Any, path: Path) -> None:
    """Raise `UserError` where few aliases stand for a great many values, which nothing may walk through or print."""
    waiting, seen = [values], 0
    while waiting:
        value = waiting.pop()
        seen += 1
        if isinstance(value, (dict, list, tuple, set)):
            waiting.extend(value.values() if isinstance(value, dict) else value)
            if seen + len(waiting) > MOST_VALUES:
                raise UserError(f"{path}: more than {MOST_VALUES:,} values, so not a training config")
