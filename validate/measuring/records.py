"""The file of records: JSON lines, one an environment or a visit, never half a line.

A new line is added by writing the whole file to a temporary name, syncing it to disk and renaming it, so that a process
that is killed at any moment leaves either the old file or the new one. Grids are small (hundreds of lines).
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from perfmodel.errors import UserError

SCHEMA = 1
Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    """All records of a file.

    Raises:
        UserError: the file is missing, or a line is not a record of a known schema.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            raise UserError(f"{path}, line {number}: not a record of schema {SCHEMA}")
        records.append(record)
    return records


def append(path: Path, *records: Record) -> None:
    """Add records, all or none; on return they are on disk.

    Raises:
        UserError: the file cannot be written.
    """
    lines = "".join(json.dumps({"schema": SCHEMA, **record}, allow_nan=False) + "\n" for record in records)
    temporary = path.with_name(path.name + ".part")
    try:
        before = path.read_bytes() if path.exists() else b""
        with temporary.open("wb") as file:
            file.write(before + lines.encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Keep a second measurement from writing to the same file; the lock goes with the process, not with its children.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """
    try:
        import fcntl
    except ImportError:  # no advisory locks on this system
        yield
        return
    lock = path.with_name(path.name + ".lock")
    try:
        file = lock.open("w")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{path}: another measurement is writing to it") from None
        yield


def done(records: list[Record]) -> set[tuple[int, str]]:
    """(round, cell id) of the visits that have a record."""
    return {(r["round"], r["id"]) for r in records if r.get("kind") == "visit"}
