"""LoRA+: B learns faster than A."""

from dataclasses import dataclass

from ..optimizers import Update
from .lora import Lora
from .parts.base import method, option


@method(
    "loraplus",
    title="LoRA+",
    source="https://arxiv.org/abs/2402.12354; peft/optimizers/loraplus.py",
    trains="A, B in two groups",
    adds="as lora",
)
@dataclass(frozen=True)
class LoraPlus(Lora):
    """LoRA with two learning rates: A and B are two parameter groups of the setup's optimizer, without weight decay.

    What a step computes is LoRA's; a list-wise optimizer launches for two shorter lists.
    """

    ratio: float = option(16.0, "learning rate of B over that of A; changes no cost")

    def update(self, update: Update) -> None:
        faster = [p for p in update.parameters if "lora_B" in p.name]
        update.group([p for p in update.parameters if "lora_B" not in p.name], decay=False)
        update.group(faster, decay=False)
