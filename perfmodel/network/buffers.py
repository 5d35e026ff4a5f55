"""What NCCL keeps in a GPU's memory for a group of ranks, beside PyTorch's allocator.

Every channel has a connection to each rank that it exchanges with: a ring to the next one and from the one before. It
holds a buffer for each protocol. In-switch reduction has buffers that the switch writes to, for each rank of a node.
Rings, trees and the switch are connected when a collective first asks for them (NCCL 2.22 and later).

Sources: https://github.com/NVIDIA/nccl, src/init.cc (`computeBuffSizes`), src/transport/p2p.cc (`p2pRecvSetup`),
src/transport/nvls.cc (`ncclNvlsBufferSetup`), src/graph/paths.cc (`ncclTopoComputeP2pChannels`). Measured on 8 H100
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
# Buffers of the switch: 8 steps of 128 KiB, to it and from it
SWITCH = 2 * 8 * 128 * 1024
ON_HOPPER, ON_BLACKWELL = 16, 24  # its channels (NVLS_NCHANNELS_SM90, NVLS_NCHANNELS_SM100_NVL)
PCIE_CHANNELS = 2  # to one rank, where no NVLink leads there
NVLINK = ("nvswitch", "bridge")
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
    direct = _power_of_two(node.channels) if node.link in NVLINK else PCIE_CHANNELS
    if "send_recv" in kinds:  # to the next rank and from the one before
        connections = connections + direct
    if "all_to_all" in kinds:
        connections = connections + direct * (gpus - 1)
    return (connections * CONNECTION + _of_switch(node, kinds, on_node, capability)) * (gpus > 1)


def _of_switch(node: NodeFile, kinds: Collection[str], on_node: Any, capability: int) -> Any:
    """Of in-switch reduction, which takes more than two GPUs of a node (`ncclNvlsInit`)."""
    if "all_reduce" not in kinds or node.blocks["all_reduce"].parameters.in_switch is None:
        return 0
    return (ON_HOPPER if capability < 10 else ON_BLACKWELL) * SWITCH * on_node * (on_node > 2)


def _power_of_two(n: int) -> int:
    """The next one that is not smaller."""
    return 1 << (n - 1).bit_length()
