"""Where the project's data lies (beside the package in a checkout, inside it in a wheel), and how files are written."""

import json
import os
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from errno import EISDIR
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

from .errors import UserError

_PACKAGE = Path(__file__).resolve().parent
DATA = _PACKAGE / "data" if (_PACKAGE / "data").is_dir() else _PACKAGE.parent / "data"

# Bytes of a file that is read whole. Records of a measurement have under one MiB; as lists in lists JSON takes 24 times
# its length in memory.
LARGEST = 16 * 2**20
GZIP = b"\x1f\x8b"

T = TypeVar("T")


def stems(folder: Path, ending: str) -> tuple[str, ...]:
    """Names of a folder's files that have an ending, without it, sorted."""
    return tuple(sorted(name.removesuffix(ending) for name in os.listdir(folder) if name.endswith(ending)))


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file is there; False also for a text that cannot be a path."""
    return os.path.isfile(path)


def read_text(path: Path, most: int = LARGEST) -> str:
    """The text of a UTF-8 file of at most so many bytes, with or without a byte order mark.

    Raises:
        UserError: as `read_bytes`, or it is no UTF-8.
    """
    try:
        return read_bytes(path, most).decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def read_bytes(path: Path, most: int = LARGEST) -> bytes:
    """What a file of at most so many bytes holds.

    Raises:
        UserError: it cannot be read, is larger, or is no regular file: a pipe might never end, or never begin.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        what = os.strerror(EISDIR) if os.path.isdir(path) else "not a regular file"
        raise UserError(f"{path}: cannot be read ({what})")
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # a name that cannot be a path
        raise UserError(f"{path}: cannot be read ({error})") from None
    if len(content) > most:
        raise _too_large(path, most)
    return content


def read_packed(path: Path, most: int = LARGEST) -> bytes:
    """What a file holds, of a gzipped one what was packed: at most so many bytes, as a few can stand for gigabytes.

    Raises:
        UserError: as `read_bytes`, or it is not whole.
    """
    content = read_bytes(path, most)
    if not content.startswith(GZIP):
        return content
    import gzip
    import zlib

    try:
        with gzip.open(BytesIO(content)) as packed:
            found = packed.read(most + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if len(found) > most:
        raise _too_large(path, most)
    return found


def _too_large(path: Path, most: int) -> UserError:
    return UserError(f"{path}: larger than {most // 2**20} MiB, so not what is read here")


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
    return json_object(read_text(path), str(path))


def json_object(text: str, where: str) -> dict[str, Any]:
    """The object that a text in JSON holds; `where` is its place in complaints.

    Raises:
        UserError: it is not JSON, or holds something else.
    """
    return mapping(parsed(text, json.loads, "JSON", where), where)


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
    with written(path) as place:
        place.write_text(text, encoding="utf-8")


def make_parent(path: Path) -> None:
    """Make the folder of a file that is to be written.

    Raises:
        UserError: it cannot be made or written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be made ({error.strerror})") from None
    check_parent(path)


def check_parent(path: Path) -> None:
    """Look whether a file can be written, before the work whose result it is to hold.

    Raises:
        UserError: its folder is missing or cannot be written to.
    """
    if not path.parent.is_dir():
        raise UserError(f"{path}: cannot be written (no folder {path.parent})")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path.parent}: cannot be written")


@contextmanager
def written(path: Path, done: str = "written") -> Iterator[Path]:
    """Where to write what is to be at `path`: a new file beside it, which takes its place if all went well.

    A link stays one, the file that it names is written; devices and pipes are written as they are.

    Args:
        done: the verb of a complaint.

    Raises:
        UserError: it cannot be written.
    """
    try:
        target = Path(os.path.realpath(path))
    except ValueError as error:  # a name that cannot be a path
        raise UserError(f"{str(path)!r}: cannot be {done} ({error})") from None
    try:
        if target.exists() and not target.is_file():
            yield target
            return
        place = target.with_name(f".{target.name[:100]}.{os.urandom(4).hex()}.part")
        try:
            yield place
            if target.exists():
                place.chmod(target.stat().st_mode & 0o777)
            place.replace(target)
        finally:
            with suppress(OSError):
                place.unlink()
    except OSError as error:
        raise UserError(f"{path}: cannot be {done} ({error.strerror or error})") from None
