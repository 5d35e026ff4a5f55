"""Who takes part in a collective, and what is asked of the network that carries it."""

import math
from collections.abc import Collection
from typing import Any, NamedTuple, Protocol

from .dims import Dim


class Ranks(NamedTuple):
    """GPUs that exchange data: `size` of them, each `stride` ranks after the one before.

    Ranks fill one node after another, so those that lie `stride` apart are on `nodes` of them.
    """

    size: Dim
    stride: Dim = 1

    def nodes(self, per_node: Dim) -> Dim:
        """Over how many nodes of `per_node` GPUs they spread."""
        spread = -(-self.size * self.stride // per_node)
        fewer = self.size < spread
        return self.size * fewer + spread * (1 - fewer)


class JobNetwork(Protocol):
    """The network between the GPUs of a job (`perfmodel.prediction.placed`).

    Attributes:
        sigma: mean relative error of its prices on rows that no fit saw.
        host_bandwidth: B/s of the host's memory that each GPU's process has.
        slot_bandwidth: B/s of a GPU's slot, one way; infinite where its links are no slots.
        slowest: seconds of the slowest of the job's GPUs over those of the mean one.
    """

    @property
    def sigma(self) -> float:
        """Of a collective."""
        return 0.0

    @property
    def host_bandwidth(self) -> Any:
        """Of a node's, shared by its GPUs."""
        return 0.0

    @property
    def slot_bandwidth(self) -> float:
        """A slot may have fewer lanes than the card."""
        return math.inf

    @property
    def slowest(self) -> Any:
        """All GPUs wait for it."""
        return 1.0

    def notes_of(self, kinds: Collection[str]) -> list[str]:
        """What an answer has to say of a job that runs these kinds: the node that was taken, what nobody measured."""

    def seconds(self, kind: str, dtype: str, nbytes: Any, size: Any, stride: Any) -> Any:
        """Seconds of a collective of `size` ranks, each `stride` after the one before."""

    def between(self, nbytes: Any, stages: tuple[int, int], width: Any) -> Any:
        """Seconds of a message between two stages of so many ranks each."""

    def buffers(self, kinds: Collection[str], size: Any, stride: Any, capability: int) -> Any:
        """Bytes that NCCL keeps on each GPU for a group that runs these kinds of collectives."""

    def channels(self, kind: str, nbytes: Any, size: Any, stride: Any) -> Any:
        """Multiprocessors that it takes from the kernels beside it."""
