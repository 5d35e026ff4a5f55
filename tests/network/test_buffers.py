"""What NCCL keeps for the groups that a GPU exchanges with: by its sources, its logs, and as much as groups need."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel import predict
from perfmodel.devices import profile
from perfmodel.network import files
from perfmodel.network.buffers import CONNECTION, nccl_bytes
from perfmodel.prediction import memory

H100 = files.load("dgx-h100")
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "send_recv")


def test_buffers_of_the_switch_are_those_of_nccls_log() -> None:
    """`nHeads 8 buffSize 1048576 nvlsPerRankSize 33554432 nvlsTotalSize 268435456`, as NCCL prints it on 8 H100."""
    with_switch = nccl_bytes(H100, ["all_reduce"], 8, 8)
    assert with_switch - nccl_bytes(H100, ["all_gather"], 8, 8) == 268_435_456
    assert nccl_bytes(H100, ["all_reduce"], 2, 2) == nccl_bytes(H100, ["all_gather"], 2, 2)
    assert nccl_bytes(files.load("dgx-a100"), ["all_reduce"], 8, 8) == 24 * CONNECTION


def test_the_connections_of_an_all_to_all_are_those_measured() -> None:
    """https://github.com/NVIDIA/nccl/issues/1685: 32 channels to each of seven others, pieces of 10 and 2 MiB; memory
    rose from 1.06 to 4.34 GB."""
    found = nccl_bytes(H100, ["all_to_all"], 8, 8)
    assert found == 32 * 7 * (10_485_760 + 2_097_152)
    assert found == pytest.approx(4.34e9 - 1.06e9, rel=0.15)


def test_over_several_nodes_the_network_allows_few_channels_to_a_rank() -> None:
    """NCCL takes the fewest of all its ranks, by the cards of 50 GB/s four; one round of sends reaches eight of them.

    What lies on other nodes shares a pool: 32 channels of 16 pieces of 128 KiB, to them and from them.
    """
    pool = 32 * 2 * 16 * 131_072
    assert nccl_bytes(H100, ["all_to_all"], 32, 8) == 4 * 7 * CONNECTION + pool
    assert nccl_bytes(H100, ["all_to_all"], 128, 8) == 2 * 7 * CONNECTION + pool
    assert nccl_bytes(H100, ["send_recv"], 2, 1) == 4 * CONNECTION + pool
    assert nccl_bytes(H100, ["send_recv"], 2, 2) == 32 * CONNECTION


def test_of_bridged_pairs_two_channels_lead_to_the_rank_behind_the_bus() -> None:
    bridged = files.load("a100-pcie-4")
    assert nccl_bytes(bridged, ["all_to_all"], 2, 2) == 16 * CONNECTION
    assert nccl_bytes(bridged, ["all_to_all"], 4, 4) == 2 * 3 * CONNECTION


@given(st.sets(st.sampled_from(KINDS), min_size=1), st.integers(1, 3))
def test_more_ranks_and_more_kinds_keep_no_less(kinds: set[str], nodes: int) -> None:
    """And a group of one, or one whose buffers lie in the host's memory, keeps nothing."""
    assert nccl_bytes(H100, kinds, 1, 1) == 0
    assert nccl_bytes(files.load("rtx-4090-8"), kinds, 8, 8) == 0
    ranks = np.array([2, 4, 8]) * nodes
    sizes = nccl_bytes(H100, kinds, ranks, ranks // nodes)
    assert np.all(np.diff(sizes) >= 0)
    assert np.all(nccl_bytes(H100, {*kinds, "all_gather"}, ranks, ranks // nodes) >= sizes)
    assert [int(nccl_bytes(H100, kinds, n, n // nodes)) for n in ranks] == sizes.tolist()


def test_a_step_keeps_a_groups_buffers_for_each_group() -> None:
    """Shards within a node and replicas across nodes are two communicators; one GPU has none."""
    asked = {"model": "llama-3.2-1b", "method": "lora", "device": "h100-sxm", "parallel": "fsdp2"}
    alone, whole, hybrid = (predict(**asked, **{"gpus": 16, **more}) for more in ({"gpus": 1}, {}, {"shard_group": 8}))
    assert alone.memory.buffers == 0
    assert hybrid.memory.buffers > whole.memory.buffers > 24 * CONNECTION
    grid = predict(**asked, gpus=np.array([1, 8, 16]))
    assert grid.memory.buffers.tolist() == [0, predict(**asked, gpus=8).memory.buffers, whole.memory.buffers]


def test_what_fits_without_nccls_buffers_may_not_fit_with_them() -> None:
    """They are beside the allocator, whose own peak does not know of them."""
    p = predict("llama-3.2-1b", "lora", device="h100-sxm", parallel="fsdp2", gpus=8)
    low, buffers = memory.reserved_bounds(p.memory.peak, "cuda")[0], p.memory.buffers
    capacity = low + memory.CONTEXT + buffers
    assert memory.fits(p.memory.peak, capacity, "cuda", buffers)
    assert not memory.fits(p.memory.peak, capacity - 1, "cuda", buffers)
    assert memory.fits(p.memory.peak, capacity - 1, "cuda")
    assert profile.load("h100-sxm").network is None  # a profile of one GPU is nobody's job
