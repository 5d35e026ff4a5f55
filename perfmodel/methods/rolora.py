"""RoLoRA: federated LoRA whose rounds train one factor and freeze the other in turns."""

from dataclasses import dataclass

from ..tape.tensor import Parameter
from .lora import Lora
from .parts.base import Linear, method, option
from .parts.checks import choice

ROUNDS = ("A", "B")


@method(
    "rolora",
    title="RoLoRA",
    source="https://arxiv.org/abs/2502.01755",
    trains="A or B, by round",
    adds="lora without dB or dA",
)
@dataclass(frozen=True)
class RoLora(Lora):
    """LoRA that trains A and B in alternate rounds; averaging one factor over clients is exact. A client's step.

    A round of B needs of the input only xAᵀ (T × r), a round of A the input itself. Gradients and optimizer states are
    those of one factor. What clients send is not part of a step.
    """

    round: str = option("B", "the factor that this round trains: A or B", choice(ROUNDS))

    def weights(self, layer: Linear, dtype: str) -> tuple[Parameter, Parameter]:
        self.check_rank(layer, self.r)
        a = layer.adapter("lora_A.weight", (self.r, layer.n_in), dtype, trainable=self.round == "A")
        return a, layer.adapter("lora_B.weight", (layer.n_out, self.r), dtype, trainable=self.round == "B")

    def sizes(self) -> tuple[str, ...]:
        return ("r", "round")
