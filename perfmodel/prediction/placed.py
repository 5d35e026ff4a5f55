"""A job's GPUs on nodes of one kind: which node, how many of them, and what a collective of some of its ranks costs."""

import math
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

import numpy as np

from .. import units
from ..devices import own
from ..devices.profile import DeviceProfile
from ..errors import UserError
from ..network import files
from ..network.buffers import nccl_bytes
from ..network.files import BETWEEN
from ..network.node import Node
from ..program.dims import Dim
from ..program.ranks import Ranks
from ..program.stragglers import slowest_of
from ..setup import Setup
from ..values import immutable

SLOTS = ("pcie", "pcie_host")  # links that are the bus
WAITED = "the slowest of the GPUs, for which the others wait, is taken as {} slower than the mean one"
MEASURE = "torchrun --nproc-per-node {} -m perfmodel calibrate --network --device cpu"


@immutable
class Placed:
    """GPUs of a job on the nodes that hold them, which they fill one after another.

    Attributes:
        per_node: GPUs of the job on each node; of nodes that they fill unevenly on the fullest.
        several: whether that are several nodes.
        chosen: what an answer should say of how they were chosen.
        slowest: seconds of the slowest of the job's GPUs over those of the mean one.
    """

    node: Node
    per_node: Dim
    several: bool
    chosen: list[str]
    slowest: Any

    def notes_of(self, kinds: Collection[str]) -> list[str]:
        """What an answer of a job that runs these kinds of collectives should say; of none, nothing of the links."""
        ran = [*kinds, *([BETWEEN] if self.several else [])]
        return [*self.chosen, *(self.node.notes_of(ran) if kinds else [])]

    @property
    def sigma(self) -> float:
        """Relative standard deviation of a collective: the worst of the kinds that training runs, from rows that no fit
        saw."""
        found = [self.node.file.blocks[kind].residuals.get("mean", 0.0) for kind in ("all_reduce", "all_gather")]
        return float(max(found))

    @property
    def host_bandwidth(self) -> Any:
        """B/s of the host's memory that each GPU's process has."""
        return self.node.file.host_bandwidth / self.per_node

    @property
    def slot_bandwidth(self) -> float:
        """B/s between a GPU and its host, one way, where the links between GPUs are its slots."""
        links = self.node.file.links
        return links.tiers[0][1] if self.node.file.link in SLOTS else math.inf

    def seconds(self, kind: str, dtype: str, nbytes: Any, size: Any, stride: Any) -> Any:
        """Seconds of a collective of `size` ranks, each `stride` after the one before; of many, shape (rows, *grid)."""
        if np.ndim(self.per_node) and np.ndim(size) == 1:  # they do not vary over the grid, but their nodes do
            nbytes, size, stride = (x[:, None] for x in (nbytes, size, stride))
        gpus, nodes = self._spread(size, stride)
        if kind == "send_recv":  # of neighbours in a ring the two that lie farthest apart
            gpus = np.where(nodes > 1, 2, np.minimum(size * stride, self.node.gpus))
            nodes = np.minimum(nodes, 2)
        return self.node.collective(kind, nbytes, gpus, nodes, dtype, np.minimum(stride, self.per_node))

    def between(self, nbytes: Any, stages: tuple[int, int], width: Any) -> Any:
        """Seconds of a message from one stage of a pipeline to another; of as many side by side the slowest.

        Two ranks of a node pass the smallest of its tiers that holds both. All ranks of a stage send at once.

        Args:
            width: ranks of a stage.
        """
        found: Any = 0.0
        for place in (0, width - 1):
            ends = [stage * width + place for stage in stages]
            (here, there), (on, to) = ([e % self.per_node for e in ends], [e // self.per_node for e in ends])
            group: Any = self.node.gpus
            for size, _ in reversed(self.node.file.links.tiers):
                group = np.where(here // size == there // size, size, group)
            leaves = on != to
            gpus, nodes = np.where(leaves, 2, np.maximum(group, 2)), np.where(leaves, 2, 1)
            beside = np.minimum(width, self.per_node)
            found = np.maximum(found, self.node.collective("send_recv", nbytes, gpus, nodes, beside=beside))
        return found if np.ndim(found) else float(found)

    def channels(self, kind: str, nbytes: Any, size: Any, stride: Any) -> Any:
        """Multiprocessors that it takes from the kernels beside it."""
        return self.node.collective_work(kind, nbytes, *self._spread(size, stride)).channels

    def buffers(self, kinds: Collection[str], size: Any, stride: Any, capability: int) -> Any:
        """Bytes that NCCL keeps on each GPU for a group that runs these kinds of collectives."""
        gpus, nodes = self._spread(size, stride)
        return nccl_bytes(self.node.file, kinds, gpus, gpus // nodes, capability)

    def _spread(self, size: Any, stride: Any) -> tuple[Any, Any]:
        """Ranks and their nodes; some that lie on nodes unevenly (3 stages on 2) count as so many that do not (4)."""
        nodes = Ranks(size, stride).nodes(self.per_node)
        return -(-size // nodes) * nodes, nodes


def placed(setup: Setup, on: DeviceProfile) -> Placed:
    """Where the GPUs of a setup stand, or its processes on CPUs.

    Raises:
        UserError: an unknown node, one of GPUs for a CPU, none that is known to hold the device, or GPUs that do not
            spread evenly over nodes that were asked for.
    """
    node, notes = _of_cpu(setup, on) if on.kind == "cpu" else _of_gpus(setup, on)
    gpus = np.asarray(setup.gpus)
    nodes: Any = -(-gpus // node.gpus) if setup.nodes is None else setup.nodes
    node.check_network(nodes)
    per_node: Any = -(-gpus // nodes)
    uneven = per_node * nodes != gpus
    if np.any(per_node > node.gpus):
        hold = f"{setup.nodes} x {node.file.slug} of {node.gpus} hold"
        raise UserError(f"gpus {setup.gpus} are more than {hold}; without --nodes they stand on as many as they need")
    if setup.nodes is not None and np.any(uneven):
        raise UserError(f"gpus {setup.gpus} do not spread evenly over {setup.nodes} nodes of {node.gpus} GPUs")
    alone = bool(np.all(gpus == 1))  # it offloads, and its node is the host that it does to
    notes = [] if alone else notes
    if not alone and np.any(uneven):
        some, on_nodes, each = (int(np.extract(uneven, a)[0]) for a in (gpus, nodes, per_node))
        notes = [*notes, f"{some} GPUs do not fill {on_nodes} nodes evenly: they exchange as with {each} on each"]
    groups: dict[str, Any] = {
        "tp": setup.tp,
        "cp": setup.tp * setup.cp,
        "shard_group": setup.tp * (setup.shard_group or 1),
    }
    for name, group in groups.items():
        if np.any(_split(np.asarray(setup.gpus), group, per_node)):
            asked, most, fitting = f"{name} {getattr(setup, name)}", np.max(per_node), _fitting(gpus, groups, node.gpus)
            hint = f"--nodes {fitting} would do" if fitting else "choose a number of GPUs that they divide"
            raise UserError(f"{asked}: groups do not fit nodes of {most} GPUs; {hint}")
    on_each: Dim = per_node.astype(np.int64) if np.ndim(per_node) else int(per_node)
    slowest = slowest_of(setup.gpus) if on.kind == "cuda" else 1.0
    if not np.ndim(slowest) and slowest > 1:
        notes = [*notes, WAITED.format(units.percent(slowest - 1, 1))]
    return Placed(node, on_each, bool(np.any(nodes > 1)), notes, slowest)


def _split(gpus: Any, group: Any, per_node: Any) -> Any:
    """Whether groups of ranks lie partly on one node and partly on another."""
    return np.greater(gpus, group) & (group % per_node > 0) & (per_node % group > 0)


def _fitting(gpus: Any, groups: Mapping[str, Any], most: int) -> int:
    """The fewest nodes over which a job's GPUs spread evenly, and no group is split; 0 if there are none such."""
    if np.ndim(gpus) or any(np.ndim(group) for group in groups.values()):
        return 0
    found = [n for n in range(-(-int(gpus) // most), int(gpus) + 1) if gpus % n == 0]
    return next((n for n in found if not any(_split(gpus, group, gpus // n) for group in groups.values())), 0)


def _of_gpus(setup: Setup, on: DeviceProfile) -> tuple[Node, list[str]]:
    """The node, and how it was chosen where nobody named it."""
    if setup.node:
        node = Node.load(setup.node)
        of = node.file.gpu
        return node, [] if of == on.slug else [f"links of {node.file.slug}, a node of {of}"]
    name = _of_gpu().get(on.slug)
    if name is None:
        name = files.standing_for(on.slug)
        notes = [f"no node of {on.slug} is known: links as in {name} (--node NAME, see `perfmodel nodes`)"]
    else:
        notes = [f"the GPUs stand in {name} (--node)"]
    return Node.load(name), notes


def _of_cpu(setup: Setup, on: DeviceProfile) -> tuple[Node, list[str]]:
    """The same of processes that exchange by gloo, which is as fast as the machine on which it was measured.

    Each is a device by itself. A core alone does not fill the memory's bandwidth (EPYC Genoa: one reads 24 to 27 GB/s,
    two 51 to 55, `data/devices/cpu-epyc-genoa-2c.toml`), so that is not divided either.
    """
    name = setup.node or (own.CALIBRATED if own.find(own.CALIBRATED, files.OWN) else None)
    processes = int(np.max(setup.gpus))
    measure = MEASURE.format(processes // (setup.nodes or 1))
    if name is None:
        own_nodes = " or ".join(own.calibrated(files.OWN))
        there = f"; or take one that was (--node {own_nodes})" if own_nodes else ""
        raise UserError(
            f"gpus: {processes} processes on {on.slug} need the network between them, measured: {measure}{there}"
        )
    node = Node.load(name)
    if node.file.link != "none" or node.file.slug in files.names():
        raise UserError(f"gpus: {name} is a node of GPUs, and {on.slug} is a CPU; measure its network: {measure}")
    if processes > node.gpus and node.file.links.nics is None:
        raise UserError(f"gpus: {name} was measured between {node.gpus} processes, not {processes}: {measure}")
    alone = f"each process has the cores, the memory and its bandwidth that {on.slug} was calibrated with to itself"
    return node, [*([] if setup.node else [f"the processes exchange as in {name} (--node)"]), alone]


@cache
def _of_gpu() -> dict[str, str]:
    """Device -> the first bundled node of such GPUs with the most of them."""
    found: dict[str, files.NodeFile] = {}
    for name in files.names():
        node = files.load(name)
        known = found.get(node.gpu)
        if known is None or (node.links.gpus, node.slug.startswith("dgx")) > (
            known.links.gpus,
            known.slug.startswith("dgx"),
        ):
            found[node.gpu] = node
    return {gpu: node.slug for gpu, node in found.items()}
