"""Packing and lengths on the command line: every question takes them, and what is wrong ends in one line."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from perfmodel.cli import main

WHERE = ("--model", "gpt2", "--device", "l40s")
PADDED = (*WHERE, "--batch", "4", "--seq", "256", "--lengths", "60:150")


def told(*words: str) -> str:
    """What a command prints."""
    result = CliRunner().invoke(main, list(words))
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


@pytest.mark.parametrize("command", ["predict", "compare", "explain", "advise"])
def test_every_question_says_what_share_is_padding(command: str) -> None:
    """The line that sends a user to packing stands in every answer; the words are the same."""
    more = ("full", "lora", "--axes", "batch") if command == "explain" else ()
    text = told(command, *more, *PADDED)
    assert "of the tokens are padding" in text


def test_predict_tells_tokens_that_count() -> None:
    """Tokens per second of padding would flatter the larger batch."""
    assert "tokens/s of documents" in told("predict", *PADDED)
    value = json.loads(told("predict", *PADDED, "--json"))
    assert 0 < value["padding_share"] < 1
    assert value["setup"]["lengths"] == "60:150"


def test_a_sweep_has_a_column_of_padding(tmp_path: Path) -> None:
    """Rows of a grid are told apart by it."""
    table = tmp_path / "rows.csv"
    told("sweep", *WHERE, "--batch", "1+4", "--seq", "64+256", "--lengths", "60:150", "--output", str(table))
    header, *rows = table.read_text().splitlines()
    assert "padding_share" in header
    assert len(rows) == 8


def test_the_page_has_a_line_of_padding(tmp_path: Path) -> None:
    """As every other answer."""
    pytest.importorskip("jinja2")
    page = tmp_path / "page.html"
    told("report", *PADDED, "--axes", "none", "--output", str(page))
    assert "of the tokens are padding" in page.read_text()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--lengths", "nowhere.txt"), "no such file"),
        (("--lengths", "10:900"), "times its mean"),
        (("--lengths", "60:150", "--packing", "varlen"), "use packing dense"),
        (("--packing", "dense", "--group-by-length", "--lengths", "60:64"), "leaves no padding"),
        (("--group-by-length",), "means nothing without --lengths"),
        (("--lengths", "60:150", "--attention", "flash2"), "use sdpa"),
    ],
)
def test_what_cannot_be_is_one_line(words: tuple[str, ...], complaint: str) -> None:
    """Exit code 2, and how to put it right."""
    result = CliRunner().invoke(main, ["predict", *WHERE, "--batch", "2", "--seq", "64", *words])
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert len(result.stderr.splitlines()) == 1
