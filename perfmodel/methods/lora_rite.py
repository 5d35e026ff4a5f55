"""LoRA-RITE: an optimizer for LoRA whose steps are the same for all factorisations of BA."""

from dataclasses import dataclass

from ..optimizers import Update
from ..optimizers.parts import lora_rite
from .lora import Lora
from .parts.base import method


@method(
    "lora_rite",
    title="LoRA-RITE",
    source="https://arxiv.org/abs/2410.20625; gkevinyen5418/LoRA-RITE",
    trains="A, B",
    adds="lora + QRs a pair",
)
@dataclass(frozen=True)
class LoraRite(Lora):
    """LoRA with a matrix-preconditioned optimizer: QR, pseudo-inverses and eigenvalues of r x r matrices every step.

    A Python loop of 211 small kernels, 14 decompositions and 15 waits a pair, whatever the batch; its states are fp32.
    """

    @property
    def own_optimizer(self) -> str | None:
        return "the authors' LoRARite"

    def update(self, update: Update) -> None:
        lora_rite.lora_rite_step(update)
