"""Seconds of a collective, from its bytes and the links below it; all sizes broadcast.

As NCCL's own tuner has it (https://github.com/NVIDIA/nccl, src/graph/tuning.cc, read at 5067397): every algorithm in
every protocol has a latency that grows with its hops and a bandwidth that is a share of the wire's, and the fastest
one runs. With S = message bytes, n = GPUs, N = nodes, g = n / N GPUs in each:

    within a node     start + hops · step + S · (moved + own_part / n) / (wire · through · share)
                      the least over LL, LL128 and Simple; a ring has n - 1 hops and moves (n - 1) / n of the buffer
                      through each link (all_gather, reduce_scatter), both twice in an all_reduce
    in the switch     start + S · (1 + 1 / n) / (wire · share): each GPU sends all once, and receives its reduced part,
                      for all_reduce alone and where the switch can add (not in 8-bit integers)
    between nodes     start + hops between · step between + hops within · step within
                      + the longer of: bytes that leave a node over the bandwidth of the cards in use, the time within
                      a ring passes all GPUs, so (n - 1) / n of the buffer leaves each node, twice in an all_reduce;
                      that may take trees instead: 2 · log2 N hops between, 2 · (g - 1) within, 2 · (N - 1) / N leave

Groups of a job that exchange side by side share what lies between them: a node's cards, and in a node the links above
its smallest tier. Behind a switch, which is one tier, each GPU has its own.
"""

from typing import Any, NamedTuple

import numpy as np

from ..program.dims import Array
from .parameters import Between, CollectiveParameters, Nics, Protocol


class CollectiveKind(NamedTuple):
    """What a collective does.

    Attributes:
        rings: how often its data goes round n - 1 hops (of an all_to_all: to as many peers); 0: one hop in all.
        parts: whether each hop carries the n-th part of the buffer, or all of it.
        keeps: whether a GPU has a part of its own that takes no wire.
        passes: bytes of HBM that a GPU reads and writes for each byte that passes its link: a byte that arrives is
            written and read to be sent on; one that is reduced is read, added to one's own and written.
    """

    rings: int
    parts: bool
    keeps: bool
    passes: float


KINDS = {
    "all_reduce": CollectiveKind(2, True, True, 2.5),
    "all_gather": CollectiveKind(1, True, True, 2.0),
    "reduce_scatter": CollectiveKind(1, True, True, 3.0),
    "all_to_all": CollectiveKind(1, True, True, 2.0),
    "broadcast": CollectiveKind(1, False, False, 2.0),
    "send_recv": CollectiveKind(0, False, False, 1.0),
}


class Links(NamedTuple):
    """The wires of a node.

    Attributes:
        gpus: of a node.
        tiers: (GPUs, B/s in one direction): the smallest tier that holds a group is what its ring passes.
        nics: cards between nodes.
    """

    gpus: int
    tiers: tuple[tuple[int, float], ...]
    nics: Nics | None


def hops(kind: str, gpus: Array) -> Array:
    """Hops from GPU to GPU that one waits for."""
    return np.asarray((KINDS[kind].rings or 1) * _others(kind, gpus))


def moved(kind: str, gpus: Array) -> Array:
    """Share of the buffer that passes each GPU's link in one direction."""
    how = KINDS[kind]
    return np.asarray(how.rings * (gpus - 1.0) / gpus if how.parts else np.minimum(gpus - 1.0, 1.0))


def collective_seconds(
    kind: str, message: Array, gpus: Array, nodes: Array, *,
    links: Links, parameters: CollectiveParameters, between: Between | None, reduces: bool, beside: Any = 1,
) -> Array:  # fmt: skip
    """Seconds of one collective; 0 for a group of one GPU.

    Args:
        kind: of `KINDS`.
        message: bytes of the whole buffer.
        gpus, nodes: of the group, from 1, and the nodes that they are spread over evenly.
        reduces: whether the switch can add elements of the buffer's dtype.
        beside: groups that do the same at once, their GPUs in turn on a node.
    """
    inside = within(kind, message, gpus, links=links, parameters=parameters, reduces=reduces, beside=beside)
    if between is not None and np.any(nodes > 1):
        outside = across(kind, message, gpus, nodes, links=links, parameters=parameters, between=between, beside=beside)
        inside = np.where(nodes > 1, outside, inside)
    return np.where(gpus > 1, inside, 0.0)


def within(
    kind: str, message: Array, gpus: Array, *, links: Links, parameters: CollectiveParameters, reduces: bool,
    beside: Any = 1,
) -> Array:  # fmt: skip
    """The same inside one node."""
    rate, steps = _rate(kind, gpus, beside, links, parameters), hops(kind, gpus)
    nbytes = message * _carried(kind, gpus, parameters)
    lines = [_line(p, steps, nbytes / rate) for p in parameters.protocols]
    if kind == "all_reduce" and reduces and parameters.in_switch is not None:
        switch = parameters.in_switch
        lines.append(switch.start + message * (1.0 + 1.0 / gpus) / (rate * switch.share))
    return np.asarray(np.minimum.reduce(np.broadcast_arrays(*lines)))


def across(
    kind: str, message: Array, gpus: Array, nodes: Array, *,
    links: Links, parameters: CollectiveParameters, between: Between, beside: Any = 1,
) -> Array:  # fmt: skip
    """The same over several nodes."""
    assert links.nics is not None
    each = gpus / nodes
    nearest = np.ceil(each * links.nics.count / links.gpus)
    cards = np.minimum(nearest, links.nics.count / beside) * links.nics.bandwidth
    rate = _rate(kind, each, beside, links, parameters)
    inside = np.where(each > 1, message * _carried(kind, gpus, parameters), 0.0) / rate
    found = []
    for outer, inner in ((between.ll, parameters.ll128), (between.simple, parameters.simple)):
        for hops_between, hops_within, leaving in _ways(kind, gpus, nodes):
            waits = hops_between * outer.step + hops_within * inner.step
            moving = np.maximum(message * leaving / (cards * outer.share), inside / inner.share)
            found.append(outer.start + waits + moving)
    return np.asarray(np.minimum.reduce(np.broadcast_arrays(*found)))


def _ways(kind: str, gpus: Array, nodes: Array) -> list[tuple[Array, Array, Array]]:
    """Algorithms over nodes: hops between them, hops within, and what leaves each node, in buffers."""
    each, outer = gpus / nodes, hops(kind, nodes)
    leaving = each * (gpus - each) / gpus if kind == "all_to_all" else moved(kind, gpus)
    ways = [(outer, hops(kind, gpus) - outer, leaving)]
    if kind == "all_reduce":
        ways.append((2.0 * np.log2(nodes), 2.0 * (each - 1.0), 2.0 * (nodes - 1.0) / nodes))
    return ways


def hbm_bytes(kind: str, message: Array, gpus: Array) -> Array:
    """Bytes of HBM that one GPU reads and writes for a collective, its own part's copy included."""
    how = KINDS[kind]
    own = 2.0 * message / gpus if how.keeps and how.rings != 2 else 0.0
    return np.where(gpus > 1, how.passes * message * moved(kind, gpus) + own, 0.0)


def _others(kind: str, members: Array) -> Array:
    """GPUs (or nodes) besides one's own that data reaches one after the other."""
    return members - 1.0 if KINDS[kind].rings else np.minimum(members - 1.0, 1.0)


def _line(protocol: Protocol, steps: Array, at_wire: Array) -> Array:
    """Seconds in one protocol; `at_wire`: those of the bytes at the whole bandwidth."""
    return np.asarray(protocol.start + steps * protocol.step + at_wire / protocol.share)


def _carried(kind: str, gpus: Array, parameters: CollectiveParameters) -> Array:
    """Of the buffer: what passes a link, and one's own part as far as it counts."""
    own = parameters.own_part / gpus if KINDS[kind].keeps else 0.0
    return moved(kind, gpus) + own


def _rate(kind: str, gpus: Array, beside: Any, links: Links, parameters: CollectiveParameters) -> Array:
    """B/s of the wire that a group of so many GPUs in one node has, less what its tier takes and groups beside it."""
    sizes: Any = [size for size, _ in links.tiers]
    rates = np.array([rate for _, rate in links.tiers]) * np.array(parameters.through)
    spanned = gpus * beside if KINDS[kind].rings else gpus
    tier = np.minimum(np.searchsorted(sizes, spanned), len(sizes) - 1)
    return np.asarray(rates[tier] / np.where(tier > 0, beside, 1))
