"""LoRA-RITE: an optimizer for LoRA whose steps are the same for all factorisations of BA."""

from dataclasses import dataclass

from ..errors import UserError
from ..optimizers import Update
from ..optimizers.parts import lora_rite
from .lora import Lora
from .parts.base import method


@method(
    "lora_rite",
    title="LoRA-RITE",
    source="https://arxiv.org/abs/2410.20625; gkevinyen5418/LoRA-RITE at 8ece053",
    trains="A, B",
    adds="lora + QRs a pair",
)
@dataclass(frozen=True)
class LoraRite(Lora):
    """LoRA with a matrix-preconditioned optimizer: QR, pseudo-inverses and eigenvalues of r x r matrices every step.

    A Python loop of 111 small kernels, 6 decompositions and 7 waits a pair, whatever the batch.
    """

    @property
    def own_optimizer(self) -> str | None:
        return "the authors' LoRARite"

    def check(self) -> None:
        super().check()
        if self.adapter_dtype not in (None, "fp32"):
            raise UserError(
                f"method lora_rite: PyTorch has no QR of {self.adapter_dtype} adapters; leave adapter_dtype out (fp32)"
            )

    def update(self, update: Update) -> None:
        self.check_pairs(update.parameters)
        lora_rite.lora_rite_step(update)
