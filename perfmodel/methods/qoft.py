"""OFT on a base in 4 bit, as peft runs it: rotated inputs of bitsandbytes' layers.

Source: peft/tuners/oft/layer.py, whose layer takes a quantised one as it is.
"""

from dataclasses import dataclass

from ..tape.tensor import Tensor
from .oft import Oft
from .parts.base import Linear, method
from .parts.four_bit import FourBit
from .parts.quantised import check_replaced


@method(
    "qoft",
    title="QOFT",
    source="https://arxiv.org/abs/2506.19847; peft/tuners/oft/layer.py",
    trains="rotations of the input",
    adds="oft + dequantisation",
)
@dataclass(frozen=True)
class QOft(FourBit, Oft):
    """OFT before linear layers whose weights are in 4 bit, all of the model's but the output head."""

    def check(self) -> None:
        super().check()
        check_replaced(self)

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        adapted = layer.name == "lm_head" or self.targets_layer(layer.name, layer.scope.layer)
        return super().linear(layer, x) if adapted else self.base(layer, x)

    def rotated(self, layer: Linear, x: Tensor) -> Tensor:
        return super().rotated(layer, x) if layer.name == "lm_head" else self.base(layer, x)
