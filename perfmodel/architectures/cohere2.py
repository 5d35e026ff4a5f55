"""Cohere 2 (Command R7B, Command A): Cohere of whose layers three in four slide; the others know no positions.

Source: transformers/models/cohere2/modeling_cohere2.py.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..tape.tensor import Tensor
from .base import Scope
from .cohere import Cohere
from .config import Config
from .llama import SLIDING
from .registered import architecture
from .traits import Traits
from .windows import alternating


@architecture("cohere2")
@dataclass(frozen=True)
class Cohere2(Cohere):
    """Dims of a Command R7B or Command A."""

    traits: ClassVar[Traits] = replace(Cohere.traits, fused=("axolotl",))

    @classmethod
    def windows(cls, config: Config) -> dict[str, Any]:
        return alternating(config, config.count("sliding_window_pattern", default=4), 4096)

    def rotated(self, layer: Scope, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return super().rotated(layer, q, k, cos, sin) if self.reach(layer.index) == SLIDING else (q, k)
