"""Rows of columns as CSV, JSON or Parquet, written block by block under a temporary name and renamed at the end."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ..errors import UserError, nearest
from ..resources import written

Columns = dict[str, np.ndarray]
Write = Callable[[Columns], None]


@contextmanager
def rows_to(path: Path) -> Iterator[Write]:
    """A function that appends blocks of rows to a file, which appears whole or not at all.

    Raises:
        UserError: an unknown suffix, a missing package, a place that cannot be written.
    """
    formats = {".csv": _csv, ".json": _json, ".parquet": _parquet}
    if path.suffix not in formats:
        raise UserError(f"{path}: unknown format {path.suffix!r}: {nearest(path.suffix, formats)}")
    with written(path) as place, formats[path.suffix](place) as write:
        yield write


def records(columns: Columns) -> Iterator[dict[str, Any]]:
    """The rows as plain dicts."""
    for values in zip(*(c.tolist() for c in columns.values()), strict=True):
        yield dict(zip(columns, values, strict=True))


@contextmanager
def _csv(path: Path) -> Iterator[Write]:
    import csv

    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")

        def write(columns: Columns) -> None:
            if not file.tell():
                writer.writerow(columns)
            writer.writerows(zip(*(_short(c).tolist() for c in columns.values()), strict=True))

        yield write


def _short(column: np.ndarray) -> np.ndarray:
    """Six digits are more than a model knows, and make smaller files."""
    if not np.issubdtype(column.dtype, np.floating):
        return column
    with np.errstate(divide="ignore"):
        digits = 10.0 ** (5 - np.floor(np.log10(np.abs(column))))
    digits = np.where(np.isfinite(digits), digits, 0.0)  # of zeros, and of what is not finite
    return np.where(digits, np.round(column * digits) / np.where(digits, digits, 1), column)


@contextmanager
def _json(path: Path) -> Iterator[Write]:
    with path.open("w", encoding="utf-8") as file:
        yield lambda columns: _append(file, columns)
        file.write("\n]\n" if file.tell() else "[]\n")


def _append(file: TextIO, columns: Columns) -> None:
    for row in records(columns):
        file.write(",\n" if file.tell() else "[\n")
        json.dump(row, file)


@contextmanager
def _parquet(path: Path) -> Iterator[Write]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError("Parquet needs pyarrow: pip install pyarrow, or write .csv") from None
    writer: Any = None

    def write(columns: Columns) -> None:
        nonlocal writer
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)

    try:
        yield write
    finally:
        if writer:
            writer.close()
