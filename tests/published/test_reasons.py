"""Why predictions miss: kept as data, for rows that exist, by someone who looked."""

import csv

import pytest

from perfmodel.resources import DATA
from validate.published import layers
from validate.published import steps as published
from validate.published.reasons import FILE, reason

ROWS = {
    "steps": {row.id for row in published.published_steps()},
    "families": {row.id for row in published.published_steps(published.FAMILIES)},
    "several_gpus": {row.id for row in published.published_steps(published.SEVERAL)},
    "lorafusion_layers": {row.id for row in layers.published_layers()},
}


def known(table: str) -> set[str]:
    if table in ROWS:
        return ROWS[table]
    pytest.importorskip("peft")
    from validate.published import tuners

    return {row.id for row in tuners.published_tuners(DATA / "published" / f"{table}.csv")}


def test_every_reason_belongs_to_a_row_and_says_how_it_was_found() -> None:
    """A reason of a row that was renamed would silently no longer be printed; one without evidence is a guess."""
    with FILE.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    for row in rows:
        assert (DATA / "published" / f"{row['table']}.csv").is_file()
        assert row["id"] in known(row["table"]), row["id"]
        assert len(row["reason"]) > 20
        assert row["found_by"]


def test_a_row_without_a_reason_says_so() -> None:
    """Better than a blank, which reads like an answer."""
    assert reason("steps", "no such row") == "not looked into yet"
