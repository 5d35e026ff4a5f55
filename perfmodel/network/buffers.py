"""What NCCL keeps in a GPU's memory for a group of ranks, beside PyTorch's allocator.

Every channel has a connection to each rank that it exchanges with: a ring to the next one and from the one before. It
holds a buffer for each protocol. In-switch reduction has buffers that the switch writes to, for each rank of a node.
Rings, trees and the switch are connected when a collective first asks for them (NCCL 2.22 and later).

Sources: https://github.com/NVIDIA/nccl, src/init.cc (`computeBuffSizes`), src/transport/p2p.cc (`p2pRecvSetup`),
src/transport/net.cc (`sharedNetBuffersInit`), src/transport/nvls.cc (`ncclNvlsBufferSetup`), src/graph/paths.cc
(`ncclTopoGetNchannels`, `ncclTopoComputeP2pChannels`). Measured on 8 H100
(https://github.com/NVIDIA/nccl/issues/1685): allocations of 10 and 2 MiB, 3.28 GB for the connections of an all-to-all,
where this makes 2.82.
"""

from collections.abc import Collection
from typing import Any

import numpy as np

from .files import NodeFile

MIB = 2**20
# Of one channel to one rank and from one: 0.5 MiB of LL, 4.7 of LL128, 4 of Simple and flags, all in pieces of 2 MiB
CONNECTION = 12 * MIB
RINGS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast")
TREES = ("all_reduce",)  # of several nodes
STRAIGHT = ("send_recv", "all_to_all")
# Buffers of the switch: 8 steps of 128 KiB, to it and from it
SWITCH = 2 * 8 * 128 * 1024
ON_HOPPER, ON_BLACKWELL = 16, 24  # its channels (NVLS_NCHANNELS_SM90, NVLS_NCHANNELS_SM100_NVL)
PCIE_CHANNELS = 2  # to one rank, where no NVLink leads there
NVLINK = ("nvswitch", "bridge")
NIC_BANDWIDTH = 14e9  # of a network card that one channel fills, B/s (NCCL_P2P_PER_CHANNEL_NET_BW)
NIC_CHANNELS = 2  # to a rank on another node, where the cards are not told
PEERS = 8  # ranks that one round of sends reaches (NCCL_MAX_DEV_WORK_P2P_PER_BATCH)
POOL = 2 * 16 * 128 * 1024  # of one channel to and from all ranks on other nodes (NCCL_SHARED_STEPS, P2P_NET_CHUNKSIZE)
# Links whose buffers lie in the host's memory: gloo's, and those through it. A node of one GPU has none, its cards' are
# left out
IN_HOST = ("none", "pcie_host")


def nccl_bytes(node: NodeFile, kinds: Collection[str], gpus: Any, on_node: Any, capability: int = 9) -> Any:
    """Bytes on each GPU for a group of ranks that runs these kinds of collectives.

    Args:
        gpus: ranks of the group.
        on_node: those of them that share a node.
        capability: the GPU's major compute capability.
    """
    gpus, on_node = np.asarray(gpus), np.asarray(on_node)
    if node.link in IN_HOST:
        return 0 * gpus
    rings = int(any(kind in RINGS for kind in kinds))
    trees = any(kind in TREES for kind in kinds) & (gpus > on_node)
    connections = node.channels * (rings + trees)
    if "send_recv" in kinds:  # to the next rank and from the one before
        connections = connections + _direct(node, gpus, on_node)
    if "all_to_all" in kinds:  # ranks on other nodes share a pool
        connections = connections + _direct(node, gpus, on_node) * (on_node - 1)
    pool = _power_of_two(node.channels) * POOL * (gpus > on_node) * any(kind in STRAIGHT for kind in kinds)
    return (connections * CONNECTION + pool + _of_switch(node, kinds, on_node, capability)) * (gpus > 1)


def _direct(node: NodeFile, gpus: Any, on_node: Any) -> Any:
    """Channels to each rank that a GPU sends to straight: the fewest that any of them allows, a power of two."""
    channels = _power_of_two(node.channels)
    linked = node.links.tiers[0][0] if node.link in NVLINK else 1
    here = np.where(on_node <= linked, channels, PCIE_CHANNELS)
    nics = node.links.nics
    each = -(-nics.bandwidth * max(nics.count / node.links.gpus, 1) // NIC_BANDWIDTH) if nics else NIC_CHANNELS
    there = np.minimum(here, _power_of_two(int(max(each, NIC_CHANNELS))))
    in_one_round = 2 ** np.floor(np.log2(np.maximum(channels // -(-gpus // PEERS), 1))).astype(int)
    return np.where(gpus > on_node, np.minimum(there, in_one_round), here)


def _of_switch(node: NodeFile, kinds: Collection[str], on_node: Any, capability: int) -> Any:
    """Of in-switch reduction, which takes more than two GPUs of a node (`ncclNvlsInit`)."""
    if "all_reduce" not in kinds or node.blocks["all_reduce"].parameters.in_switch is None:
        return 0
    return (ON_HOPPER if capability < 10 else ON_BLACKWELL) * SWITCH * on_node * (on_node > 2)


def _power_of_two(n: int) -> int:
    """The next one that is not smaller."""
    return 1 << (n - 1).bit_length()
