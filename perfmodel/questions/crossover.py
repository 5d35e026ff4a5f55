"""Where a verdict changes: over batch, sequence length, a method's size (rank, k) and its number of targets.

Batch, sequence and rank of all axes go through the tape as one grid. Where the verdict differs between two neighbouring
points, the gap is filled, again as one grid, until the change lies between two consecutive integers, or lengths that
ranks can share (`Setup.seq_multiple`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np

from ..architectures import Architecture
from ..devices.host import Host
from ..devices.profile import DeviceProfile
from ..errors import UserError, as_given
from ..methods import Method
from ..prediction.predict import Prediction, predict
from ..setup import Setup
from .speedup import verdict

AXES = ("batch", "seq", "size", "targets")
STEP = 1.25  # ratio of neighbouring points on a coarse axis
DENSE = 16  # up to here every integer is a point
FILL = 256  # points that fill one gap at the most
MOST_BATCH, MOST_SEQ, MOST_TOKENS, MOST_RANK = 512, 32_768, 2**20, 256


@dataclass(frozen=True)
class VerdictChange:
    """The verdict from a value on, and the one just below it."""

    value: int
    before: str
    after: str


@dataclass(frozen=True)
class Crossover:
    """The speed-up of `b` over `a` along one axis, everything else held.

    Attributes:
        axis: batch, seq, targets, or the option that sizes the method (r, k, ...).
        method: spec of the method whose option varies; empty for batch and seq.
        here: the value of the setup that was asked for.
        values, ratio, verdict, fits_a, fits_b: the points, ascending.
        names: of the points of `targets`, the target that each one adds.
        exact: whether changes lie between consecutive values (else between neighbouring points).
    """

    axis: str
    method: str
    here: int
    values: list[int]
    ratio: list[float]
    verdict: list[str]
    fits_a: list[bool]
    fits_b: list[bool]
    names: tuple[str, ...] = ()
    exact: bool = True

    @property
    def changes(self) -> list[VerdictChange]:
        """Every change of the verdict along the axis."""
        pairs = pairwise(zip(self.values, self.verdict, strict=True))
        return [VerdictChange(value, before, after) for (_, before), (value, after) in pairs if before != after]

    def as_dict(self) -> dict[str, Any]:
        """The JSON of one axis."""
        return {
            **{f.name: getattr(self, f.name) for f in fields(self) if f.name != "names"},
            **({"targets": list(self.names)} if self.names else {}),
            "changes": [{f.name: getattr(c, f.name) for f in fields(c)} for c in self.changes],
        }


@dataclass(frozen=True)
class MethodPair:
    """Two bound methods in one setup: what is compared along the axes."""

    architecture: Architecture
    a: Method
    b: Method
    setup: Setup
    on: DeviceProfile
    by: Host

    def point(self, a: Method, b: Method) -> tuple[Prediction, Prediction]:
        """Both predictions with other options of the methods."""
        one, two = (predict(self.architecture, m, self.setup, self.on, host=self.by) for m in (a, b))
        return one, two

    def owner(self, axis: str) -> Any:
        """Whose field varies along an axis: the setup's, b's, or a's where b has no such option."""
        if axis in ("batch", "seq"):
            return self.setup
        return self.b if _has(self.b, axis) or not _has(self.a, axis) else self.a

    def with_option(self, name: str, value: Any) -> tuple[Method, Method]:
        """The two methods, an option of the one that varies replaced."""
        if self.owner(name) is self.b:
            return self.a, replace(self.b, **{name: value})
        return replace(self.a, **{name: value}), self.b

    def size_option(self) -> str:
        """The option that sizes b, or a if b has none, or nothing."""
        return _size(self.b) or _size(self.a)


def crossovers(pair: MethodPair, axes: Sequence[str] = AXES) -> list[Crossover]:
    """The verdict along each axis that the pair has.

    Raises:
        UserError: an unknown axis.
    """
    for axis in axes:
        if axis not in AXES:
            raise UserError(f"axis {as_given(axis)} is unknown: use {', '.join(AXES)}")
    size = pair.size_option() if "size" in axes else ""
    sized = pair.owner(size)
    gridded = [axis for axis in axes if axis in ("batch", "seq")]
    if size and _takes_arrays(sized, size):
        gridded.append(size)
    found = _on_grid(pair, gridded)
    if size and size not in gridded:
        found.append(_one_by_one(pair, size, [(n, n) for n in _sizes(sized, size)], getattr(sized, size)))
    if "targets" in axes and getattr(pair.owner("targets"), "pattern", ()) is None:  # a regex has no order to follow
        found.append(_targets(pair))
    return found


def speedup_plane(pair: MethodPair, batch: Sequence[int], seq: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The speed-up of b over a, and whether b fits, at every batch with every length: (batch, seq)."""
    setup = replace(pair.setup, batch=np.array(batch)[:, None], seq=np.array(seq))
    a, b = replace(pair, setup=setup).point(pair.a, pair.b)
    ratio, fits = np.broadcast_arrays(a.mean_step / b.mean_step, b.fits)
    return ratio, fits


def _has(method: Method, option: str) -> bool:
    return option in {f.name for f in fields(method)}


def _size(method: Method) -> str:
    """The option that sizes a method by one number, or nothing."""
    sizes = (name for name in method.sizes() if _has(method, name))
    return next((name for name in sizes if isinstance(getattr(method, name), int)), "")


def _takes_arrays(method: Method, name: str) -> bool:
    return next(f.type for f in fields(method) if f.name == name) is Any


def _sizes(method: Method, name: str) -> list[int]:
    """Powers of two, the value itself, and for a number of blocks all of them."""
    here, blocks = getattr(method, name), method.layers
    most = blocks if name in ("k", "gamma") else max(MOST_RANK, here)
    powers = {2**i for i in range(most.bit_length()) if 2**i <= most}
    return sorted({*powers, here, *([blocks] if name in ("k", "gamma") else [])})


Points = dict[int, tuple[float, bool, bool]]  # value -> ratio, whether a fits, whether b fits


def _on_grid(pair: MethodPair, axes: list[str]) -> list[Crossover]:
    """All gridded axes at once; gaps across which the verdict changes are filled until none is left."""
    here = {axis: int(getattr(pair.owner(axis), axis)) for axis in axes}
    wanted = {axis: _coarse(pair, axis, here[axis]) for axis in axes}
    known: dict[str, Points] = {axis: {} for axis in axes}
    while any(wanted.values()):
        for axis, points in _evaluate(pair, here, wanted).items():
            known[axis].update(points)
        wanted = {axis: list(_gaps(points, _step(pair, axis))) for axis, points in known.items()}
    return [_crossover(axis, _spec_of(pair, axis), here[axis], known[axis]) for axis in axes]


def _spec_of(pair: MethodPair, axis: str) -> str:
    return "" if axis in ("batch", "seq") else str(pair.owner(axis).spec())


def _step(pair: MethodPair, axis: str) -> int:
    """What lies between consecutive values of an axis: where ranks share tokens they cut lengths, and LoRA's rank."""
    if axis == "seq":
        return pair.setup.seq_multiple
    return pair.setup.tp if axis == "r" and pair.setup.sequence_parallel else 1


def _coarse(pair: MethodPair, axis: str, here: int) -> list[int]:
    """The first points of an axis, the value itself among them, all multiples of its step.

    A batch or a rank of 1 is another program than any other, so it is a point only where it is asked about.
    """
    step = _step(pair, axis)
    if axis not in ("batch", "seq"):
        most = max(here, min(MOST_RANK, _narrowest(pair)))
        powers = (2**i for i in range(1, most.bit_length()) if 2**i <= most)
        return sorted({here, *(max(1, value // step) * step for value in powers)})
    if axis == "batch":
        low, most = min(here, 2), max(2 * here, min(MOST_BATCH, MOST_TOKENS // pair.setup.seq))
    else:
        low, most = DENSE, max(2 * here, min(MOST_SEQ, MOST_TOKENS // pair.setup.batch))
        most = min(most, pair.architecture.max_positions or most)
    steps = int(np.log(most / DENSE) / np.log(STEP)) if most > DENSE else 0
    geometric = {round(DENSE * STEP**i) for i in range(1, steps + 1)}
    points = (*range(low, min(DENSE, most) + 1), *geometric, here, most)
    return sorted({max(1, value // step) * step for value in points})


def _narrowest(pair: MethodPair) -> int:
    """The largest rank that every linear layer can have, or the part of it that tensor-parallel ranks have."""
    tp = pair.setup.tp
    architecture = pair.architecture.part_of(tp) if tp > 1 else pair.architecture
    return min(architecture.hidden, architecture.kv_heads * architecture.head_dim, architecture.intermediate)


def _evaluate(pair: MethodPair, here: dict[str, int], wanted: dict[str, list[int]]) -> dict[str, Points]:
    """Both methods at every wanted point of every axis, as one flat grid; a batch of 1 stays out of the others'."""
    rows = [(axis, value) for axis, values in wanted.items() for value in values]
    batches = [value if axis == "batch" else pair.setup.batch for axis, value in rows]
    found: dict[str, Points] = {axis: {} for axis in wanted}
    for single in (True, False):
        group = [row for row, batch in zip(rows, batches, strict=True) if (batch == 1) == single]
        if not group:
            continue
        ratio, fits_a, fits_b = _ratios(pair, here, group)
        for (axis, value), *figures in zip(group, ratio, fits_a, fits_b, strict=True):
            found[axis][value] = (float(figures[0]), bool(figures[1]), bool(figures[2]))
    return found


def _ratios(pair: MethodPair, here: dict[str, int], rows: list[tuple[str, int]]) -> Any:
    """Speed-up and fits of both methods at rows of (axis, value)."""
    columns = {
        name: np.array([value if axis == name else start for axis, value in rows])
        for name, start in {"batch": pair.setup.batch, "seq": pair.setup.seq, **here}.items()
    }
    setup = replace(pair.setup, batch=columns.pop("batch"), seq=columns.pop("seq"))
    methods = (pair.a, pair.b)
    for name, column in columns.items():
        if np.any(column != here[name]):
            methods = pair.with_option(name, column)
    a, b = (predict(pair.architecture, m, setup, pair.on, host=pair.by) for m in methods)
    ratio = a.mean_step / b.mean_step
    return np.broadcast_arrays(ratio, a.fits, b.fits, setup.batch)[:3]


def _gaps(points: Points, step: int) -> Iterator[int]:
    """Points that fill the gaps across which the verdict changes, multiples of `step`."""
    for (low, one), (high, two) in pairwise(sorted(points.items())):
        between = range(low + step, high, step)
        if between and verdict(one[0]) != verdict(two[0]):
            if len(between) <= FILL:
                yield from between
            else:
                yield from sorted({step * round(x) for x in np.linspace(low // step, high // step, FILL + 2)[1:-1]})


def _crossover(axis: str, method: str, here: int, points: Points, **extra: Any) -> Crossover:
    values = sorted(points)
    ratio, fits_a, fits_b = ([points[v][i] for v in values] for i in range(3))
    verdicts = [str(v) for v in verdict(np.array(ratio))]
    return Crossover(axis, method, here, values, ratio, verdicts, fits_a, fits_b, **extra)  # type: ignore[arg-type]


def _one_by_one(pair: MethodPair, option: str, points: list[tuple[int, Any]], here: int, **extra: Any) -> Crossover:
    """An axis whose points are different programs; points that the method refuses are left out."""
    found: Points = {}
    for number, value in points:
        try:
            a, b = pair.point(*_rebound(pair, option, value))
        except UserError:
            continue
        found[number] = (float(a.mean_step / b.mean_step), bool(a.fits), bool(b.fits))
    return _crossover(option, _spec_of(pair, option), here, found, exact=False, **extra)


def _rebound(pair: MethodPair, option: str, value: Any) -> tuple[Method, Method]:
    a, b = pair.with_option(option, value)
    return a.bind(pair.architecture), b.bind(pair.architecture)


def _targets(pair: MethodPair) -> Crossover:
    """From one target to all: the method's own first, then the others in the order of the block."""
    method = pair.owner("targets")
    leaves = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in pair.architecture.linear_names()))
    own = [name for name in leaves if name in {t.rsplit(".", 1)[-1] for t in method.target_names}]
    own = own or leaves
    order = [*own, *(name for name in leaves if name not in own)]
    points = [(n, tuple(order[:n])) for n in range(1, len(order) + 1)]
    return _one_by_one(pair, "targets", points, len(own), names=tuple(order))
