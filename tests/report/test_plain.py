"""Text tables: nothing is lost, numbers stay whole, and lines end where the terminal does."""

import subprocess
import sys

import pytest
from click import style, unstyle
from hypothesis import given
from hypothesis import strategies as st

from perfmodel import units
from perfmodel.report.plain import paragraph, show, table

WORDS = st.text("abcdefg", min_size=1, max_size=12)
TEXTS = st.lists(WORDS, max_size=8).map(" ".join)
NUMBERS = st.sampled_from(["", "117 ms", "1,234", "3.10 faster", "8.89 GB *"])
ROWS = st.lists(st.tuples(TEXTS, NUMBERS, NUMBERS, TEXTS), max_size=5)


def laid_out(heads: tuple[str, ...], rows: list[tuple[str, ...]], width: int) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        return table(heads, rows, left=(0, 3)).split("\n")


@given(rows=ROWS, width=st.integers(60, 120))
def test_a_table_fits_the_terminal_and_keeps_every_number_whole(rows: list[tuple[str, ...]], width: int) -> None:
    """A number that goes on in the next line reads as two; a line that the terminal breaks reads as no table."""
    lines = laid_out(("what it is", "measured here", "elsewhere", "remarks"), rows, width)
    assert max(map(len, lines)) <= width
    for _, *numbers, _ in rows:
        assert any(all(number in line for number in numbers) for line in lines)
    told = sorted(word for row in rows for cell in row for word in cell.split())
    head = ["what", "it", "is", "measured", "here", "elsewhere", "remarks"]
    assert sorted(word for line in lines for word in line.split()) == sorted([*told, *head])


@pytest.mark.parametrize("power", range(1, 6))
def test_a_prefix_begins_at_its_power_of_a_thousand(power: int) -> None:
    """1,000 MB would be another number than 1 GB to whoever reads a column."""
    assert units.nbytes(1000.0**power) == f"1.00 {' kMGTP'[power]}B"
    assert units.nbytes(0.99 * 1000**power) == f"990 {' kMGTP'[power - 1]}B".replace("  ", " ")


def test_columns_line_up() -> None:
    """Text begins where its head begins, numbers end where theirs ends, heads stand on the first row."""
    assert laid_out(("", "step time", "", "of"), [("a", "1 ms", "", "b"), ("long name", "123 ms", "", "c")], 23) == [
        "             step",
        "             time    of",
        "a            1 ms    b",
        "long name  123 ms    c",
    ]


@given(rows=ROWS)
def test_styles_take_no_room(rows: list[tuple[str, ...]]) -> None:
    """Colours on a terminal must not push the columns apart."""
    heads = ("", "a", "b", "c")
    styled = [(style(a, bold=True), style(b, fg="red"), c, d) for a, b, c, d in rows]
    assert [unstyle(line).rstrip() for line in laid_out(heads, styled, 80)] == laid_out(heads, rows, 80)


def test_what_words_alone_cannot_fit_is_broken_in_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of published rows are one long word: it goes on below, beside the figures."""
    monkeypatch.setenv("COLUMNS", "36")
    name = "fms-2025-02-07-mistral-7b-lora-b8-none"
    lines = table(("row", "measured", "error"), [(name, "9.77 s", "+4.3 %")]).splitlines()
    assert max(map(len, lines)) <= 36
    assert "".join(line[:18].strip() for line in lines[1:]) == name
    monkeypatch.setenv("COLUMNS", "20")
    assert paragraph("a note on a/very/long/path/to/some/file", indent="  ").splitlines() == [
        "a note on", "  a/very/long/path/t", "  o/some/file",
    ]  # fmt: skip


def test_times_of_a_column_have_three_digits_where_the_longest_is() -> None:
    """Their points line up; a fourth digit would claim more than a prediction knows."""
    assert units.alike([0.4561, 0.0123]) == ["456", "12", "ms"]
    assert units.alike([4.561e-6, 0.0]) == ["4.56", "0.00", "us"]
    assert units.alike([0.4561], digits=4) == ["456.1", "ms"]


def test_styles_go_only_to_terminals(capsys: pytest.CaptureFixture[str]) -> None:
    """Files and pipes stay free of escapes."""
    show(f"a {style('bold', bold=True)} word", colour="red")
    assert capsys.readouterr().out == "a bold word\n"


def test_a_command_starts_without_rich() -> None:
    """It would double the cold start of every command; only progress bars need it."""
    code = "import sys; from perfmodel.report import terminal, advice, explained; assert 'rich' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
