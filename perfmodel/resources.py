"""Where the project's data lies (beside the package in a checkout, inside it in a wheel), and how files are written."""

import json
import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from .errors import UserError

_PACKAGE = Path(__file__).resolve().parent
DATA = _PACKAGE / "data" if (_PACKAGE / "data").is_dir() else _PACKAGE.parent / "data"

T = TypeVar("T")


def stems(folder: Path, ending: str) -> tuple[str, ...]:
    """Names of a folder's files that have an ending, without it, sorted."""
    return tuple(sorted(name.removesuffix(ending) for name in os.listdir(folder) if name.endswith(ending)))


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file is there; False also for a text that cannot be a path."""
    return os.path.isfile(path)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # not UTF-8, or a name that cannot be a path
        raise UserError(f"{path}: cannot be read ({error})") from None


def parsed(text: str, parse: Callable[[str], T], form: str, where: str, *errors: type[Exception]) -> T:
    """What a parser makes of a text; `form` names the format and `where` the place in complaints.

    Args:
        errors: what the parser raises besides ValueError.

    Raises:
        UserError: the text is not of that form, or nested too deeply.
    """
    expected: tuple[type[Exception], ...] = (ValueError, *errors)
    try:
        return parse(text)
    except RecursionError:
        raise UserError(f"{where}: not valid {form} (nested too deeply)") from None
    except expected as error:
        raise UserError(f"{where}: not valid {form} ({' '.join(str(error).split())})") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        UserError: it cannot be read, is not JSON, or holds something else.
    """
    return mapping(parsed(read_text(path), json.loads, "JSON", str(path)), str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """The table that a TOML file holds.

    Raises:
        UserError: it cannot be read or is not TOML.
    """
    return parsed(read_text(path), tomllib.loads, "TOML", str(path))


def mapping(value: Any, where: str) -> dict[str, Any]:
    """A value that has to hold keys and values."""
    if not isinstance(value, dict):
        what = {list: "a list", str: "a text", bool: "true or false", type(None): "nothing"}.get(
            type(value), "a number"
        )
        raise UserError(f"{where}: keys and values are expected, this holds {what}")
    return value


def read_rows(path: Path, row: Callable[[dict[str, str]], T]) -> list[T]:
    """The rows of a CSV file, each made of its fields by name.

    Raises:
        UserError: it cannot be read, or a row has not the columns and values that `row` needs; the line is named.
    """
    import csv

    reader = csv.DictReader(read_text(path).splitlines(), strict=True, restval="")
    try:
        return [row(record) for record in reader]
    except KeyError as error:
        raise UserError(f"{path}, line {reader.line_num}: no column {error}") from None
    except (ValueError, TypeError, csv.Error) as error:  # UserError too
        raise UserError(f"{path}, line {reader.line_num}: {error}") from None


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
