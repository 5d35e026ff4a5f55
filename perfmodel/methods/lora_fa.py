"""LoRA-FA: LoRA with A frozen at its random start."""

from dataclasses import dataclass

from ..tape.core import Parameter
from .base import Linear, method
from .lora import Lora


@method("lora_fa", title="LoRA-FA", source="https://arxiv.org/abs/2308.03303; peft/optimizers/lorafa.py")
@dataclass(frozen=True)
class LoraFa(Lora):
    """LoRA whose A is frozen: no gradient of A, and of the input only xAᵀ (T × r) is kept.

    The optimizer is the setup's; the projected update that the paper adds to it (peft's `LoraFAOptimizer`) is left out.
    """

    def weights(self, layer: Linear, dtype: str) -> tuple[Parameter, Parameter]:
        self.check_rank(layer, self.r)
        a = layer.adapter("lora_A.weight", (self.r, layer.n_in), dtype, trainable=False)
        return a, layer.adapter("lora_B.weight", (layer.n_out, self.r), dtype)
