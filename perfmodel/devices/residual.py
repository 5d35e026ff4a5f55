"""What benchmarks leave of the physical price of a 16-bit product: a small factor, for the silicon that was measured.

`Device.gemm` has it, a step has not (`devices.price.durations` says why).

    ln factor = g(log2 m, log2 n, log2 k) + sum over tiles of h(log2 waves, idle, log2 k)

All are linear between nodes. g is smooth in the shape. h says how the library fills the SMs with one of its usual
tiles, where physics takes the best of nine and a heuristic does not: `waves` is the area of C in waves of 128 x 256 on
every SM, `idle` the share of all waves of the tile that SMs wait without one. The factor stays between bounds that the
measurements show, and goes to 1 within two octaves from the shapes that were measured. Files: data/residuals/NAME.toml,
written by `validate.fitting.fit`; a device file that says `residual = "NAME"` is of that silicon.
"""

import binascii
import math
import tomllib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError, nearest
from ..program.dims import Array, Index
from ..resources import DATA, is_file, parsed, read_text, stems
from ..values import immutable

FOLDER = DATA / "residuals"
OCTAVES = ((0, 15), (5, 16), (5, 16))  # log2 of the m, n and k that were measured: first and last node of g
AREA = 128 * 256  # of C on every SM in a wave
WAVES = (-4, 10)  # log2 of the waves: first and last node of h
IDLE = 0.1  # step of h between nodes of `idle`, which are from 0 to 0.5
FADE = 2.0  # octaves beyond the measured shapes in which the factor goes to 1
NODES = tuple(last - first + 1 for first, last in OCTAVES)
NODES_OF_WAVES = (WAVES[1] - WAVES[0] + 1, round(0.5 / IDLE) + 1, NODES[2])


class Spot(NamedTuple):
    """Where figures lie between nodes: behind which node, and how far on the way to the next one."""

    node: Index
    share: Array


@immutable
class Residual:
    """The tables of one silicon.

    Attributes:
        shapes: g at its nodes (log2 m, log2 n, log2 k).
        waves: tile, as rows and columns of C -> h at its nodes (log2 waves, idle, log2 k).
        bounds: of ln factor.
    """

    shapes: Array
    waves: Mapping[tuple[int, int], Array]
    bounds: tuple[float, float]

    __eq__, __hash__ = object.__eq__, object.__hash__

    def factor(self, m: Any, n: Any, k: Any, sm_count: int) -> Array:
        """Time over physical time of (m x k).(k x n) on so many SMs; the shapes (from 1 up) broadcast."""
        octaves = [np.log2(x) for x in (m, n, k)]
        of_m, of_n, of_k = shape_places(octaves)
        found, area = _interpolated(self.shapes, [of_m], [of_n, of_k]), area_place(octaves, sm_count)
        for tile, table in self.waves.items():
            found += _interpolated(table, [area, idle_place(m, n, tile, sm_count)], [of_k])
        found = np.clip(found, *self.bounds)
        for x, (first, last) in zip(octaves, OCTAVES, strict=True):
            if x.min() < first or x.max() > last:
                found = found * np.clip(1.0 - np.maximum(first - x, x - last) / FADE, 0.0, 1.0)
        return np.asarray(np.exp(found))


def shape_places(octaves: Sequence[Array]) -> list[Spot]:
    """Where log2 of m, n and k lie between the nodes of g."""
    return [_place(x - first, last - first) for x, (first, last) in zip(octaves, OCTAVES, strict=True)]


def area_place(octaves: Sequence[Array], sm_count: int) -> Spot:
    """Where products lie between the nodes of h by the waves that their area makes."""
    first = np.log2(AREA * sm_count) + WAVES[0]  # node, as an area
    return _place(octaves[0] + (octaves[1] - first), WAVES[1] - WAVES[0])


def idle_place(m: Any, n: Any, tile: tuple[int, int], sm_count: int) -> Spot:
    """Where products lie between the nodes of h by the idle share of the waves of a tile."""
    height, width = tile
    waves = np.ceil(m / height) * (np.ceil(n / width) / sm_count)
    return _place((1.0 - waves / np.ceil(waves)) * (1.0 / IDLE), NODES_OF_WAVES[1] - 1)


def _place(position: Array, last: int) -> Spot:
    """The place of positions in steps between nodes; those outside are at the first or last node."""
    inside = np.clip(position, 0.0, last)
    node = np.minimum(inside.astype(np.intp), last - 1)
    return Spot(node, inside - node)


def _interpolated(table: Array, of_grid: list[Spot], of_rows: list[Spot]) -> Array:
    """A table between its nodes, the last axis first; the places on its axes broadcast.

    Along rows of a grid often only the first axes vary: then the others are done with once a row, in the same order, so
    that a grid is its points to the last digit.
    """
    sizes, ahead = table.shape, len(of_grid)
    rows = np.broadcast_shapes(*(place.node.shape for place in of_rows))
    count, whole = math.prod(rows), np.broadcast_shapes(rows, *(place.node.shape for place in of_grid))
    if count * math.prod(sizes[:ahead]) > math.prod(whole):
        return _between(table.reshape(-1), [*of_grid, *of_rows], sizes)
    by_row = _between(table.reshape(*sizes[:ahead], -1), of_rows, sizes[ahead:])
    return _between(by_row.reshape(-1), of_grid, sizes[:ahead], np.arange(count).reshape(rows))


def _between(values: Array, places: Sequence[Spot], sizes: Sequence[int], row: Index | None = None) -> Array:
    """Linear between the nodes of axes of such sizes, flat in the last axis of values; rows, if any, stand behind."""
    rows = 1 if row is None else row.size
    strides = [math.prod(sizes[axis + 1 :]) * rows for axis in range(len(sizes))]
    node = places[0].node
    for place, size in zip(places[1:], sizes[1:], strict=True):
        node = node * size + place.node
    if row is not None and rows > 1:
        node = node * rows + row

    def linear(values: Array, axis: int) -> Array:
        if axis == len(places):
            return values.take(node, axis=-1)
        low, high = linear(values, axis + 1), linear(values[..., strides[axis] :], axis + 1)
        return np.asarray(low + places[axis].share * (high - low))

    return linear(values, 0)


def residual_file(name: str) -> Path:
    """The file of a silicon's residual.

    Raises:
        UserError: there is none of that name.
    """
    path = FOLDER / f"{name}.toml"
    if not is_file(path):
        raise UserError(f"residual {name!r} is unknown: {nearest(name, stems(FOLDER, '.toml'))}")
    return path


@lru_cache(maxsize=16)
def load_residual(name: str) -> Residual:
    """The residual of a silicon, by the name of its file.

    Raises:
        UserError: there is none of that name.
    """
    path = residual_file(name)
    _, heading, tables = read_text(path).partition("[tables]")  # the errors before them are for readers
    table = parsed(heading + tables, tomllib.loads, "TOML", str(path))["tables"]
    step, (low, high) = table["step"], table["bounds"]
    waves = {
        (height, width): _decoded(text, NODES_OF_WAVES) * step
        for (height, width), text in zip(table["tiles"], table["waves"], strict=True)
    }
    return Residual(_decoded(table["shapes"], NODES) * step, waves, (low, high))


def _decoded(text: str, nodes: tuple[int, ...]) -> Array:
    """Signed bytes in base64, one a node."""
    return np.frombuffer(binascii.a2b_base64(text), dtype=np.int8).reshape(nodes).astype(np.float64)
