"""The date of today, or the one that a reproducible build sets."""

import os
from datetime import UTC, date, datetime

from .errors import UserError

FIXED = "SOURCE_DATE_EPOCH"  # seconds since 1970 (https://reproducible-builds.org/specs/source-date-epoch/)


def today() -> date:
    """What pages are signed with and ages of prices are counted to.

    Raises:
        UserError: the environment's SOURCE_DATE_EPOCH is no time.
    """
    fixed = os.environ.get(FIXED)
    if not fixed:
        return date.today()
    try:
        return datetime.fromtimestamp(int(fixed), UTC).date()
    except (ValueError, OverflowError, OSError):
        raise UserError(f"{FIXED} {fixed!r} must be whole seconds since 1970") from None
