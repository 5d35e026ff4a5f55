"""A node as one asks it for prices: seconds of a collective, and what it takes from the kernels beside it.

>>> import numpy as np
>>> node = Node.load("dgx-h100")
>>> node.collective("all_gather", np.array([2**20, 2**30]), gpus=8).shape
(2,)
>>> node.collective("all_reduce", 2**30, gpus=1)
0.0
"""

from collections.abc import Collection
from os import PathLike
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError, as_given, nearest, number_array
from ..program.dims import Array
from ..program.dtypes import ITEMSIZE
from ..values import immutable
from . import files, price
from .files import BETWEEN, NodeFile

SWITCH_ADDS = ("fp64", "fp32", "bf16", "fp16", "i32", "i64")  # what reduction in the switch (NVLS) can add
# Bytes below which NCCL takes fewer channels: so many threads, each with its 64 bytes in Simple or 8 in LL
# (https://github.com/NVIDIA/nccl, src/graph/tuning.cc and src/include/comm.h at 5067397)
BYTES_OF_A_CHANNEL = 512 * 64
# data/nodes/l40s-8.toml and pcie-8.toml, their sources
OF_ONE_HOST = "l40s-8"
ONE_HOST = (
    "PCIe as on the one host that was measured, where eight L40S reach 2 GB/s: another may be several times faster "
    "(perfmodel calibrate --network)"
)
SOME_HOST = (
    "PCIe as on the mean of four hosts that were measured, whose eight GPUs reach from 2 to 28 GB/s "
    "(perfmodel calibrate --network)"
)


class CollectiveWork(NamedTuple):
    """What a collective takes from the kernels beside it, on each GPU.

    Attributes:
        channels: thread blocks of NCCL's kernel, each of which has an SM to itself while it runs.
        hbm_bytes: bytes that it reads and writes in the GPU's memory.
    """

    channels: Any
    hbm_bytes: Any


@immutable
class GpuNode:
    """Prices of collectives on nodes of one kind; `file` holds its figures and where they come from."""

    file: NodeFile

    __eq__, __hash__ = object.__eq__, object.__hash__

    @classmethod
    def load(cls, name_or_path: str | PathLike[str]) -> "GpuNode":
        """A node by name, alias or the path of its TOML file.

        Raises:
            UserError: no such node, or a broken file.
        """
        return cls(files.load(name_or_path))

    @property
    def gpus(self) -> int:
        """GPUs of one node."""
        return self.file.links.gpus

    @property
    def notes(self) -> list[str]:
        """What of the node was not measured, and whose figures stand for it, in plain words; what hosts differ in."""
        return self.notes_of(self.file.blocks)

    def notes_of(self, kinds: Collection[str]) -> list[str]:
        """The same for a job that runs some kinds of collectives, `between` where it is on several nodes."""
        told: dict[str, list[str]] = {}
        for kind, block in self.file.blocks.items():
            if kind in kinds and block.origin != "fitted":
                whose = "its own" if block.node == self.file.slug else f"{block.node}'s"
                what = "" if block.kind == kind else f" {block.kind}"
                default = " (class default)" if block.origin == "class" else ""
                told.setdefault(f"{whose}{what}{default}", []).append("between nodes" if kind == BETWEEN else kind)
        slug = self.file.slug
        bus = self.file.link.startswith("pcie") and slug in files.names()
        whose = ONE_HOST if self.file.blocks["all_reduce"].node == OF_ONE_HOST else SOME_HOST
        unlike = [f"{slug}: {whose}"] if bus else []
        return [*unlike, *(f"{slug}: {', '.join(k)} not measured: figures of {w}" for w, k in told.items())]

    def collective(
        self, kind: str, message_bytes: Any, gpus: Any = None, nodes: Any = 1, dtype: str = "bf16", beside: Any = 1
    ) -> Any:
        """Seconds of one collective: a float, or an array where an argument is one.

        Args:
            kind: all_reduce, all_gather, reduce_scatter, all_to_all, broadcast or send_recv.
            message_bytes: of the whole buffer, as nccl-tests counts: the gathered output of an all_gather, the input
                of a reduce_scatter, of an all_to_all what one GPU sends.
            gpus: all GPUs of the group [default: those of the nodes], spread evenly over the nodes; of a send_recv,
                which is of one pair, as many as lie as far apart.
            nodes: how many nodes the group is on.
            dtype: of the elements: the switch adds floats, but no 8-bit integers.
            beside: groups that do the same at once, whose GPUs alternate on a node: they share its cards, and links
                above its smallest tier.

        Raises:
            UserError: an unknown kind or dtype, more GPUs than the nodes hold, nodes without network cards.
        """
        if not isinstance(dtype, str) or dtype not in ITEMSIZE:
            raise UserError(f"dtype {as_given(dtype)} is unknown: {nearest(str(dtype), ITEMSIZE)}")
        message, group, over = self._group(kind, message_bytes, gpus, nodes)
        _together(message_bytes=message, gpus=group, nodes=over, beside=(side := number_array("beside", beside, 1)))
        found = price.collective_seconds(
            kind, message, group, over, links=self.file.links, parameters=self.file.blocks[kind].parameters,
            between=self.file.blocks[BETWEEN].parameters if BETWEEN in self.file.blocks else None,
            reduces=dtype in SWITCH_ADDS, beside=side,
        )  # fmt: skip
        shapes = (each.shape for each in (message, group, over, side))
        return _plain(np.broadcast_to(found, np.broadcast_shapes(*shapes)))

    def collective_work(self, kind: str, message_bytes: Any, gpus: Any = None, nodes: Any = 1) -> CollectiveWork:
        """What a collective takes from kernels beside it, by the arguments and errors of `collective`."""
        message, group, _ = self._group(kind, message_bytes, gpus, nodes)
        wanted = np.ceil(message / BYTES_OF_A_CHANNEL)
        channels = np.where(group > 1, np.clip(wanted, 1, self.file.channels), 0)
        return CollectiveWork(_plain(channels), _plain(price.hbm_bytes(kind, message, group)))

    def _group(self, kind: str, message_bytes: Any, gpus: Any, nodes: Any) -> tuple[Array, Array, Array]:
        """The arguments as arrays, checked."""
        if not isinstance(kind, str) or kind not in price.KINDS:
            raise UserError(f"collective {as_given(kind)} is unknown: {nearest(str(kind), price.KINDS)}")
        message, over = number_array("message_bytes", message_bytes, 0), number_array("nodes", nodes, 1)
        group = number_array("gpus", over * self.gpus if gpus is None else gpus, 1)
        if np.any(over % 1):
            raise UserError(f"nodes must be whole numbers, got {nodes!r}")
        _together(message_bytes=message, gpus=group, nodes=over)
        self.check_network(over)
        each = group / over
        if np.any(many := each > self.gpus):
            most, on = (int(np.extract(many, x)[0]) for x in np.broadcast_arrays(group, over))
            enough = next(n for n in range(-(-most // self.gpus), most + 1) if most % n == 0)
            whose = f"{'a' if on == 1 else f'each of {on}'} {self.file.slug} of {self.gpus}"
            hint = f": nodes={enough} would do" if self.file.links.nics is not None else ""
            raise UserError(f"{most} GPUs are more than {whose} holds{hint}")
        if np.any(each % 1):
            raise UserError(f"gpus must spread evenly over the nodes, got {gpus!r} over {nodes!r}")
        return message, group, over

    def check_network(self, nodes: Any) -> None:
        """Raise `UserError` where nodes without network cards are several."""
        if np.any(np.greater(nodes, 1)) and self.file.links.nics is None:
            raise UserError(
                f"{self.file.slug} has no network cards, so a job has at most its {self.gpus} GPUs: use --gpus "
                f"{self.gpus}, another --node, or give its file a table [nics]"
            )


Node = GpuNode  # its name in the face of the package; in the house a Node is a step of autograd, as in PyTorch


def _together(**arrays: Array) -> None:
    """Raise `UserError` where shapes do not broadcast."""
    try:
        np.broadcast_shapes(*(array.shape for array in arrays.values()))
    except ValueError:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items() if array.ndim)
        raise UserError(f"shapes do not go together: {shapes}") from None


def _plain(found: Array) -> Any:
    return found if found.ndim else float(found)
