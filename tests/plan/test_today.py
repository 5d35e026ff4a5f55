"""Ages of prices are counted to today, or to the date that a reproducible build sets."""

from datetime import date

import pytest

from perfmodel.errors import UserError
from perfmodel.today import today


def test_a_build_sets_the_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's examples would otherwise be another month's in a month."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1796083200")
    assert today() == date(2026, 12, 1)
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    assert abs((today() - date.today()).days) <= 1


@pytest.mark.parametrize("fixed", ["tomorrow", "1e9", "9" * 30])
def test_what_is_no_time_is_refused(monkeypatch: pytest.MonkeyPatch, fixed: str) -> None:
    """In one line, as any other wrong input."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", fixed)
    with pytest.raises(UserError, match="SOURCE_DATE_EPOCH"):
        today()
