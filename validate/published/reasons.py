"""Why single predictions are far off: what was found by looking at them, kept as data beside the measurements."""

import csv
from functools import cache

from perfmodel.resources import DATA

FILE = DATA / "published" / "reasons.csv"
FAR = 0.25  # |relative error| from which a row needs a reason


@cache
def reasons(table: str) -> dict[str, str]:
    """Reasons by the rows' names, each with how it was found. `table` names a file of data/published."""
    with FILE.open(encoding="utf-8", newline="") as file:
        return {r["id"]: f"{r['reason']} [{r['found_by']}]" for r in csv.DictReader(file) if r["table"] == table}


def reason(table: str, row: str) -> str:
    """The reason of a row; a plain statement if nobody has looked for one."""
    return reasons(table).get(row, "not looked into yet")
