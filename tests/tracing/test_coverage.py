"""The list of model types that can be traced, and why the others cannot."""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("peft")

from perfmodel import cli
from validate.oracle import coverage


def test_coverage_goes_on_where_its_table_stops(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A scan of all types takes an hour or two; one that was stopped must not begin again."""
    table, told = tmp_path / "table.csv", coverage.CoverageRow("vision", "resnet", 1.5, "", 3, 16, 120)
    coverage.append_row(table, told)
    monkeypatch.setattr(coverage, "model_types", lambda *, quick: [("vision", "resnet"), ("vision", "none")])
    monkeypatch.setattr(coverage, "tuners", list)
    monkeypatch.setattr(
        coverage, "cover_model", lambda family, name: coverage.CoverageRow(family, name, 0.0, "no such type")
    )
    CliRunner().invoke(cli.main, ["validate", "coverage", "--output", str(table)])
    assert coverage.read_coverage(table) == [told, coverage.CoverageRow("vision", "none", 0.0, "no such type")]


def test_a_type_that_takes_too_long_is_given_up() -> None:
    """One endless program must not hold up the list."""
    with pytest.raises(TimeoutError, match="within 1 s"), coverage.patience(1):
        sum(1 for _ in iter(int, 1))


def test_a_worker_gives_up_too() -> None:
    """A worker's tasks run in a thread, which no signal reaches."""

    def endless() -> None:
        with coverage.patience(1):
            sum(1 for _ in iter(int, 1))

    with ThreadPoolExecutor(1) as pool, pytest.raises(TimeoutError, match="within 1 s"):
        pool.submit(endless).result()


def test_the_list_of_all_types_names_what_cannot_be_traced_and_why() -> None:
    """The committed scan: whoever wants to know about a type need not trace it."""
    rows = coverage.read_coverage()
    assert len({(row.kind, row.name) for row in rows}) == len(rows)
    assert all(row.reason or row.calls for row in rows)
    assert set(coverage.QUICK) <= {row.name for row in rows if row.ok}
    assert coverage.enough(rows)


def test_coverage_lists_what_can_be_traced_and_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of each: a tuner that works, one that lacks a package or data, a model type."""
    monkeypatch.setattr(coverage, "model_types", lambda *, quick: [("vision", "resnet")])
    monkeypatch.setattr(coverage, "tuners", lambda: ["LN_TUNING", "CPT"])
    result = CliRunner().invoke(cli.main, ["validate", "coverage", "--json"])
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert result.exit_code == 1, "one model type is not enough"
    assert rows["resnet"]["ok"]
    assert rows["LN_TUNING"]["ok"]
    assert "nonzero" in rows["CPT"]["reason"]


def test_the_fixed_list_of_types_spans_the_families() -> None:
    found = Counter(family for family, _ in coverage.model_types(quick=True))
    assert set(found) == {"causal", "masked", "seq2seq", "vision"}
    assert sum(found.values()) >= coverage.LEAST_TYPES
