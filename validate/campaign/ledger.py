"""The records of a campaign: what is done, and what is kept of it when the process dies."""

import time
from pathlib import Path

from perfmodel.errors import UserError
from perfmodel.resources import written

from ..measuring import records
from ..measuring.records import Record

HELD = 1.0  # s: records of quick units wait so long, so that not every one rewrites the file
OPEN = ("skipped", "missing")  # why a unit was not begun: it will be when the reason is gone


class Ledger:
    """The file of records, and the units that need not be done again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        mend(path)
        self.records: list[Record] = records.read_records(path) if path.exists() else []
        self.waiting: list[Record] = []
        self.since = time.perf_counter()

    @property
    def done(self) -> set[str]:
        """Ids of the units that were measured or failed."""
        return {r["unit"] for r in self.records if "unit" in r and r.get("status") not in OPEN}

    def keep(self, record: Record, *, now: bool = False) -> None:
        """Take a record; it is on disk at once, or a moment later with others."""
        self.records.append(record)
        self.waiting.append(record)
        if now or time.perf_counter() - self.since > HELD:
            self.flush()

    def keep_once(self, record: Record) -> None:
        """Take a record of a unit that was not begun, unless it says what is known."""
        same = ("unit", "status", "message")
        if not any(all(r.get(k) == record[k] for k in same) for r in self.records):
            self.keep(record)

    def flush(self) -> None:
        """Bring what waits to disk."""
        if self.waiting:
            records.append_records(self.path, *self.waiting)
        self.waiting = []
        self.since = time.perf_counter()


def mend(path: Path) -> None:
    """Cut a last line that was not written to its end, as a file that was copied while it grew may have.

    Raises:
        UserError: the file cannot be read or written.
    """
    try:
        whole = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise UserError(f"{path}: cannot be mended ({error.strerror})") from None
    if whole and not whole.endswith(b"\n"):
        with written(path, "mended") as place:
            place.write_bytes(whole[: whole.rfind(b"\n") + 1])
