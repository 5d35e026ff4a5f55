"""What the fits share: which rows are left out, errors, and the result that goes into a device file."""

import zlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from perfmodel.devices.attention import AttentionParameters
from perfmodel.devices.cpu import CpuAttentionParameters, CpuGemmParameters, CpuStreamParameters
from perfmodel.devices.gemm import GemmParameters, gemm_time
from perfmodel.devices.gemm_parameters import EarlyGemmParameters, GroupedParameters
from perfmodel.devices.hardware import Hardware
from perfmodel.devices.pointwise import PointwiseParameters
from perfmodel.devices.profile import DEVICES
from perfmodel.errors import UserError
from perfmodel.network.parameters import Between, CollectiveParameters
from perfmodel.program.dims import Array
from perfmodel.resources import read_toml

OfGpu = GemmParameters | EarlyGemmParameters | AttentionParameters | PointwiseParameters | GroupedParameters
OfNode = CollectiveParameters | Between
Parameters = OfGpu | OfNode | CpuGemmParameters | CpuAttentionParameters | CpuStreamParameters
G = TypeVar("G", GemmParameters, AttentionParameters, PointwiseParameters)

UNTOLD = 1e-4  # a figure that changes no measured row by so much, wherever it is put, is not told by the rows
AT_END = 0.005  # of a search's range of logarithms: so close to its end a figure is at a bound


@dataclass(frozen=True)
class FitErrors:
    """|predicted/measured - 1| over some rows, and the mean of a plain roofline on the same rows."""

    rows: int
    mean: float
    median: float
    p90: float
    roofline_mean: float

    @classmethod
    def of(cls, predicted: Array, roofline: Array, measured: Array) -> "FitErrors":
        """Errors of two predictions against measured seconds (at least one row)."""
        e, plain = np.abs(predicted / measured - 1.0), np.abs(roofline / measured - 1.0)
        return cls(len(e), float(e.mean()), float(np.median(e)), float(np.quantile(e, 0.9)), float(plain.mean()))

    @classmethod
    def average(cls, several: Iterable["FitErrors"]) -> "FitErrors":
        """Mean over devices, each weighted alike."""
        e = list(several)
        means = [float(np.mean([getattr(x, k) for x in e])) for k in ("mean", "median", "p90", "roofline_mean")]
        return cls(sum(x.rows for x in e), *means)

    def worse(self, other: "FitErrors") -> "FitErrors":
        """The larger of each figure: where two estimates of an error stand side by side."""
        return replace(
            self,
            mean=max(self.mean, other.mean),
            median=max(self.median, other.median),
            p90=max(self.p90, other.p90),
        )

    def rounded(self) -> dict[str, float]:
        """For a device file."""
        values = {k: round(getattr(self, k), 4) for k in ("mean", "median", "p90", "roofline_mean")}
        return {"rows": self.rows, **values}


@dataclass(frozen=True)
class FitCaveats:
    """Which figures of a fit say less than they seem to.

    Attributes:
        kept: those that nothing measured tells: they are the default's, or go as a like one does.
        at_bound: those that went as far as they may.
    """

    kept: tuple[str, ...] = ()
    at_bound: tuple[str, ...] = ()

    def but(self, names: Collection[str], said: "FitCaveats") -> "FitCaveats":
        """The same, but of `names` what another fit says."""
        kept, at_bound = (
            (*(n for n in mine if n not in names), *(n for n in other if n in names))
            for mine, other in ((self.kept, said.kept), (self.at_bound, said.at_bound))
        )
        return FitCaveats(kept, at_bound)

    def but_kept(self, names: Collection[str]) -> "FitCaveats":
        """The same, but `names` are not from this fit's rows."""
        return self.but(names, FitCaveats(kept=tuple(names)))


@dataclass(frozen=True)
class FittedParameters(Generic[G]):
    """Parameters as some rows tell them, and which of them say less than they seem to."""

    parameters: G
    caveats: FitCaveats

    def borrowed(self, **figures: Any) -> "FittedParameters[G]":
        """With figures that other rows tell, or none."""
        return FittedParameters(replace(self.parameters, **figures), self.caveats.but_kept(figures))


def settled(
    names: Sequence[str], end: Array, usual: Array, limits: tuple[Array, Array], price: Callable[[Array], Array]
) -> tuple[Array, FitCaveats]:
    """What a search over logarithms of figures has found: where it ended, but the usual value where no row tells.

    Args:
        names: of the figures.
        end: where the search ended.
        usual: the figures that hold without any row.
        limits: the lowest and the highest that the search may reach.
        price: what the rows measure, predicted from the figures' logarithms.
    """
    found, kept = end.copy(), []
    for i, name in enumerate(names):
        tried = [found.copy() for _ in range(3)]
        for z, value in zip(tried, usual[i] + np.array([0.0, -1.0, 1.0]), strict=True):
            z[i] = value
        here = price(found)
        if all(np.abs(np.log(price(z) / here)).max(initial=0.0) < UNTOLD for z in tried):
            kept.append(name)
            found = tried[0]
    at_bound = tuple(name for name in at_ends(names, found, limits) if name not in kept)
    return found, FitCaveats(tuple(kept), at_bound)


def at_ends(names: Sequence[str], found: Array, limits: tuple[Array, Array]) -> list[str]:
    """The figures that went as far as they may; logarithms."""
    low, high = limits
    near = AT_END * (high - low)
    reached = (found - low < near) | (high - found < near)
    return [name for name, is_there in zip(names, reached, strict=True) if is_there]


def unsearched(parameters: OfGpu, names: Collection[str]) -> tuple[str, ...]:
    """The figures of a block that a search for `names` leaves as they were."""
    return tuple(f.name for f in fields(parameters) if isinstance(f.default, float) and f.name not in names)


@dataclass(frozen=True)
class Fit:
    """One fitted block of one device: what goes into its file."""

    parameters: Parameters
    source: str
    software: str
    rows_fitted: int
    rows_left_out: int
    errors: FitErrors
    slices: dict[str, FitErrors] = field(default_factory=dict)
    notes: str = ""
    caveats: FitCaveats = FitCaveats()

    def sibling(self, parameters: Parameters, whose: str, errors: FitErrors, notes: str = "") -> "Fit":
        """The block of a like device without measurements of its own."""
        return replace(
            self,
            parameters=parameters,
            source=f"ratios of {whose} ({self.source})",
            rows_fitted=0,
            rows_left_out=0,
            errors=errors,
            slices={},
            caveats=FitCaveats(),  # every figure is the other's, as the source says
            notes=f"{notes} Residuals: the like device's, or those of pricing one with another's ratios.".strip(),
        )


def hardware(slug: str) -> Hardware:
    """Datasheet figures of a bundled device."""
    return Hardware(**read_toml(DEVICES / f"{slug}.toml")["datasheet"])


def file(folder: Path, name: str) -> Path:
    """The path of a file of measurements.

    Raises:
        UserError: it is not there.
    """
    path = folder / name
    if not path.is_file():
        raise UserError(f"{folder} has no {name}: give the folder with the published measurements")
    return path


def measured_table(folder: Path, name: str) -> pd.DataFrame:
    """One file of measurements, CSV or Parquet."""
    path = file(folder, name)
    return pd.read_csv(path, low_memory=False) if path.suffix == ".csv" else pd.read_parquet(path)


def fold(*parts: Any) -> int:
    """0, 1 or 2 by the row's shape; fold 0 is the third that no fit sees."""
    return zlib.crc32("|".join(str(p) for p in parts).encode()) % 3


def shape_hash(*columns: Any) -> NDArray[np.uint64]:
    """A well mixed hash of whole numbers, row by row."""
    h = np.zeros(len(columns[0]), np.uint64)
    for column in columns:
        h = (h ^ np.asarray(column, np.float64).astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        h = (h ^ (h >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        h ^= h >> np.uint64(32)
    return h


def strings(rows: pd.DataFrame) -> list[str]:
    """The names of the columns."""
    return [str(c) for c in rows.columns]


def column(rows: pd.DataFrame, name: str) -> Array:
    """A column as floats."""
    return np.asarray(rows[name], dtype=np.float64)


class Shapes(NamedTuple):
    """GEMMs in forward layout: the columns of a table of measurements as arrays, and the dtype of all."""

    m: Array
    n: Array
    k: Array
    b: Array
    a_copies: Array
    b_copies: Array
    dtype: str

    @classmethod
    def of(cls, rows: pd.DataFrame) -> "Shapes":
        """One shape a row of m, n, k, b, a_copies, b_copies and dtype."""
        m, n, k, b, a_copies, b_copies = (column(rows, c) for c in ("m", "n", "k", "b", "a_copies", "b_copies"))
        return cls(m, n, k, b, a_copies, b_copies, str(rows["dtype"].iloc[0]))

    def price(self, hw: Hardware, p: GemmParameters) -> Array:
        """Seconds of every shape."""
        m, n, k, b, a_copies, b_copies, dtype = self
        return gemm_time(m, n, k, b, hardware=hw, parameters=p, dtype=dtype, a_copies=a_copies, b_copies=b_copies)
