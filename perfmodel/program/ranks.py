"""Who takes part in a collective."""

from typing import NamedTuple

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
