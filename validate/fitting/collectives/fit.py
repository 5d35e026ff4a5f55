"""Fits the price of collectives to published measurements and writes it into data/nodes/*.toml.

Every row is judged by fits that have not seen its like; what is written is fitted to all rows. Left out in turn are

    a message size       (a power of two, and what is nearest to it) of all groups
    a range of sizes     of one group: a factor of 8, at the ends of what was measured too
    a group size

Beside each stands the plain line hops · α + bytes / β, fitted to the same rows. Figures are pulled towards usual ones,
so that those that few rows tell stay sane: those of nodes with like links, then those of the same node's other rings.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from perfmodel.network import files, price
from perfmodel.network.files import BETWEEN, NODES
from perfmodel.network.parameters import PROTOCOLS, Between, CollectiveParameters, InSwitch, Protocol
from perfmodel.network.price import Links
from perfmodel.program.dims import Array

from ..judging import Fit, FitErrors, column, settled
from ..write import write_blocks
from .rows import ACROSS, ADDING, BLACKWELL, SOURCES, SWITCHED, WITHIN, node_file, read_collectives

PULL = 0.25  # of a figure towards its usual one, by logarithms: a factor of 1.5 counts as a row that is off by a tenth
RINGS = ("all_reduce", "all_gather", "reduce_scatter")
HEADLINE = "message sizes left out"
HARDER = {"ranges of sizes left out": "range", "group sizes left out": "gpus"}  # slice -> what is left out in turn

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
STEP_BETWEEN = "step between nodes"
LIMITS = {
    "start": (1e-7, 1e-3), "step": (1e-9, 1e-3), "share": (1e-3, 1.0), "own_part": (1e-2, 2.0), "through": (1e-3, 1.0),
    # Where one size of group was measured, step and start look alike: NCCL's tuner has 31 us for the slowest hop
    STEP_BETWEEN: (1e-9, 31e-6),
    # 8 GiB in 8 B200 show 0.60, 64 MiB in 8 H100 0.67; from less a search would make one more protocol of it
    "in_switch.share": (0.58, 0.7),
}  # fmt: skip


@dataclass(frozen=True)
class LinkErrors(FitErrors):
    """As `FitErrors`, with the plain line in the place of the roofline."""

    def rounded(self) -> dict[str, float]:
        """For a node's file."""
        return {"line_mean" if key == "roofline_mean" else key: value for key, value in super().rounded().items()}


class Sizes(NamedTuple):
    """Rows of one kind: bytes, GPUs, nodes, and whether a switch could add them."""

    message: Array
    gpus: Array
    nodes: Array
    reduces: bool


class Task(NamedTuple):
    """A search: the figures' names and usual values, and what they are.

    It begins at the usual values, and once more with so many times those of some (`instead`): where several lines have
    one minimum, one of them may end in the place of another.
    """

    names: tuple[str, ...]
    usual: Array  # logarithms
    made: Callable[[Array], Any]  # logarithms -> parameters
    pricer: Callable[[pd.DataFrame], Callable[[Any], Array]]  # rows -> what makes seconds of parameters
    instead: Mapping[str, float] = {}

    @property
    def limits(self) -> tuple[Array, Array]:
        """Logarithms of the least and the most that the figures may be."""
        low, high = np.log([LIMITS.get(name) or LIMITS[name.split(".")[-1]] for name in self.names]).T
        return low, high


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
            inside = {kind: _inside(fits, slug, kind) for kind in set(own.kind)}
            blocks[BETWEEN] = fit_links_between(own, node_file(slug).links, inside)
    if write:
        for slug, blocks in fits.items():
            if not blocks:
                continue  # nothing here covers it; what others wrote stays
            write_blocks(NODES / f"{slug}.toml", blocks, date.today().isoformat())
        files.forget()
    return [
        {"node": slug, "gpu": node_file(slug).gpu, "kind": kind, "slice": name, **errors.rounded()}
        for slug, blocks in fits.items()
        for kind, fit in blocks.items()
        for name, errors in {HEADLINE: fit.errors, **fit.slices}.items()
    ]


def _fit_within(rows: pd.DataFrame, own: pd.DataFrame, slug: str, kind: str) -> Fit:
    """A kind within one node; one with a switch is pulled towards what the others with one have in common."""
    links, adding = node_file(slug).links, slug in ADDING and kind == "all_reduce"
    inside, usual = rows[rows.nodes == 1], USUAL
    if slug in SWITCHED:
        peers = set(BLACKWELL if slug in BLACKWELL else SWITCHED) - {slug}
        alike = inside[inside.node.isin(peers) & (inside.kind == kind)]
        usual = _of_class(kind, alike) if len(alike) else USUAL
    others = inside[(inside.node == slug) & inside.kind.isin(set(RINGS) - {kind})]
    if kind in RINGS and len(others):
        found = _searched(_task_within(links, usual, adding=False), others)
        usual = replace(found, in_switch=usual.in_switch)
    return fit_kind(own, kind, links, usual, adding=adding)


def fit_kind(
    own: pd.DataFrame, kind: str, links: Links, usual: CollectiveParameters = USUAL, *, adding: bool = False
) -> Fit:
    """A kind of collective within a node.

    Args:
        own: its rows, with the columns of `read_collectives`.
        links: the node's wires.
        usual: what figures are pulled towards.
        adding: whether the switch may add.
    """
    line = _line(lambda r: column(r, "message") * price.moved(kind, column(r, "gpus")) / links.tiers[0][1])
    return _fit(own, _task_within(links, usual, adding=adding), line)


def _of_class(kind: str, peers: pd.DataFrame) -> CollectiveParameters:
    """What nodes with a switch have in common: one fit to all, their messages scaled to one wire."""
    wire = peers.node.map(lambda slug: node_file(slug).links.tiers[0][1]).to_numpy()
    alike = peers.assign(message=peers.message / wire, reduces=peers.reduces & peers.node.isin(ADDING))
    return _searched(_task_within(Links(8, ((8, 1.0),), None), USUAL, adding=kind == "all_reduce"), alike)


def _searched(task: Task, rows: pd.DataFrame) -> CollectiveParameters:
    """The figures that fit rows best."""
    found: CollectiveParameters = task.made(_search(task, rows))
    return found


def fit_links_between(own: pd.DataFrame, links: Links, inside: Mapping[str, CollectiveParameters]) -> Fit:
    """What passes between nodes, of all kinds at once; `inside`: the figures within a node, by kind."""
    figures = ("start", STEP_BETWEEN, "share")
    names = tuple(f"{name}.{figure}" for name in BETWEEN_PROTOCOLS for figure in figures)
    usual = np.log([*USUAL_BETWEEN.ll, *USUAL_BETWEEN.simple])

    def made(z: Array) -> Between:
        return Between(Protocol(*np.exp(z[:3]).tolist()), Protocol(*np.exp(z[3:]).tolist()))

    def seconds(p: Between, kind: str, sizes: Sizes) -> Array:
        message, gpus, nodes, _ = sizes
        return price.across(kind, message, gpus, nodes, links=links, parameters=inside[kind], between=p)

    assert links.nics is not None
    wire = links.nics.count * links.nics.bandwidth
    return _fit(
        own,
        Task(names, usual, made, _by_kind(seconds), {"ll.start": 20.0, "simple.start": 20.0}),
        _line(lambda r: r.message * (r.gpus - 1.0) / r.gpus / wire),
    )


def _task_within(links: Links, usual: CollectiveParameters, *, adding: bool) -> Task:
    tiers = len(links.tiers)
    figures = [f"{name}.{figure}" for name in PROTOCOLS for figure in Protocol._fields]
    names = [*figures, "own_part", *(f"{i}.through" for i in range(1, tiers))]
    through = usual.through[1:] if len(usual.through) == tiers else [USUAL_TIER] * (tiers - 1)
    begin = [x for line in usual.protocols for x in line] + [usual.own_part, *through]
    if adding and usual.in_switch is not None:
        names += [f"in_switch.{figure}" for figure in InSwitch._fields]
        begin += usual.in_switch

    def made(z: Array) -> CollectiveParameters:
        x = np.exp(z).tolist()
        ll, ll128, simple = (Protocol(*x[i : i + 3]) for i in (0, 3, 6))
        switch = InSwitch(*x[-2:]) if adding else None
        return CollectiveParameters(ll, ll128, simple, x[9], (1.0, *x[10 : 9 + tiers]), switch)

    def seconds(p: CollectiveParameters, kind: str, sizes: Sizes) -> Array:
        message, gpus, _, reduces = sizes
        return price.within(kind, message, gpus, links=links, parameters=p, reduces=reduces)

    return Task(tuple(names), np.log(begin), made, _by_kind(seconds), {"ll.share": 6.0})


def _by_kind(seconds: Callable[[Any, str, Sizes], Array]) -> Callable[[pd.DataFrame], Callable[[Any], Array]]:
    """A pricer of rows of several kinds, sorted once."""

    def pricer(rows: pd.DataFrame) -> Callable[[Any], Array]:
        parts = []
        for kind, reduces in product(set(rows.kind), (False, True)):
            its = np.flatnonzero((rows.kind == kind) & (rows.reduces == reduces))
            message, gpus, nodes = (column(rows.iloc[its], name) for name in ("message", "gpus", "nodes"))
            parts.append((kind, its, Sizes(message, gpus, nodes, reduces)))

        def all_seconds(p: Any) -> Array:
            found = np.zeros(len(rows))
            for kind, its, sizes in parts:
                found[its] = seconds(p, kind, sizes)
            return found

        return all_seconds

    return pricer


def _line(at_wire: Callable[[pd.DataFrame], Any]) -> Task:
    """The plain α-β line: seconds a hop, share of the wire; `at_wire`: seconds of the bytes at the whole bandwidth."""

    def pricer(rows: pd.DataFrame) -> Callable[[Any], Array]:
        rounds = np.where(rows.kind == "all_reduce", 2.0, 1.0) * (column(rows, "gpus") - 1.0)
        moving = np.asarray(at_wire(rows), dtype=np.float64)
        return lambda z: np.asarray(rounds * np.exp(z[0]) + moving / np.exp(z[1]))

    return Task(("start", "share"), np.log([5e-6, 0.7]), lambda z: z, pricer)


def _fit(own: pd.DataFrame, task: Task, line: Task) -> Fit:
    """A block: figures of all rows, errors of those that were left out in turn."""
    measured, found, plain = column(own, "seconds"), _left_out(own, task, "octave"), _left_out(own, line, "octave")
    slices = {}
    for campaign in sorted(set(own.campaign)):
        its = (own.campaign == campaign).to_numpy()
        slices[campaign] = LinkErrors.of(found[its], plain[its], measured[its])
    for name, by in HARDER.items():
        if own[by].nunique() > 1:
            slices[name] = LinkErrors.of(_left_out(own, task, by), _left_out(own, line, by), measured)
    taken = own[own.taken]
    seconds = task.pricer(taken)
    found_in = _search(task, own)
    end, caveats = settled(task.names, found_in, task.usual, task.limits, lambda z: seconds(task.made(z)))
    return Fit(
        parameters=task.made(end),
        source=", ".join(SOURCES.get(name, name) for name in sorted(set(own.source))),
        software=", ".join(f"NCCL {v}" for v in sorted(set(own.version) - {""})) or "NCCL, version not told",
        rows_fitted=len(taken),
        rows_left_out=len(own),
        errors=LinkErrors.of(found, plain, measured),
        slices=slices,
        notes="Residuals: of each row by a fit that saw no message of about its size.",
        caveats=caveats,
    )


def _left_out(own: pd.DataFrame, task: Task, by: str) -> Array:
    """Seconds of every row as a fit predicts them that saw no row with the same value in the column `by`."""
    found = np.zeros(len(own))
    for value in sorted(set(own[by])):
        its = (own[by] == value).to_numpy()
        found[its] = task.pricer(own[its])(task.made(_search(task, own[~its])))
    return found


def _search(task: Task, rows: pd.DataFrame) -> Array:
    """Logarithms of the figures that fit the rows to take best, each pulled towards its usual value."""
    rows = rows[rows.taken]
    measured, seconds = column(rows, "seconds"), task.pricer(rows)

    def off(z: Array) -> Array:
        errors = np.log(seconds(task.made(z)) / measured)
        return np.concatenate([errors, PULL * (z - task.usual)])

    (low, high), ends = task.limits, []
    for moved in ({}, task.instead) if task.instead else ({},):
        start = task.usual + np.log([moved.get(name, 1.0) for name in task.names])
        start = np.asarray(np.clip(start, low + 1e-6, high - 1e-6))
        if not len(rows):
            return start
        ends.append(least_squares(off, start, bounds=(low, high), loss="soft_l1", f_scale=0.1))
    return np.asarray(min(ends, key=lambda end: float(end.cost)).x)


def _inside(fits: Mapping[str, Mapping[str, Fit]], slug: str, kind: str) -> CollectiveParameters:
    """The figures within a node, which has them of its own or takes those of a like one."""
    block = node_file(slug).blocks[kind]
    fit = fits.get(block.node, {}).get(block.kind)
    found = block.parameters if fit is None else fit.parameters
    assert isinstance(found, CollectiveParameters)
    return found
