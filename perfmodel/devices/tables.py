"""Ops sorted into tables by the model that prices them; each table is priced in one vectorised call, over the grid."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

Row = tuple[Any, ...]  # a model's arguments, each an int or an array over the grid
Model = Callable[..., np.ndarray]  # (*key, *columns) -> seconds, shape (rows, *grid)


@dataclass(eq=False, repr=False)
class _Table:
    """Rows of one model, by what must be equal within a call; equal rows are priced once for all their ops."""

    rows: dict[Any, dict[Row, tuple[Row, list[int]]]] = field(default_factory=dict)

    def add(self, key: Any, i: int, row: Row, equal: Row) -> None:
        """A row of op `i`; rows with the same `equal` have the same price."""
        self.rows.setdefault(key, {}).setdefault(equal, (row, []))[1].append(i)


class Tables:
    """The tables of all models, by name."""

    def __init__(self) -> None:
        self.tables: dict[str, _Table] = {}
        self.arrays: dict[Any, list[np.ndarray]] = {}
        self.tokens: dict[int, tuple[np.ndarray, Any]] = {}  # by id, which the array beside keeps its own

    def add(self, model: str, key: tuple[Any, ...], i: int, *row: Any) -> None:
        """Put a row of op `i` into a model's table; an op may have several rows."""
        varies = tuple([isinstance(x, np.ndarray) for x in row])
        equal = row
        if True in varies:
            equal = tuple([self._token(x) if of_grid else x for x, of_grid in zip(row, varies, strict=True)])
        self.tables.setdefault(model, _Table()).add((key, varies), i, row, equal)

    def seconds(self, ops: int, models: Mapping[str, Model]) -> np.ndarray:
        """Seconds of each op, the sum of its rows, shape (ops, *grid); 0 for an op without rows."""
        priced: list[tuple[list[list[int]], np.ndarray]] = []
        for name, table in self.tables.items():
            for (key, _), rows in table.rows.items():
                seconds = _price([row for row, _ in rows.values()], partial(models[name], *key))
                priced.append(([index for _, index in rows.values()], seconds))
        grid = np.broadcast_shapes(*(seconds.shape[1:] for _, seconds in priced)) if priced else ()
        total = np.empty((ops, *grid))
        without = set(range(ops))
        for indices, seconds in priced:
            for index, of_row in zip(indices, seconds, strict=True):
                for i in index:
                    total[i] = of_row if i in without else total[i] + of_row
                    without.discard(i)
        total[list(without)] = 0.0
        return total

    def _token(self, x: np.ndarray) -> Any:
        """What stands for an array's values: computing the same dim twice may make two arrays."""
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


def _price(rows: list[Row], model: Model) -> np.ndarray:
    """Stack the rows' arguments to arrays of shape (rows, *grid) and price them at once.

    A column of numbers has shape (rows, 1, …): what does not vary over the grid is worked out once.
    """
    columns = list(zip(*rows, strict=True))
    shapes = {x.shape for column in columns for x in column if isinstance(x, np.ndarray)}
    grid = np.broadcast_shapes(*shapes) if shapes else ()
    return np.asarray(model(*(_stacked(column, grid) for column in columns)))


def _stacked(column: tuple[Any, ...], grid: tuple[int, ...]) -> np.ndarray:
    if not any(isinstance(x, np.ndarray) for x in column):
        return np.array(column, dtype=np.float64).reshape(len(column), *(1 for _ in grid))
    stacked = np.empty((len(column), *grid))
    for i, x in enumerate(column):
        stacked[i] = x
    return stacked
