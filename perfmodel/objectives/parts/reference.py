"""The reference that log-probabilities are compared with: a frozen model, or the trained one without its adapters."""

from collections.abc import Hashable
from dataclasses import dataclass

from ...architectures.base import Linear
from ...methods.parts.base import Method
from ...methods.parts.targeted import Targeted
from ...tape.tensor import Tensor


@dataclass(frozen=True)
class Frozen(Method):
    """A model of which nothing trains."""


@dataclass(frozen=True, kw_only=True)
class AdaptersOff(Method):
    """A model whose adapters are disabled (PEFT's `disable_adapter`): its base layers as they lie in memory."""

    inner: Targeted

    def layer_key(self, layer: int) -> Hashable:
        return self.inner.layer_key(layer)

    def base_dtype(self, dtype: str) -> str:
        return self.inner.base_dtype(dtype)

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        return layer(x) if layer.scope.layer is None else self.inner.base(layer, x)
