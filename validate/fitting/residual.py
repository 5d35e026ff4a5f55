"""Fits the tables of `perfmodel.devices.residual` to aiconfigurator's bf16 products, on top of the physical price.

No shape of the third that is left out is in a fit. That third says what the factor is worth among the shapes that were
measured; fits without a third of the values of n, or of k, say what it is worth between them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.sparse.linalg import lsmr

from perfmodel.devices.gemm import GemmParameters, gemm_time
from perfmodel.devices.hardware import Hardware
from perfmodel.devices.residual import NODES, NODES_OF_WAVES, Residual, Spot, area_place, idle_place, shape_places
from perfmodel.program.dims import Array

from .gemm import AICONFIGURATOR, errors_by_slice, gemm_rows, software
from .judging import FitErrors, Shapes, column, hardware

# Tiles: of seven tried the two whose waves say most on an A100, H100, B200 and L40S. Weights: the best of nine pairs on
# a quarter of the rows of the fit that was held out of it.
TILES = ((128, 256), (128, 128))
SMOOTH = 0.1  # weight of a squared second difference between nodes, a row's being 1
SMALL = 0.1  # the same of a squared value at a node
SCALE = 0.03  # |ln error| above which a row counts less: close to the mean
ROUNDS = 3  # of weighting rows by their errors
SHOWN = (0.05, 0.95)  # quantiles of measured over physical time that bound the factor: rare kernels are beyond them
STEPS = 127  # largest value of a signed byte


@dataclass(frozen=True)
class Learned:
    """A fitted residual and what it is worth.

    Attributes:
        residual: as its file holds it, in whole steps.
        step: ln of the factor that one stands for.
        source, software: of the measurements.
        rows_fitted, rows_left_out: how many.
        physics: of what price it is the residual (`mean_price`).
        before, after: slice of rows that no fit saw -> errors of the physical price, and with the factor.
    """

    residual: Residual
    step: float
    source: str
    software: str
    rows_fitted: int
    rows_left_out: int
    physics: float
    before: dict[str, FitErrors]
    after: dict[str, FitErrors]


def fit_residual(folder: Path, slug: str, parameters: GemmParameters) -> Learned:
    """The residual of one device on top of such parameters, which are taken in bursts as the rows are."""
    hw, burst = hardware(slug), parameters.in_bursts()
    rows = gemm_rows(folder, slug, "bf16")
    physical = Shapes.of(rows).price(hw, burst)
    left, seen = np.log(column(rows, "seconds") / physical), np.asarray(~rows.left_out)
    design = _design(rows, hw)
    residual, step = _fitted(design[seen], left[seen])
    before = errors_by_slice(rows[~seen], physical[~seen], hw)
    after = errors_by_slice(rows[~seen], (physical * _factor(residual, rows, hw))[~seen], hw)
    for name in ("n", "k"):
        held = _every_third(column(rows, name))
        other, _ = _fitted(design[seen & ~held], left[seen & ~held])
        before[f"other_{name}"] = errors_by_slice(rows[held], physical[held], hw)["all"]
        predicted = (physical * _factor(other, rows, hw))[held]
        after[f"other_{name}"] = errors_by_slice(rows[held], predicted, hw)["all"]
    return Learned(
        residual=residual,
        step=step,
        source=AICONFIGURATOR,
        software=software(folder, slug),
        rows_fitted=int(seen.sum()),
        rows_left_out=int((~seen).sum()),
        physics=mean_price(hw, burst),
        before=before,
        after=after,
    )


def mean_price(hw: Hardware, p: GemmParameters) -> float:
    """Geometric mean of physical prices, in seconds: a residual is worth nothing on top of others."""
    sides = np.geomspace(32, 32768, 6).round()
    m, n, k = np.meshgrid(sides, sides, sides)
    return float(np.exp(np.log(gemm_time(m, n, k, hardware=hw, parameters=p.in_bursts())).mean()))


def _every_third(values: Array) -> np.ndarray:
    """Rows with every third of the distinct values, neither the least nor the largest."""
    return np.isin(values, np.unique(values)[1:-1:3])


def _factor(residual: Residual, rows: pd.DataFrame, hw: Hardware) -> Array:
    return residual.factor(column(rows, "m"), column(rows, "n"), column(rows, "k"), hw.sm_count)


def _design(rows: pd.DataFrame, hw: Hardware) -> sparse.csr_matrix:
    """How much each node of both tables counts in each row."""
    m, n, k = (column(rows, name) for name in ("m", "n", "k"))
    octaves = [np.log2(x) for x in (m, n, k)]
    of_shape = shape_places(octaves)
    area = area_place(octaves, hw.sm_count)
    of_waves = [[area, idle_place(m, n, tile, hw.sm_count), of_shape[2]] for tile in TILES]
    parts = [_corners(of_shape, NODES), *(_corners(places, NODES_OF_WAVES) for places in of_waves)]
    return sparse.csr_matrix(sparse.hstack(parts))


def _corners(places: Sequence[Spot], nodes: Sequence[int]) -> sparse.csr_matrix:
    """Linear interpolation between the nodes of a table as a matrix: rows by nodes."""
    rows = len(places[0].node)
    node, weight = np.zeros((rows, 1), dtype=np.intp), np.ones((rows, 1))
    for place, count in zip(places, nodes, strict=True):
        ends = np.stack([place.node, place.node + 1], axis=1)
        shares = np.stack([1.0 - place.share, place.share], axis=1)
        node = (node[:, :, None] * count + ends[:, None, :]).reshape(rows, -1)
        weight = (weight[:, :, None] * shares[:, None, :]).reshape(rows, -1)
    begins = np.arange(rows + 1) * node.shape[1]
    return sparse.csr_matrix((weight.ravel(), node.ravel(), begins), shape=(rows, int(np.prod(nodes))))


def _roughness(nodes: Sequence[int]) -> sparse.csr_matrix:
    """Second differences of a table along each of its axes."""
    along = []
    for axis, count in enumerate(nodes):
        second = sparse.diags([1.0, -2.0, 1.0], [0, 1, 2], shape=(count - 2, count))
        before, behind = (sparse.identity(int(np.prod(part))) for part in (nodes[:axis], nodes[axis + 1 :]))
        along.append(sparse.kron(sparse.kron(before, second), behind))
    return sparse.csr_matrix(sparse.vstack(along))


def _fitted(design: sparse.csr_matrix, left: Array) -> tuple[Residual, float]:
    """The tables that leave least of ln(measured / physical), in whole steps, and a step."""
    rough = sparse.block_diag([_roughness(NODES), *(_roughness(NODES_OF_WAVES) for _ in TILES)])
    pull = sparse.vstack([np.sqrt(SMOOTH) * rough, np.sqrt(SMALL) * sparse.identity(design.shape[1])])
    nothing = np.zeros(pull.shape[0])
    found, weight = np.zeros(design.shape[1]), np.ones(len(left))
    for _ in range(ROUNDS):
        rows = sparse.vstack([sparse.diags(weight) @ design, pull], format="csr")
        found = lsmr(rows, np.concatenate([weight * left, nothing]), x0=found, atol=1e-5, btol=1e-5)[0]
        weight = (1.0 + ((left - design @ found) / SCALE) ** 2) ** -0.25
    step = float(f"{np.abs(found).max() / STEPS:.4g}")
    sizes = [int(np.prod(NODES)), *(int(np.prod(NODES_OF_WAVES)) for _ in TILES)]
    shapes, *waves = np.split(np.clip(np.round(found / step), -STEPS, STEPS) * step, np.cumsum(sizes)[:-1])
    low, high = (float(f"{bound:.4g}") for bound in np.quantile(left, SHOWN))
    tables = {tile: table.reshape(NODES_OF_WAVES) for tile, table in zip(TILES, waves, strict=True)}
    return Residual(shapes.reshape(NODES), tables, (low, high)), step
