"""What holds of every collective on every node, whatever its figures are."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel import Node
from perfmodel.network import files
from perfmodel.network.node import SWITCH_ADDS
from perfmodel.network.price import KINDS, Links

NODES = st.sampled_from(files.names())
KIND = st.sampled_from(sorted(KINDS))
MESSAGE = st.integers(1, 2**36)
DTYPE = st.sampled_from(("bf16", "fp32", "i8"))


@st.composite
def groups(draw: st.DrawFn) -> tuple[Node, int, int]:
    """A node, GPUs and nodes of a group that it can have."""
    node = Node.load(draw(NODES))
    nodes = draw(st.integers(1, 8)) if node.file.links.nics is not None else 1
    return node, nodes * draw(st.integers(1, node.gpus)), nodes


@given(group=groups(), kind=KIND, message=MESSAGE, more=st.integers(1, 2**34), dtype=DTYPE)
def test_more_bytes_are_never_faster(
    group: tuple[Node, int, int], kind: str, message: int, more: int, dtype: str
) -> None:
    """Buckets and units are chosen by size: a dent in the curve would look like a reason."""
    node, gpus, nodes = group
    few, many = node.collective(kind, np.array([message, message + more]), gpus, nodes, dtype)
    assert 0.0 <= few <= many
    assert (few > 0.0) == (gpus > 1)
    if gpus > 1:
        assert node.collective(kind, 0, gpus, nodes, dtype) > 0.0, "a launch is never free"


def faster(node: Node, wire: float, cards: float) -> Node:
    """The node with so many times the bandwidth within and between nodes."""
    links = node.file.links
    nics = links.nics and replace(links.nics, bandwidth=links.nics.bandwidth * cards)
    wider = Links(links.gpus, tuple((size, rate * wire) for size, rate in links.tiers), nics)
    return Node(node.file._replace(links=wider))


@given(group=groups(), kind=KIND, message=MESSAGE, wire=st.floats(1.0, 100.0), cards=st.floats(1.0, 100.0), dtype=DTYPE)
def test_more_bandwidth_is_never_slower(
    group: tuple[Node, int, int], kind: str, message: int, wire: float, cards: float, dtype: str
) -> None:
    node, gpus, nodes = group
    seconds = node.collective(kind, message, gpus, nodes, dtype)
    assert faster(node, wire, cards).collective(kind, message, gpus, nodes, dtype) <= seconds * (1 + 1e-12)


@given(group=groups(), kind=KIND, message=MESSAGE, beside=st.integers(2, 8))
def test_groups_side_by_side_are_never_faster_than_one(
    group: tuple[Node, int, int], kind: str, message: int, beside: int
) -> None:
    """They share what lies between them, and behind one switch nothing."""
    node, gpus, nodes = group
    alone, shared = (node.collective(kind, message, gpus, nodes, beside=side) for side in (1, beside))
    assert alone <= shared
    if nodes == 1 and len(node.file.links.tiers) == 1:
        assert alone == shared


@given(
    name=st.sampled_from([name for name in files.names() if files.load(name).links.nics is not None]),
    nodes=st.integers(2, 8), group=st.sampled_from((1, 2, 4, 8)), message=st.integers(2**20, 2**34),
)  # fmt: skip
def test_no_node_sends_more_than_its_cards_carry(name: str, nodes: int, group: int, message: int) -> None:
    """Eight replicas' groups beside one another each had a whole card of a node that has one: six times too fast."""
    node = Node.load(name)
    beside = min(group, node.gpus)
    size = nodes * (node.gpus // beside)
    seconds = node.collective("all_reduce", message, size, nodes, beside=beside)
    nics = node.file.links.nics
    assert nics is not None
    leaving = beside * message * 2 * (nodes - 1) / nodes
    assert leaving / seconds <= nics.count * nics.bandwidth


@given(group=groups(), message=MESSAGE, dtype=DTYPE)
def test_an_all_reduce_takes_no_less_than_its_halves(group: tuple[Node, int, int], message: int, dtype: str) -> None:
    """Within a node it is a reduce_scatter and an all_gather; over nodes a tree may beat the ring of either."""
    node, gpus, nodes = group
    inside = gpus // nodes
    reduced = node.collective("all_reduce", message, inside, dtype=dtype)
    assert reduced >= node.collective("reduce_scatter", message, inside, dtype=dtype)
    assert reduced >= node.collective("all_gather", message, inside, dtype=dtype)


@given(node=NODES, kind=KIND, message=MESSAGE)
def test_one_gpu_is_free(node: str, kind: str, message: int) -> None:
    """Programs of one rank run no collective, and a mesh may have axes of one."""
    loaded = Node.load(node)
    assert loaded.collective(kind, message, 1) == 0.0
    assert loaded.collective_work(kind, message, 1) == (0, 0)


@given(group=groups(), kind=KIND, messages=st.lists(MESSAGE, min_size=1, max_size=5), dtype=DTYPE)
def test_an_array_has_the_single_answers(
    group: tuple[Node, int, int], kind: str, messages: list[int], dtype: str
) -> None:
    """A sweep is one call: over messages, GPUs and nodes."""
    node, gpus, nodes = group
    message = np.array(messages)[:, None]
    sizes, over = np.array([1, nodes, gpus]), np.array([1, nodes, nodes])
    found = node.collective(kind, message, sizes, over, dtype)
    work = node.collective_work(kind, message, sizes, over)
    assert found.shape == (len(messages), 3)
    for i, m in enumerate(messages):
        for j in range(3):
            one: Any = (kind, m, int(sizes[j]), int(over[j]))
            assert found[i, j] == node.collective(*one, dtype)
            single = node.collective_work(*one)
            assert (work.channels[i, j], work.hbm_bytes[i, j]) == (single.channels, single.hbm_bytes)


@pytest.mark.parametrize("name", [name for name in files.names() if Node.load(name).gpus > 1])
def test_large_messages_stay_below_the_wire(name: str) -> None:
    """A ring cannot carry more than its link; only the switch's own reduction beats that, and not in 8-bit integers."""
    node, size = Node.load(name), 2**34
    smallest = node.file.links.tiers[0][1]
    for kind in ("all_gather", "reduce_scatter", "all_reduce"):
        passed = (2 if kind == "all_reduce" else 1) * (node.gpus - 1) / node.gpus
        assert size * passed / node.collective(kind, size, dtype="i8") < smallest
    added = node.collective("all_reduce", size)
    assert added <= node.collective("all_reduce", size, dtype="i8")
    assert "i8" not in SWITCH_ADDS


@pytest.mark.parametrize("name", [n for n in files.names() if Node.load(n).file.links.nics is not None])
def test_a_group_over_nodes_is_no_faster_than_its_cards(name: str) -> None:
    """What leaves a node passes its network cards, at most at their whole bandwidth."""
    node, size = Node.load(name), 2**34
    nics = node.file.links.nics
    assert nics is not None
    for nodes in (2, 4):
        gpus = nodes * node.gpus
        leaves = {"all_gather": (gpus - 1) / gpus, "all_reduce": 2 * (nodes - 1) / nodes}
        for kind, share in leaves.items():
            seconds = node.collective(kind, size, nodes=nodes)
            assert size * share / seconds < nics.count * nics.bandwidth
