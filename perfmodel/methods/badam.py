"""BAdam: block coordinate descent, Adam on one block of layers at a time."""

from collections.abc import Hashable
from dataclasses import dataclass, replace

from ..errors import UserError
from .base import Method, method, option


@method("badam", title="BAdam", source="https://arxiv.org/abs/2404.02827")
@dataclass(frozen=True)
class BAdam(Method):
    """One block of layers trains, all else is frozen; backward stops at that block.

    The lower the active block, the longer the backward: over a run the cost of a step is the mean over `cycle`. The
    optimizer works in the weights' dtype; the fp32 copy of the active block that the authors' code keeps is left out.
    """

    block: int | None = option(None, "the active block, 0 next to the embedding; default the middle one, near the mean")

    def check(self) -> None:
        assert self.architecture is not None
        if self.block is not None and not 0 <= self.block < self.layers:
            raise UserError(
                f"method badam: block {self.block} is outside 0-{self.layers - 1} of {self.architecture.name}"
            )

    @property
    def active(self) -> int:
        """The block that trains."""
        return self.layers // 2 if self.block is None else self.block

    def cycle(self) -> list["BAdam"]:
        """The programs of a whole cycle, one a block: their mean is the cost of a step."""
        return [replace(self, block=i) for i in range(self.layers)]

    def trains(self, name: str, kind: str, layer: int | None) -> bool:
        return layer == self.active

    def layer_key(self, layer: int) -> Hashable:
        return layer == self.active
