"""LoRA-Pro: gradients of A and B whose product is nearest to a step of full fine-tuning."""

from dataclasses import dataclass

from ..optimizers import Update
from ..optimizers.parts import lora_pro
from .lora import Lora
from .parts.base import method


@method(
    "lora_pro",
    title="LoRA-Pro",
    source="https://arxiv.org/abs/2407.18242; mrflogs/LoRA-Pro, stage_1_and_2.py",
    trains="A, B",
    adds="lora + solves a pair",
)
@dataclass(frozen=True)
class LoraPro(Lora):
    """LoRA whose optimizer is Adam on the m x n gradient that A and B make together, projected back on them.

    It keeps two moments of the size of the adapted weights and makes an m x m projector of every pair; the adjusted
    gradients go to plain SGD. What DeepSpeed, in which the authors' code lives, does around it is left out.
    """

    @property
    def own_optimizer(self) -> str | None:
        return "its own Adam, with SGD after it"

    def update(self, update: Update) -> None:
        self.check_pairs(update.parameters)
        for run in update.runs(update.parameters):
            for a, b in zip(run[::2], run[1::2], strict=True):
                lora_pro.adjust(update, a, b)
        update.group(update.parameters, optimizer="sgd")
