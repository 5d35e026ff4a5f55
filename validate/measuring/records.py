"""The file of records: JSON lines, one an environment or a visit, never half a line.

A new line is added by writing the whole file to a temporary name, syncing it to disk and renaming it, so that a process
that is killed at any moment leaves either the old file or the new one. Grids are small (hundreds of lines).
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from perfmodel.errors import UserError, nearest
from perfmodel.program.part import PHASES
from perfmodel.resources import parsed, read_text, written

SCHEMA = 1
Record = dict[str, Any]


def read_records(path: Path) -> list[Record]:
    """All records of a file.

    Raises:
        UserError: the file is missing, or a line is not a record of a known schema.
    """
    records = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        record = parsed(line, json.loads, "JSON", f"{path}, line {number}")
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            raise UserError(f"{path}, line {number}: not a record of schema {SCHEMA}")
        _whole(record, f"{path}, line {number}")
        records.append(record)
    return records


FORMS: dict[str, dict[str, type]] = {  # kind -> what such a record must hold
    "environment": {"id": str, "device": str, "host": dict},
    "visit": {"id": str, "round": int, "environment": str, "cell": dict, "status": str},
    "cell": {"model": str, "config": dict, "method": str, "setup": dict},
    "ok": {"seconds": dict, "memory": dict},
    "parallel": {"kind": str, "processes": int, "backend": str},
    "microbench": {"case": dict, "seconds": dict},
    "host": {"program": dict, "seconds": dict},
    "unmeasured": {"unit": str, "status": str, "message": str},
}
KINDS = ("environment", "visit", "microbench", "host", "unmeasured")
STOPPED = ("ok", "oom", "error")  # how a visit ends
LONGEST = 1e6  # seconds: no step takes so long


def _whole(record: Record, where: str) -> None:
    kind = record.get("kind")
    if kind not in KINDS:
        raise UserError(f"{where}: unknown kind of record {kind!r}: {nearest(str(kind), KINDS)}")
    _holds(record, kind, where)
    if kind != "visit":
        return
    _holds(record["cell"], "cell", f"{where}: cell")
    if "parallel" in record:
        _of_several(record, where)
    if record["status"] not in STOPPED:
        raise UserError(f"{where}: unknown status {record['status']!r}")
    if record["status"] == "ok":
        _holds(record, "ok", where)
        if not _times(record["seconds"]) or not _positive_number(record["memory"].get("peak")):
            raise UserError(f"{where}: a visit that ended well holds seconds of steps and the peak of memory")
        traced = record.get("traced", {})
        tables = [record.get("calls", {}), *(traced.values() if isinstance(traced, dict) else [traced])]
        if not all(_by_phase(table, _whole_number) for table in tables):
            raise UserError(f"{where}: calls must be numbers by phase and name")
        profile = record.get("profile", {})
        if not isinstance(profile, dict) or not _by_phase(profile.get("by_call", {}), _kernels):
            raise UserError(f"{where}: by_call must be numbers and seconds of kernels by phase and name")
        if not _share(profile.get("communication_share", 0.0)):
            raise UserError(f"{where}: communication_share must be a share from 0 to 1")


def _of_several(record: Record, where: str) -> None:
    """Check what a visit of several processes tells besides."""
    told = record["parallel"]
    if not isinstance(told, dict):
        raise UserError(f"{where}: parallel is not a dict")
    _holds(told, "parallel", f"{where}: parallel")
    counts = [told[name] for name in ("processes", "nodes", "cores") if name in told]
    if not all(map(_whole_number, counts)) or not _by_phase(record.get("messages", {}), _message):
        raise UserError(f"{where}: processes, nodes, cores and messages must be numbers, messages by phase and name")


def _holds(record: Record, kind: str, where: str) -> None:
    for name, form in FORMS[kind].items():
        if not isinstance(record.get(name), form):
            raise UserError(f"{where}: {name} is missing or not a {form.__name__}")


def _times(seconds: Record) -> bool:
    """Whether every phase and the step have times of sense, equally many."""
    rows = [seconds.get(name) for name in (*PHASES, "step")]
    numbers = all(isinstance(row, list) and row and all(_positive(s) for s in row) for row in rows)
    return numbers and len({len(row) for row in rows if isinstance(row, list)}) == 1


def _by_phase(table: Any, good: Callable[[Any], bool]) -> bool:
    """Whether a table has good values by phase and name."""
    return isinstance(table, dict) and all(
        isinstance(names, dict) and all(map(good, names.values())) for names in table.values()
    )


def _whole_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _positive_number(value: Any) -> bool:
    return _whole_number(value) and bool(value)


def _message(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_whole_number, value))


def _kernels(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and _whole_number(value[0])


def _share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < LONGEST


def append_records(path: Path, *records: Record) -> None:
    """Add records, all or none; on return they are on disk.

    Raises:
        UserError: the file cannot be written.
    """
    lines = "".join(json.dumps({"schema": SCHEMA, **record}, allow_nan=False) + "\n" for record in records)
    with written(path) as place:
        before = path.read_bytes() if path.is_file() else b""
        with place.open("wb") as file:
            file.write(before + lines.encode())
            file.flush()
            os.fsync(file.fileno())


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


def done(records: list[Record], environment: str) -> set[tuple[int, str]]:
    """(round, cell id) of the visits that have a record of an environment: another's would pass for one of here."""
    return {(r["round"], r["id"]) for r in records if r.get("kind") == "visit" and r["environment"] == environment}
