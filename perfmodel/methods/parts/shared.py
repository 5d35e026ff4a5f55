"""What adapters share whose trained weights serve all layers at once."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from ...tape.tensor import Parameter
from .base import Linear
from .targeted import Targeted


@dataclass(frozen=True)
class SharedWeights(Targeted):
    """Adapters of all layers train the same parameters: their gradient adds up from the top block to the lowest."""

    def layer_key(self, layer: int) -> Hashable:
        """The top block stands alone: its gradient is the first, the others' are added to it."""
        top = max((i for i in range(self.layers) if Targeted.layer_key(self, i)), default=None)
        return super().layer_key(layer), layer == top

    def shared(self, layer: Linear, name: str, shape: tuple[Any, ...], dtype: str) -> Parameter:
        """The parameter of that name, one for the model: it belongs to no part."""
        parameters = layer.scope.build.parameters
        if name not in parameters:
            parameters[name] = Parameter(name, shape, dtype, kind="adapter", trainable=True)
        return parameters[name]
