"""Ops sorted into tables by the model that prices them; each table is priced in one vectorised call, over the grid."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..program.dims import VARIES
from ..program.formulas import Formula

Row = tuple[Any, ...]  # a model's arguments, each an int, an array over the grid, or a formula
Priced = tuple[str, tuple[Any, ...], Sequence[np.ndarray]]  # (model, key, columns)
FEW = 64  # points of a grid, over which what does not vary may be worked out at each: a call costs more
Model = Callable[..., np.ndarray]  # (*key, *columns) -> seconds, shape (rows, *grid)


@dataclass(eq=False, repr=False)
class _Table:
    """Rows of one model, by what must be equal within a call; equal rows are priced once for all their ops."""

    rows: dict[Any, dict[Row, tuple[Row, list[int]]]] = field(default_factory=dict)

    def add(self, key: Any, i: int, row: Row, equal: Row) -> None:
        """A row of op `i`; rows with the same `equal` have the same price."""
        self.rows.setdefault(key, {}).setdefault(equal, (row, []))[1].append(i)


class CallRows(NamedTuple):
    """The rows of one call of a model: `key` and `rows` are its arguments."""

    model: str
    key: tuple[Any, ...]
    rows: list[Row]

    @property
    def columns(self) -> tuple[np.ndarray, ...]:
        """The rows' arguments as arrays of shape (rows, *grid).

        A column of numbers has shape (rows, 1, …) but for a small grid: what does not vary is worked out once.
        """
        columns = list(zip(*self.rows, strict=True))
        shapes = {x.shape for column in columns for x in column if isinstance(x, np.ndarray)}
        grid = np.broadcast_shapes(*shapes) if shapes else ()
        return tuple([_stacked(column, grid) for column in columns])


class Places(NamedTuple):
    """Where the prices of ops are among those of all rows, one sheet after another.

    Attributes:
        first: of each op the first of its rows; one behind the last row for an op without rows.
        further: (op, row) of ops with several rows.
    """

    first: np.ndarray
    further: list[tuple[int, int]]


class Tables:
    """The tables of all models, by name."""

    def __init__(self) -> None:
        self.tables: dict[str, _Table] = {}
        self.arrays: dict[Any, list[np.ndarray]] = {}
        self.tokens: dict[int, tuple[np.ndarray, Any]] = {}  # by id, which the array beside keeps its own

    def add(self, model: str, key: tuple[Any, ...], i: int, *row: Any) -> None:
        """Put a row of op `i` into a model's table; an op may have several rows."""
        varies = tuple([isinstance(x, np.ndarray) and x.size > FEW for x in row])
        if any(isinstance(x, VARIES) for x in row):
            equal = tuple([self._token(x) if isinstance(x, VARIES) else x for x in row])
        else:
            equal = row
        self.tables.setdefault(model, _Table()).add((key, varies), i, row, equal)

    def sheets(self) -> list[CallRows]:
        """What is to be priced."""
        return [
            CallRows(name, key, [row for row, _ in rows.values()])
            for name, table in self.tables.items()
            for (key, _), rows in table.rows.items()
        ]

    def places(self, ops: int) -> Places:
        """Where the prices of so many ops are among those of `sheets`."""
        indices = [at for table in self.tables.values() for rows in table.rows.values() for _, at in rows.values()]
        first = np.full(ops, len(indices))
        further = []
        for row, at in enumerate(indices):
            for op in at:
                if first[op] < len(indices):
                    further.append((op, row))
                else:
                    first[op] = row
        return Places(first, further)

    def seconds(self, ops: int, models: Mapping[str, Model]) -> np.ndarray:
        """Seconds of so many ops (`summed_rows`)."""
        sheets = [(sheet.model, sheet.key, sheet.columns) for sheet in self.sheets()]
        return summed_rows(sheets, self.places(ops), models)

    def _token(self, x: Any) -> Any:
        """What stands for an array's values: computing the same dim twice may make two arrays."""
        if type(x) is Formula:
            return "formula", x.number
        if id(x) not in self.tokens:
            self.tokens[id(x)] = x, self._token_of_values(x)
        return self.tokens[id(x)][1]

    def _token_of_values(self, x: np.ndarray) -> Any:
        x = x.view(np.ndarray)
        key = (x.shape, x.flat[0], x.flat[-1], x.sum())
        known = self.arrays.setdefault(key, [])
        for n, other in enumerate(known):
            if x is other or np.array_equal(x, other):
                return key, n
        known.append(x)
        return key, len(known) - 1


def summed_rows(sheets: Sequence[Priced], places: Places, models: Mapping[str, Model]) -> np.ndarray:
    """Seconds of each op, the sum of its rows, shape (ops, *grid); 0 for an op without rows."""
    priced = [np.asarray(partial(models[name], *key)(*columns)) for name, key, columns in sheets]
    grid = np.broadcast_shapes(*(seconds.shape[1:] for seconds in priced))
    rows = [seconds if seconds.shape[1:] == grid else _over(seconds, grid) for seconds in priced]
    every = np.concatenate([*rows, np.zeros((1, *grid))])
    total: np.ndarray = every[places.first]
    for op, row in places.further:
        total[op] += every[row]
    return total


def _over(seconds: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    """Prices that do not vary along every axis of a grid, over all of it."""
    rows, *axes = seconds.shape
    return np.broadcast_to(seconds.reshape(rows, *(1,) * (len(grid) - len(axes)), *axes), (rows, *grid))


def _stacked(column: tuple[Any, ...], grid: tuple[int, ...]) -> np.ndarray:
    if not grid:
        return np.array(column, dtype=np.float64)
    if math.prod(grid) > FEW and not any(isinstance(x, np.ndarray) for x in column):
        return np.array(column, dtype=np.float64).reshape(len(column), *(1 for _ in grid))
    stacked = np.empty((len(column), *grid))
    for i, x in enumerate(column):
        stacked[i] = x
    return stacked
