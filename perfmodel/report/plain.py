"""Text for the terminal: tables, paragraphs, lines. Without Rich, whose loading would double a cold start."""

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import click

from ..errors import UserError, escaped

GAP = 2  # between columns
HEAD = 4  # of a head over numbers, which may be none
LEAST = 16  # characters that a column of text keeps where its words have to be broken


def _columns() -> int:
    """Columns of the terminal, or as many as $COLUMNS says, else 80; `shutil`, which has it, loads archive formats."""
    asked = os.environ.get("COLUMNS", "")
    if asked.isdecimal() and int(asked):
        return int(asked)
    try:
        return os.get_terminal_size(sys.__stdout__.fileno()).columns or 80  # type: ignore[union-attr]
    except (AttributeError, ValueError, OSError):
        return 80


def table(heads: Sequence[str], rows: Iterable[Iterable[Any]], *, left: Sequence[int] = (0,), title: str = "") -> str:
    """Columns two spaces apart, numbers to the right.

    Where the terminal is narrow, heads and then columns of text go on in further lines; numbers never do.

    Args:
        rows: cells, shown as `str` has them; a cell may be styled (`click.style`).
        left: the columns of text.
    """
    lines = [[str(cell).replace("\n", " ") for cell in row] for row in rows]
    widths = _widths(heads, lines, left)

    def laid_out(line: Sequence[str], *, low: bool = False) -> list[str]:
        """The lines of a row; its cells stand high or low."""
        cells = [_wrapped(text, width) for text, width in zip(line, widths, strict=True)]
        height = max(map(len, cells))
        for i, cell in enumerate(cells):
            filler = [""] * (height - len(cell))
            cells[i] = [_padded(text, widths[i], i in left) for text in (filler + cell if low else cell + filler)]
        return [(" " * GAP).join(parts).rstrip() for parts in zip(*cells, strict=True)]

    made = [paragraph(click.style(title, bold=True))] if title else []
    made += laid_out(heads, low=True)
    return "\n".join(made + [text for line in lines for text in laid_out(line)])


def _widths(heads: Sequence[str], lines: list[list[str]], left: Sequence[int]) -> list[int]:
    """Width of each column: what it would take, or less where the terminal ends."""
    wanted = [_widths_of(head, [line[i] for line in lines], i in left) for i, head in enumerate(heads)]
    widths, *less = map(list, zip(*wanted, strict=True))
    room = _columns() - GAP * (len(heads) - 1)
    for least in less:
        while sum(widths) > room and (loose := [i for i, width in enumerate(widths) if width > least[i]]):
            widths[max(loose, key=widths.__getitem__)] -= 1
    return widths


def _widths_of(head: str, column: list[str], is_text: bool) -> tuple[int, int, int, int]:
    """Width of a column whole, with heads of numbers in several lines, with text in several, with long words broken."""
    longest = max(map(_length, column), default=0)
    word = max((_length(word) for text in (head, *(column if is_text else ())) for word in text.split()), default=0)
    whole = max(_length(head), longest)
    if is_text:
        return whole, whole, word, min(word, LEAST)
    return whole, max(word, longest), max(word, longest), max(longest, min(word, HEAD))


def _length(text: str) -> int:
    return len(click.unstyle(text))


def _padded(text: str, width: int, is_text: bool) -> str:
    spaces = " " * (width - _length(text))
    return text + spaces if is_text else spaces + text


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """A text in lines of at most so many characters, of which styles are none."""
    if _length(text) <= width:
        return [text]
    lines: list[str] = []
    for word in text.split(" "):
        if lines and _length(lines[-1]) + 1 + _length(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(indent + word if lines else word)
        while _length(lines[-1]) > width > len(indent) and lines[-1].isprintable():
            lines[-1:] = [lines[-1][:width], indent + lines[-1][width:]]
    return lines


def paragraph(text: str, *, indent: str = "") -> str:
    """A text in lines as wide as the terminal; all but the first are indented."""
    return "\n".join(_wrapped(text.replace("\n", " "), _columns(), indent))


def show(text: str = "", *, bold: bool = False, dim: bool = False, colour: str | None = None) -> None:
    """Print; styled where the output is a terminal (and NO_COLOR is not set)."""
    click.secho(
        text, bold=bold or None, dim=dim or None, fg=colour, color=False if os.environ.get("NO_COLOR") else None
    )


def notes(told: Iterable[str]) -> None:
    """Notes below a result."""
    for note in told:
        show(paragraph(f"note: {escaped(note)}"), dim=True)


def print_json(value: Any) -> None:
    """Write a value to standard output.

    Raises:
        UserError: a figure that JSON has no word for.
    """
    try:
        text = json.dumps(value, indent=1, allow_nan=False)
    except ValueError:
        raise UserError("a figure of the answer is not finite, which JSON has no word for") from None
    sys.stdout.write(text)
    sys.stdout.write("\n")
