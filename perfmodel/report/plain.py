"""Text tables without Rich, which would take a sixth of the time that `perfmodel explain` and `advise` have."""

from collections.abc import Sequence
from shutil import get_terminal_size
from textwrap import fill

import click


def table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,), long_last: bool = False
) -> str:
    """Columns two spaces apart, numbers to the right.

    Args:
        left: the columns of text.
        long_last: whether the last column goes on in further lines where the terminal ends.
    """
    lines = [heads, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]

    def cell(i: int, text: str) -> str:
        return text.ljust(widths[i]) if i in left else text.rjust(widths[i])

    made = ["  ".join(cell(i, text) for i, text in enumerate(line)).rstrip() for line in lines]
    indent = " " * sum(width + 2 for width in widths[:-1])
    return "\n".join(paragraph(line, indent=indent) if long_last else line for line in made)


def paragraph(text: str, *, indent: str = "") -> str:
    """A text in lines as wide as the terminal; all but the first are indented."""
    return fill(text, get_terminal_size().columns, subsequent_indent=indent, break_on_hyphens=False)


def show(text: str, *, bold: bool = False, dim: bool = False) -> None:
    """Print; styled where the output is a terminal."""
    click.secho(text, bold=bold or None, dim=dim or None)
