"""LoRA beside base layers that bitsandbytes keeps in few bits, as peft's layers for them run it."""

from dataclasses import dataclass
from typing import ClassVar

from ...tape.core import tape
from ...tape.linalg import linear
from ...tape.pointwise import add, cast, dropout, mul
from ...tape.shape import clone
from ...tape.tensor import Parameter, Tensor
from ..lora import Lora
from .base import Linear, option


@dataclass(frozen=True)
class QuantisedLora(Lora):
    """A subclass writes `base`, what a quantised layer computes; the output head stays as it is."""

    prepared: bool = option(False, "peft's prepare_model_for_kbit_training: norms, embeddings and head in fp32")

    implementations: ClassVar[tuple[str, ...]] = ("peft",)
    clones: ClassVar[bool]  # whether peft copies the base layer's result before it adds to it

    def base_dtype(self, dtype: str) -> str:
        return "fp32" if self.prepared else dtype

    def base(self, layer: Linear, x: Tensor) -> Tensor:
        """y of a quantised base layer."""
        raise TypeError(f"{type(self).__name__} must define base")

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        if layer.name == "lm_head":
            return super().linear(layer, x)
        if not self.targets_layer(layer.name, layer.scope.layer):
            return self.base(layer, x)
        layer.scope.count_adapter()
        return self._beside(layer, x, self.dtype_beside(layer.scope.dtype))

    def _beside(self, layer: Linear, x: Tensor, dtype: str) -> Tensor:
        result = self.base(layer, x)
        if self.clones:
            result = clone(result)
        a, b = self.weights(layer, dtype)
        converts = not (tape().autocast and tape().device == "cuda")  # what `torch.is_autocast_enabled()` asks
        expected = result.dtype
        if converts:
            x = cast(x, dtype)
        output = mul(linear(linear(dropout(x, self.dropout), a), b), self.alpha)
        if converts:
            output = cast(output, expected)
        return add(result, output)


def stored(layer: Linear, name: str, shape: tuple[int, ...], dtype: str, elements: int = 0) -> Parameter:
    """A tensor that the base layer keeps; `elements` of the model's parameters lie in it, none in scales."""
    made = layer.scope.parameter(f"{layer.name}.{name}", shape, "weight" if elements else "scale", dtype=dtype)
    made.elements = elements
    return made


def bias_of(layer: Linear, dtype: str) -> Parameter | None:
    """The bias of a quantised layer, which follows its input's dtype."""
    return layer.scope.parameter(f"{layer.name}.bias", (layer.n_out,), "bias", dtype=dtype) if layer.has_bias else None
