"""What is measured: cells (model, method, setup) of a grid, and the order of their visits.

A grid is a TOML file. `[models.NAME]` holds a config.json inline, any other model is a bundled name or a path; every
`[[cells]]` table is a product of its models, methods and setups (keys of `Setup`).
"""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfmodel import architectures, methods
from perfmodel.architectures import Config
from perfmodel.errors import UserError, nearest
from perfmodel.prediction.given import setup_given
from perfmodel.resources import DATA, is_file, read_toml
from perfmodel.setup import Setup

GRIDS = DATA / "grids"
SIZES = ("small", "standard")
FACTORS = ("models", "methods", "setups")
COUNTS = {"rounds": 2, "warm_up": 2, "steps": 5}  # visits of a cell; steps of a visit that are not and that are timed


@dataclass(frozen=True)
class Cell:
    """One program to measure."""

    config: Config
    method: str
    setup: Setup

    @property
    def id(self) -> str:
        """A readable name that no other program has: model, method, what differs from the usual setup, a digest."""
        text = json.dumps([self.config.values, self.method, self.setup.as_dict()], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return f"{self.name} {digest}"

    @property
    def name(self) -> str:
        """The id without its digest, for people."""
        return f"{self.config.name} {self.method} {self._options(('dtype',))}"

    @property
    def place(self) -> str:
        """Model and setup in words: what all methods of a group share."""
        return f"{self.config.name} {self._options(('batch', 'seq', 'dtype'))}"

    def _options(self, always: Sequence[str]) -> str:
        usual = Setup().as_dict()
        return " ".join(f"{k}={v}" for k, v in self.setup.as_dict().items() if k in always or v != usual[k])

    @property
    def group(self) -> str:
        """What all methods in one setup of one model share; a speed-up is taken within it."""
        return json.dumps([self.config.values, self.setup.as_dict()], sort_keys=True)

    def as_dict(self) -> dict[str, Any]:
        """The cell as plain values, whole: a record needs no grid file beside it."""
        return {
            "model": self.config.name, "config": self.config.values, "method": self.method,
            "setup": self.setup.as_dict(),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Cell":
        """The cell that `as_dict` wrote.

        Raises:
            UserError: an option that no setup has, or a value that it cannot take.
        """
        config = Config(values["config"], values["model"], values["model"])
        return cls(config, values["method"], setup_given(None, values["setup"]))


@dataclass(frozen=True)
class Grid:
    """Cells, and how often each is visited and stepped."""

    name: str
    cells: tuple[Cell, ...]
    rounds: int
    warm_up: int
    steps: int

    def visits(self, seed: int) -> Iterator[tuple[int, Cell]]:
        """(round, cell): every round a new random order, so that drift of the machine favours no method."""
        for number in range(self.rounds):
            order = list(self.cells)
            random.Random(f"{seed} {number}").shuffle(order)
            for cell in order:
                yield number, cell


def load_grid(grid: str, device: str) -> Grid:
    """A bundled grid by name (small, standard) for a kind of device, or one's own by path.

    Raises:
        UserError: unknown grid, broken TOML, a model, method or setup that does not exist or does not fit.
    """
    path = GRIDS / f"{device}-{grid}.toml" if grid in SIZES else Path(grid)
    if not is_file(path):
        raise UserError(f"unknown grid {grid!r}: {nearest(grid, SIZES)} (or give the path of a TOML file)")
    return parse_grid(read_toml(path), path.stem, str(path))


def parse_grid(table: dict[str, Any], name: str, where: str) -> Grid:
    """A grid from its parsed TOML; `where` names the file in complaints."""
    for key in table:
        if key not in (*COUNTS, "models", "cells"):
            raise UserError(f"{where}: unknown key {key!r}: {nearest(key, [*COUNTS, 'models', 'cells'])}")
    counts = {key: grid_count(table.get(key, usual), key, where) for key, usual in COUNTS.items()}
    own = table.get("models", {})
    blocks = table.get("cells")
    if not isinstance(own, dict) or not isinstance(blocks, list) or not blocks:
        raise UserError(f"{where}: a grid holds [[cells]] tables, and may hold [models.NAME] tables")
    cells = [cell for block in blocks for cell in _product(block, own, where)]
    unique = {cell.id: cell for cell in cells}
    return Grid(name, tuple(unique.values()), **counts)


def grid_count(value: Any, key: str, where: str) -> int:
    """One of the counts of a grid.

    Raises:
        UserError: it is no whole number, or too small.
    """
    low = 0 if key == "warm_up" else 1
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise UserError(f"{where}: {key} must be a whole number from {low}, got {value!r}")
    return value


def _product(block: Any, own: dict[str, Any], where: str) -> Iterator[Cell]:
    if not isinstance(block, dict):
        raise UserError(f"{where}: [[cells]] must be a table, got {block!r}")
    for key in block:
        if key not in FACTORS:
            raise UserError(f"{where}: unknown key {key!r} in [[cells]]: {nearest(key, FACTORS)}")
    setups = [_setup(values, where) for values in _list(block, "setups", where)]
    for model in _texts(block, "models", where):
        config = _config(own[model], f"{where}: [models.{model}]", model) if model in own else architectures.load(model)
        for method in _texts(block, "methods", where):
            methods.parse(method).bind(architectures.from_config(config))  # complains about what does not fit
            for setup in setups:
                yield Cell(config, method, setup)


def _config(values: Any, where: str, name: str) -> Config:
    try:
        json.dumps(values, allow_nan=False)  # as the records of its cells will hold it
    except (TypeError, ValueError):
        raise UserError(f"{where}: a model holds numbers, texts, flags and lists of them") from None
    return Config(values, where, name)


def _setup(values: Any, where: str) -> Setup:
    if not isinstance(values, dict):
        raise UserError(f"{where}: a setup is a table such as {{batch = 2, seq = 128}}, got {values!r}")
    found = setup_given(None, values)
    if found.gpus != 1:
        raise UserError(f"{where}: a setup is that of one process, got gpus = {found.gpus}: torchrun starts several")
    return found


def _texts(block: dict[str, Any], key: str, where: str) -> Sequence[str]:
    for value in (found := _list(block, key, where)):
        if not isinstance(value, str):
            raise UserError(f"{where}: {key} of [[cells]] must be texts, got {value!r}")
    return found


def _list(block: dict[str, Any], key: str, where: str) -> Sequence[Any]:
    found = block.get(key)
    if not isinstance(found, list) or not found:
        raise UserError(f"{where}: {key} of [[cells]] must be a list that is not empty, got {found!r}")
    return found
