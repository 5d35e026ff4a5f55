"""BAdam: block coordinate descent, Adam on one block of layers at a time."""

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import UserError
from ..periodic import fresh_states, trained
from .base import Method, Periodic, method, option, positive

if TYPE_CHECKING:
    from ..step import Step


@method("badam", title="BAdam", source="https://arxiv.org/abs/2404.02827")
@dataclass(frozen=True)
class BAdam(Method):
    """One block of layers trains, all else is frozen; backward stops at that block.

    The lower the active block, the longer the backward: over a run the cost of a step is the mean over `cycle`. The
    optimizer works in the weights' dtype; the fp32 copy of the active block that the authors' code keeps is left out.
    """

    block: int | None = option(None, "the active block, 0 next to the embedding; default the middle one, near the mean")
    interval: int = option(50, "steps between two switches; changes no cost of a step")

    def __post_init__(self) -> None:
        positive("method badam: interval", self.interval)

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

    def periodic(self) -> tuple[Periodic, ...]:
        return (Periodic("switch of the block", self.interval, _switch),)

    def trains(self, name: str, kind: str, layer: int | None) -> bool:
        return layer == self.active

    def layer_key(self, layer: int) -> Hashable:
        return layer == self.active


def _switch(step: "Step") -> None:
    """The authors clear the optimizer's state, so the new block begins with zero moments (badam/block_optim.py)."""
    fresh_states(step, trained(step))
