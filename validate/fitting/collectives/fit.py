"""Fits the price of collectives to published measurements and writes it into data/nodes/*.toml.

Every row is judged by a fit that has not seen its like: of each GPU, collective and group size whole ranges of message
sizes (a factor of 8 each) are left out, a fifth of them at a time; what is written is fitted to all rows. A second
figure leaves out whole group sizes. Beside both stands the plain line hops · α + bytes / β, fitted to the same rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from perfmodel.network import files, price
from perfmodel.network.files import BETWEEN, NODES
from perfmodel.network.parameters import PROTOCOLS, Between, CollectiveParameters, InSwitch, Protocol
from perfmodel.network.price import Links

from ..judging import Array, Fit, FitErrors, column, settled
from ..write import write_blocks
from .rows import ACROSS, ADDING, FOLDS, SOURCES, SWITCHED, WITHIN, node_file, read_collectives

PULL = 0.15  # of a figure towards its class's, by logarithms: a factor of 2 counts as a row that is off by a tenth

# Where searches start and what pulls them: seconds, seconds, share. Between nodes NCCL's own constants
# (https://github.com/NVIDIA/nccl, src/graph/tuning.cc at 5067397: base latencies, and those of a tree's hop).
USUAL = CollectiveParameters(
    Protocol(6e-6, 1e-6, 0.05),
    Protocol(7e-6, 1.1e-6, 0.4),
    Protocol(2e-5, 2e-6, 0.8),
    0.5,
    (1.0,),
    InSwitch(6e-5, 0.65),
)
USUAL_TIER = 0.5  # of the wire's bandwidth through bridges that GPUs share
BETWEEN_PROTOCOLS = ("ll", "simple")
USUAL_BETWEEN = Between(Protocol(6.8e-6, 5e-6, 0.4), Protocol(8.4e-6, 14e-6, 0.9))
LIMITS = {
    "start": (1e-7, 1e-3), "step": (1e-9, 1e-3), "share": (1e-3, 1.0), "own_part": (1e-2, 2.0), "through": (1e-3, 1.0),
}  # fmt: skip


@dataclass(frozen=True)
class LinkErrors(FitErrors):
    """As `FitErrors`, with the plain line in the place of the roofline."""

    def rounded(self) -> dict[str, float]:
        """For a node's file."""
        return {"line_mean" if key == "roofline_mean" else key: value for key, value in super().rounded().items()}


class Task(NamedTuple):
    """A search: the figures' names and usual values, and what they are."""

    names: tuple[str, ...]
    usual: Array  # logarithms
    made: Callable[[Array], Any]  # logarithms -> parameters
    price: Callable[[Any, pd.DataFrame], Array]  # parameters, rows -> seconds

    @property
    def limits(self) -> tuple[Array, Array]:
        """Logarithms of the least and the most that the figures may be."""
        low, high = np.log([LIMITS[name.split(".")[-1]] for name in self.names]).T
        return low, high


Seen = Callable[[pd.DataFrame], Any]  # rows -> which of them a fit may see
TaskOf = Callable[[Seen], Task]


def fit_collectives(path: Path, *, write: bool) -> list[dict[str, Any]]:
    """Fit all nodes that the measurements cover, and return the table of errors.

    Args:
        path: collectives.parquet.
        write: put the parameters into data/nodes/*.toml.

    Returns:
        One row a node, kind and slice: node, gpu, kind, slice, rows, mean, median, p90, line_mean.

    Raises:
        UserError: it is no such file.
    """
    rows = read_collectives(path)
    fits: dict[str, dict[str, Fit]] = {slug: {} for slug in sorted({*WITHIN.values(), *ACROSS.values()})}
    for slug, blocks in fits.items():
        for kind in price.KINDS:
            own = rows[(rows.node == slug) & (rows.kind == kind) & (rows.nodes == 1)]
            if len(own):
                blocks[kind] = _fit_within(rows, own, slug, kind)
    for slug, blocks in fits.items():
        own = rows[(rows.node == slug) & (rows.nodes > 1)]
        if len(own):
            blocks[BETWEEN] = _fit_between(own, slug, {kind: _inside(fits, slug, kind) for kind in set(own.kind)})
    if write:
        for slug, blocks in fits.items():
            write_blocks(NODES / f"{slug}.toml", blocks, date.today().isoformat())
        files.forget()
    return [
        {"node": slug, "gpu": node_file(slug).gpu, "kind": kind, "slice": name, **errors.rounded()}
        for slug, blocks in fits.items()
        for kind, fit in blocks.items()
        for name, errors in {"left-out sizes": fit.errors, **fit.slices}.items()
    ]


def _fit_within(rows: pd.DataFrame, own: pd.DataFrame, slug: str, kind: str) -> Fit:
    """A kind within one node; one with a switch is pulled towards its class, of which a fit sees what it may."""
    links, adding = node_file(slug).links, slug in ADDING and kind == "all_reduce"
    peers = rows[rows.node.isin(SWITCHED) & (rows.kind == kind) & (rows.nodes == 1)]

    def task_of(seen: Seen) -> Task:
        usual = _of_class(kind, peers[seen(peers)]) if slug in SWITCHED else USUAL
        return _task_within(kind, links, usual, adding=adding)

    return _fit(
        own, task_of, _line(lambda r: column(r, "message") * price.moved(kind, column(r, "gpus")) / links.tiers[0][1])
    )


def _of_class(kind: str, peers: pd.DataFrame) -> CollectiveParameters:
    """What nodes with a switch have in common: one fit to all, their messages scaled to one wire."""
    wire = peers.node.map(lambda slug: node_file(slug).links.tiers[0][1]).to_numpy()
    alike = peers.assign(message=peers.message / wire, reduces=peers.reduces & peers.node.isin(ADDING))
    task = _task_within(kind, Links(8, ((8, 1.0),), None), USUAL, adding=kind == "all_reduce")
    found: CollectiveParameters = task.made(_search(task, alike))
    return found


def _fit_between(own: pd.DataFrame, slug: str, inside: Mapping[str, CollectiveParameters]) -> Fit:
    """What passes between nodes, of all kinds at once; `inside`: the figures within a node, by kind."""
    links = node_file(slug).links
    names = tuple(f"{name}.{figure}" for name in BETWEEN_PROTOCOLS for figure in Protocol._fields)
    usual = np.log([*USUAL_BETWEEN.ll, *USUAL_BETWEEN.simple])

    def made(z: Array) -> Between:
        return Between(Protocol(*np.exp(z[:3]).tolist()), Protocol(*np.exp(z[3:]).tolist()))

    def seconds(p: Between, rows: pd.DataFrame) -> Array:
        found = np.zeros(len(rows))
        for kind in set(rows.kind):
            its = (rows.kind == kind).to_numpy()
            message, gpus, nodes = (column(rows[its], name) for name in ("message", "gpus", "nodes"))
            found[its] = price.across(kind, message, gpus, nodes, links=links, parameters=inside[kind], between=p)
        return found

    task = Task(names, usual, made, seconds)
    assert links.nics is not None
    wire = links.nics.count * links.nics.bandwidth
    return _fit(own, lambda seen: task, _line(lambda r: r.message * (r.gpus - 1.0) / r.gpus / wire))


def _task_within(kind: str, links: Links, usual: CollectiveParameters, *, adding: bool) -> Task:
    tiers = len(links.tiers)
    figures = [f"{name}.{figure}" for name in PROTOCOLS for figure in Protocol._fields]
    names = [*figures, "own_part", *(f"{i}.through" for i in range(1, tiers))]
    begin = [x for line in usual.protocols for x in line] + [usual.own_part, *[USUAL_TIER] * (tiers - 1)]
    if adding and usual.in_switch is not None:
        names += [f"in_switch.{figure}" for figure in InSwitch._fields]
        begin += usual.in_switch

    def made(z: Array) -> CollectiveParameters:
        x = np.exp(z).tolist()
        ll, ll128, simple = (Protocol(*x[i : i + 3]) for i in (0, 3, 6))
        switch = InSwitch(*x[-2:]) if adding else None
        return CollectiveParameters(ll, ll128, simple, x[9], (1.0, *x[10 : 9 + tiers]), switch)

    def seconds(p: CollectiveParameters, rows: pd.DataFrame) -> Array:
        message, gpus = column(rows, "message"), column(rows, "gpus")
        plain, added = (price.within(kind, message, gpus, links=links, parameters=p, reduces=r) for r in (False, True))
        return np.where(rows.reduces.to_numpy(), added, plain)

    return Task(tuple(names), np.log(begin), made, seconds)


def _line(at_wire: Callable[[pd.DataFrame], Any]) -> TaskOf:
    """The plain α-β line: seconds a hop, share of the wire; `at_wire`: seconds of the bytes at the whole bandwidth."""

    def seconds(z: Array, rows: pd.DataFrame) -> Array:
        rounds = np.where(rows.kind == "all_reduce", 2.0, 1.0)
        return np.asarray(rounds * (rows.gpus - 1.0) * np.exp(z[0]) + at_wire(rows) / np.exp(z[1]))

    return lambda seen: Task(("start", "share"), np.log([5e-6, 0.7]), lambda z: z, seconds)


def _fit(own: pd.DataFrame, task_of: TaskOf, line_of: TaskOf) -> Fit:
    """A block: figures of all rows, errors of those that were left out in turn."""
    measured = column(own, "seconds")
    found, line = (_left_out(own, of, "fold") for of in (task_of, line_of))
    slices = {}
    for campaign in sorted(set(own.campaign)):
        its = (own.campaign == campaign).to_numpy()
        slices[campaign] = LinkErrors.of(found[its], line[its], measured[its])
    if own.gpus.nunique() > 1:
        slices["group sizes left out"] = LinkErrors.of(
            _left_out(own, task_of, "gpus"), _left_out(own, line_of, "gpus"), measured
        )
    task = task_of(lambda rows: rows.fold >= 0)
    end, doubts = settled(
        task.names, _search(task, own), task.usual, task.limits, lambda z: task.price(task.made(z), own)
    )
    return Fit(
        parameters=task.made(end),
        source=", ".join(SOURCES[name] for name in sorted(set(own.source))),
        software=", ".join(f"NCCL {v}" for v in sorted(set(own.version) - {""})) or "NCCL, version not told",
        rows_fitted=len(own),
        rows_left_out=len(own),
        errors=LinkErrors.of(found, line, measured),
        slices=slices,
        notes=f"Residuals: of each row by a fit without its range of sizes; {FOLDS} fits, each without a part of them.",
        doubts=doubts,
    )


def _left_out(own: pd.DataFrame, task_of: TaskOf, by: str) -> Array:
    """Seconds of every row as a fit predicts them that saw no row with the same value in the column `by`."""
    found = np.zeros(len(own))

    def without(value: Any) -> Seen:
        return lambda rows: rows[by] != value

    for value in sorted(set(own[by])):
        task = task_of(without(value))
        its = (own[by] == value).to_numpy()
        found[its] = task.price(task.made(_search(task, own[~its])), own[its])
    return found


def _search(task: Task, rows: pd.DataFrame) -> Array:
    """Logarithms of the figures that fit rows best, each pulled towards its usual value."""
    measured, weight = column(rows, "seconds"), np.sqrt(column(rows, "weight"))

    def off(z: Array) -> Array:
        errors = weight * np.log(task.price(task.made(z), rows) / measured)
        return np.concatenate([errors, PULL * (z - task.usual)])

    low, high = task.limits
    start = np.clip(task.usual, low + 1e-6, high - 1e-6)
    if not len(rows):
        return start
    return np.asarray(least_squares(off, start, bounds=(low, high), loss="soft_l1", f_scale=0.1).x)


def _inside(fits: Mapping[str, Mapping[str, Fit]], slug: str, kind: str) -> CollectiveParameters:
    """The figures within a node, which has them of its own or takes those of a like one."""
    block = node_file(slug).blocks[kind]
    fit = fits.get(block.node, {}).get(block.kind)
    found = block.parameters if fit is None else fit.parameters
    assert isinstance(found, CollectiveParameters)
    return found
