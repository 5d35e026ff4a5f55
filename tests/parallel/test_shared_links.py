"""What ranks of a job that exchange side by side leave each other of a node's cards and links, by hand."""

from dataclasses import replace

import pytest

from perfmodel import Node, predict
from perfmodel.devices import profile
from perfmodel.prediction.placed import placed
from perfmodel.setup import Setup

MESSAGE = 2**28


def seconds(node: str, device: str, gpus: int, kind: str, size: int, stride: int) -> float:
    where = placed(Setup(gpus=gpus, node=node, parallel="fsdp2"), profile.load(device))
    return float(where.seconds(kind, "bf16", MESSAGE, size, stride))


def test_groups_of_replicas_share_the_one_card_of_a_node() -> None:
    """Gradients of all eight shards leave through it, as those of a plain ring over all GPUs do."""
    alone = Node.load("hgx-h100-roce").collective("all_reduce", MESSAGE, 2, 2)
    assert seconds("hgx-h100-roce", "h100-sxm", 16, "all_reduce", 2, 8) > 8 * MESSAGE / 12.5e9 > alone
    with_cards = seconds("dgx-h100", "h100-sxm", 16, "all_reduce", 2, 8)
    assert with_cards == Node.load("dgx-h100").collective("all_reduce", MESSAGE, 2, 2)


def test_a_group_that_spans_sockets_is_as_slow_as_what_it_passes() -> None:
    """Every second GPU of eight: two such groups pass the sockets' link side by side."""
    node = Node.load("l40s-8")
    on_a_socket = seconds("l40s-8", "l40s", 8, "all_gather", 4, 1)
    spanning = seconds("l40s-8", "l40s", 8, "all_gather", 4, 2)
    assert on_a_socket == node.collective("all_gather", MESSAGE, 4)
    assert spanning == node.collective("all_gather", MESSAGE, 4, beside=2)
    carried = MESSAGE * (3 / 4 + node.file.blocks["all_gather"].parameters.own_part / 4)
    sockets = 32e9 * node.file.blocks["all_gather"].parameters.through[-1]
    assert spanning == pytest.approx(
        2 * carried / sockets / node.file.blocks["all_gather"].parameters.simple.share, rel=0.01
    )


def test_a_ring_over_nodes_waits_for_the_pair_between_them() -> None:
    """A neighbour's message has the cards of one GPU, not those of all that the ring passes."""
    node = Node.load("dgx-h100")
    assert seconds("dgx-h100", "h100-sxm", 16, "send_recv", 16, 1) == node.collective("send_recv", MESSAGE, 2, 2)
    assert seconds("dgx-h100", "h100-sxm", 8, "send_recv", 8, 1) == node.collective("send_recv", MESSAGE, 8)


def test_layers_that_are_shared_wait_for_no_gathering_of_weights() -> None:
    """Each communicator has a stream: FSDP's gathers over nodes go on beside what tensor-parallel ranks exchange."""
    setup = Setup(gpus=16, tp=2, batch=2, seq=1024, checkpoint="block", parallel="fsdp2")
    sent = predict("llama-3.1-8b", "full", setup, "h100-sxm").time.communication
    assert sent.hidden["forward"] > 0.8 * sent.exposed["forward"]


def test_gpus_fill_the_fewest_nodes() -> None:
    """Eleven stood on eleven nodes, for no number up to eight divides them: three times as slow as ten."""
    setup = Setup(seq=2048, checkpoint="block", parallel="fsdp2")
    ten, eleven, twelve = (
        predict("llama-3.1-8b", "full", replace(setup, gpus=gpus), "h100-sxm") for gpus in (10, 11, 12)
    )
    assert eleven.time.phases["total"] == pytest.approx(ten.time.phases["total"], rel=0.05)
    assert [any("11 GPUs do not fill 2 nodes evenly" in note for note in p.notes) for p in (ten, eleven, twelve)] == [
        False,
        True,
        False,
    ]
