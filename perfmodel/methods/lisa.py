"""LISA: a few blocks train at a time, and always what lies outside the blocks."""

from collections.abc import Hashable
from dataclasses import dataclass

from ..architectures.stacks import block_of
from ..errors import UserError
from .parts.base import Method, Periodic, method, option
from .parts.checks import positive
from .parts.periodic import Recorded, fresh_states, trained


@method(
    "lisa",
    title="LISA",
    source="https://arxiv.org/abs/2403.17919",
    trains="blocks, embedding, head",
    adds="block switches",
)
@dataclass(frozen=True)
class Lisa(Method):
    """Layerwise importance sampling: gamma random blocks, the embedding and the head (with its norm) train.

    The authors' callback (LMFlow, lisa_trainer.py) freezes and thaws blocks only, so what lies outside them trains
    throughout. The program is that of the last gamma blocks. The draw decides no FLOPs: the embedding trains, so
    gradients run through all blocks, and every block costs the same.
    """

    gamma: int = option(2, "blocks that train at a time; the program takes the last ones for the random draw", positive)
    interval: int = option(20, "steps between two draws; changes no cost of a step", positive)

    def sizes(self) -> tuple[str, ...]:
        return ("gamma",)

    def check(self) -> None:
        assert self.architecture is not None
        if self.gamma > self.layers:
            raise UserError(
                f"method lisa: gamma {self.gamma} exceeds the {self.layers} blocks of {self.architecture.name}"
            )

    def trains(self, name: str, kind: str, layer: int | None) -> bool:
        return layer is None or layer >= self.layers - self.gamma

    def periodic(self) -> tuple[Periodic, ...]:
        return (Periodic("switch of blocks", self.interval, _switch),)

    def layer_key(self, layer: int) -> Hashable:
        return layer >= self.layers - self.gamma


def _switch(step: Recorded) -> None:
    """The callback makes a new optimizer and carries over the state of what lies outside the blocks only."""
    stacks = step.architecture.stacks
    fresh_states(step, [p for p in trained(step) if block_of(stacks, p.name)[0] is not None])
