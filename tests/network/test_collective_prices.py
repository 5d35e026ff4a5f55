"""Prices by hand: one node of round figures, every term of the formula alone."""

from typing import Any

import numpy as np
import pytest

from perfmodel.errors import UserError
from perfmodel.network import price
from perfmodel.network.node import BYTES_OF_A_CHANNEL, Node
from perfmodel.network.parameters import Between, CollectiveParameters, InSwitch, Nics, Protocol
from perfmodel.network.price import Links

US, GB = 1e-6, 1e9
NEVER = Protocol(1.0, 1.0, 0.5)  # a line that is never the fastest
WIRE, CARD = 100 * GB, 10 * GB
LINKS = Links(8, ((2, WIRE), (8, WIRE)), Nics("roce", 4, CARD))
# 10 us and 1 us a hop at 0.8 of the wire, of which a group beyond a pair has half; a GPU's own part counts half
ALONE = CollectiveParameters(NEVER, NEVER, Protocol(10 * US, 1 * US, 0.8), 0.5, (1.0, 0.5))
SIZE = 8 * GB


def within(kind: str, gpus: int, parameters: CollectiveParameters = ALONE, size: float = SIZE, **more: bool) -> float:
    size, group = np.asarray(size), np.asarray(float(gpus))
    return float(
        price.within(kind, size, group, links=LINKS, parameters=parameters, reduces=more.get("reduces", False))
    )


def across(kind: str, gpus: int, nodes: int, between: Between, parameters: CollectiveParameters = ALONE) -> float:
    size, group, over = (np.asarray(float(x)) for x in (SIZE, gpus, nodes))
    return float(price.across(kind, size, group, over, links=LINKS, parameters=parameters, between=between))


@pytest.mark.parametrize(
    ("kind", "gpus", "hops", "moved"),
    [
        ("all_gather", 2, 1, 1 / 2 + 0.5 / 2),
        ("reduce_scatter", 2, 1, 1 / 2 + 0.5 / 2),
        ("all_gather", 8, 7, 2 * (7 / 8 + 0.5 / 8)),  # half of the wire
        ("all_gather", 3, 2, 2 * (2 / 3 + 0.5 / 3)),
        ("all_to_all", 8, 7, 2 * (7 / 8 + 0.5 / 8)),
        ("all_reduce", 8, 14, 2 * (14 / 8 + 0.5 / 8)),
        ("broadcast", 8, 7, 2 * 1.0),
        ("send_recv", 2, 1, 1.0),
        ("send_recv", 8, 1, 2 * 1.0),  # a pair that lies so far apart
    ],
)
def test_a_ring_waits_for_its_hops_and_its_bytes(kind: str, gpus: int, hops: int, moved: float) -> None:
    assert within(kind, gpus) == pytest.approx(10 * US + hops * US + SIZE * moved / (0.8 * WIRE))


def test_the_fastest_protocol_runs() -> None:
    """Each has its sizes, as NCCL's tuner gives them to it."""
    ll, ll128, simple = Protocol(1 * US, US, 0.05), Protocol(2 * US, US, 0.5), Protocol(20 * US, US, 0.9)
    three = CollectiveParameters(ll, ll128, simple, 0.5, (1.0, 0.5))
    for size, protocol in ((1e3, ll), (1e6, ll128), (1e9, simple)):
        line = protocol.start + 1 * US + size * 0.75 / (protocol.share * WIRE)
        assert within("all_gather", 2, three, size) == pytest.approx(line)


def test_the_switch_reduces_once_each_way() -> None:
    """Every GPU sends all of the buffer and gets its part back: less than a ring moves, from three GPUs on."""
    adding = CollectiveParameters(NEVER, NEVER, ALONE.simple, 0.5, (1.0, 1.0), InSwitch(50 * US, 0.8))
    switch = 50 * US + SIZE * (1 + 1 / 8) / (0.8 * WIRE)
    assert within("all_reduce", 8, adding, reduces=True) == pytest.approx(switch)
    ring = 10 * US + 14 * US + SIZE * (14 / 8 + 0.5 / 8) / (0.8 * WIRE)
    assert within("all_reduce", 8, adding, reduces=False) == pytest.approx(ring)
    assert within("reduce_scatter", 8, adding, reduces=True) == within("reduce_scatter", 8, adding, reduces=False)


def test_between_nodes_the_cards_in_use_count() -> None:
    """Four cards for eight GPUs: one or two GPUs of a node use one, four use two."""
    between = Between(NEVER, Protocol(20 * US, 5 * US, 0.5))
    for gpus, cards in ((2, 1), (4, 1), (8, 2), (16, 4)):
        inner = gpus - 2  # hops within nodes, one lies between
        seconds = 20 * US + 5 * US + inner * US + SIZE * (gpus - 1) / gpus / (cards * 0.5 * CARD)
        assert across("all_gather", gpus, 2, between) == pytest.approx(seconds)


def test_within_nodes_may_take_longer_than_between() -> None:
    """The slower of the two is what one waits for."""
    fast = Between(NEVER, Protocol(20 * US, 5 * US, 1.0))
    slow = CollectiveParameters(NEVER, NEVER, Protocol(10 * US, 1 * US, 0.08), 0.5, (1.0, 0.5))
    inside = SIZE * (15 / 16 + 0.5 / 16) / (0.5 * WIRE * 0.08)
    assert across("all_gather", 16, 2, fast, slow) == pytest.approx(20 * US + 5 * US + 14 * US + inside)


def test_an_all_reduce_takes_the_better_of_ring_and_tree() -> None:
    """Trees have fewer hops, and over few nodes less leaves a node."""
    between = Between(NEVER, Protocol(20 * US, 5 * US, 0.5))
    for nodes in (2, 8):
        rate = 4 * 0.5 * CARD
        latency = 20 * US + 2 * (np.log2(nodes) * 5 * US + 7 * US)
        tree = latency + SIZE * 2 * (nodes - 1) / nodes / rate
        assert across("all_reduce", 8 * nodes, nodes, between) == pytest.approx(tree)


def test_an_all_to_all_sends_what_is_for_others_past_the_cards() -> None:
    between = Between(NEVER, Protocol(20 * US, 5 * US, 0.5))
    leaves = 8 * SIZE * (16 - 8) / 16  # of eight GPUs, the half that is for the other node
    seconds = 20 * US + 5 * US + 14 * US + leaves / (4 * 0.5 * CARD)
    assert across("all_to_all", 16, 2, between) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("kind", "buffers"),
    [
        ("all_gather", 2.0),  # what arrives is written and read again (2 x 7/8), one's own part copied (2 x 1/8)
        ("reduce_scatter", 3 * 7 / 8 + 2 / 8),
        ("all_reduce", 2.5 * 2 * 7 / 8),
        ("all_to_all", 2.0),
        ("broadcast", 2.0),
        ("send_recv", 1.0),
    ],
)
def test_a_collective_takes_memory_traffic_from_kernels_beside_it(kind: str, buffers: float) -> None:
    work = Node.load("dgx-h100").collective_work(kind, SIZE, 8)
    assert work.hbm_bytes == pytest.approx(buffers * SIZE)
    assert work.channels == 24


def test_small_messages_take_few_channels() -> None:
    """NCCL gives each of a channel's threads a least share before it takes another."""
    node = Node.load("dgx-h100")
    for size, channels in ((0, 1), (1, 1), (BYTES_OF_A_CHANNEL, 1), (BYTES_OF_A_CHANNEL + 1, 2), (2**40, 24)):
        assert node.collective_work("all_reduce", size, 8).channels == channels


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"gpus": 9}, "9 GPUs are more than a dgx-h100 of 8 holds: nodes=3 would do"),
        ({"gpus": [8, 17], "nodes": [1, 2]}, "17 GPUs are more than each of 2 dgx-h100 of 8 holds: nodes=17 would do"),
        ({"gpus": 9, "nodes": 2}, "gpus must spread evenly over the nodes, got 9 over 2"),
        ({"gpus": 12, "nodes": 1.5}, "nodes must be whole numbers, got 1.5"),
        ({"gpus": float("nan")}, "gpus must be from 1, got nan"),
        ({"gpus": [2, 4], "nodes": [1, 1, 1]}, r"shapes do not go together: gpus \(2,\), nodes \(3,\)"),
        ({"gpus": [2, 4], "beside": [1, 1, 1]}, r"shapes do not go together: gpus \(2,\), beside \(3,\)"),
    ],
)
def test_groups_that_cannot_be_are_refused_with_what_would_do(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Node.load("dgx-h100").collective("all_reduce", SIZE, **asked)
