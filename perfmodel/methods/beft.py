"""BEFT as PEFT runs it: a trained bias on the output of a linear layer."""

from dataclasses import dataclass
from typing import ClassVar

from ..tape.pointwise import add, cast
from ..tape.shape import view
from ..tape.tensor import Tensor
from .parts.base import Linear, method
from .parts.targeted import Targeted


@method(
    "beft",
    title="BEFT",
    source="https://arxiv.org/abs/2509.15974; peft/tuners/beft/layer.py",
    trains="a bias of the values",
    adds="one add",
)
@dataclass(frozen=True)
class Beft(Targeted):
    """y = xWᵀ + b: one trained vector a layer, by default on the values."""

    takes_conv1d: ClassVar[bool] = False
    takes_layers: ClassVar[bool] = False
    family: ClassVar[str] = "beft"

    def adapted(self, layer: Linear, x: Tensor, dtype: str) -> Tensor:
        bias = view(layer.adapter("beft_bias", (1, layer.n_out), dtype), (layer.n_out,))
        result = layer(x)
        return cast(add(result, bias), result.dtype)
