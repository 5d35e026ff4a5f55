"""Chain of LoRA: LoRA in phases, merged into the base after each."""

from dataclasses import dataclass

from .lora import Lora
from .parts.base import Periodic, method, option
from .parts.checks import positive
from .parts.merging import merge_and_restart


@method(
    "cola",
    title="Chain of LoRA",
    source="https://arxiv.org/abs/2401.04151",
    trains="A, B",
    adds="as lora; merges",
)
@dataclass(frozen=True)
class Cola(Lora):
    """LoRA that is merged into the base after every phase and starts anew, so that updates of rank r add up.

    A step is a step of LoRA. Where the rank decays along the chain, predict each phase with its own r.
    """

    phase: int = option(1000, "steps of a phase; the paper's phases are epochs, so set those of yours", positive)

    def periodic(self) -> tuple[Periodic, ...]:
        return (Periodic("merge and restart", self.phase, merge_and_restart),)
