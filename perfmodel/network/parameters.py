"""What a measurement must tell about a node's links: a few figures a collective, each with a unit and a meaning."""

from typing import NamedTuple

from ..values import immutable

PROTOCOLS = ("ll", "ll128", "simple")  # NCCL's: a flag beside every 4 bytes, beside every 120, after a whole chunk


class Protocol(NamedTuple):
    """A straight line: start + step · hops + bytes / (share · wire).

    Attributes:
        start: seconds of any message: the launch and what is there to set up.
        step: seconds of one hop from GPU to GPU (or from node to node), of which a ring waits for every one.
        share: of the wire's bandwidth in one direction that payload gets.
    """

    start: float
    step: float
    share: float


class InSwitch(NamedTuple):
    """Reduction in the switch (NVLS): `start` and `share` as of a `Protocol`; its hops do not grow with the group."""

    start: float
    share: float


@immutable
class CollectiveParameters:
    """One kind of collective within a node.

    Attributes:
        ll, ll128, simple: NCCL's protocols, from low latency to high bandwidth; the fastest is taken.
        own_part: passes of a GPU's own part of the buffer, which takes no wire but is copied all the same.
        through: share of the wire's bandwidth that is left to a group by what its ring passes (`Links.tiers`): 1 within
            a switch, less through bridges and sockets that several GPUs share; one figure a tier.
        in_switch: reduction in the switch; None where it has none.
    """

    ll: Protocol
    ll128: Protocol
    simple: Protocol
    own_part: float
    through: tuple[float, ...]
    in_switch: InSwitch | None = None

    @property
    def protocols(self) -> tuple[Protocol, ...]:
        """All of them."""
        return self.ll, self.ll128, self.simple


@immutable
class Between:
    """What passes between nodes, of any kind: `share` is of the network cards' bandwidth.

    Attributes:
        ll: small messages (LL and LL128, which the cards carry alike).
        simple: large ones.
    """

    ll: Protocol
    simple: Protocol


@immutable
class Nics:
    """A node's network cards.

    Attributes:
        kind: infiniband, efa, roce or ethernet.
        count: cards in a node, spread evenly over its GPUs.
        bandwidth: B/s of one card in one direction.
    """

    kind: str
    count: int
    bandwidth: float
