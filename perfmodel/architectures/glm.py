"""GLM-4 of 2024 (9B, 1M): Llama with a fused MLP; half of each head's dims turn, neighbours together.

Source: transformers/models/glm/modeling_glm.py.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..tape.shape import narrow, unsqueeze
from ..tape.tensor import Tensor
from . import masks
from .base import Scope
from .config import Config
from .llama import Llama
from .phi3 import gate_up_mlp
from .registered import architecture
from .rotary import rotate_pairs, rotate_part
from .traits import Targets, Traits


@architecture("glm")
@dataclass(frozen=True)
class Glm(Llama):
    """Dims of a GLM."""

    traits: ClassVar[Traits] = replace(Llama.traits, targets=Targets(), fused=("axolotl",))
    defaults: ClassVar[dict[str, int]] = {"num_key_value_heads": 2, "head_dim": 128}

    @classmethod
    def biases(cls, config: Config) -> dict[str, Any]:
        return {"qkv_bias": config.flag("attention_bias", True)}

    @classmethod
    def positions(cls, config: Config) -> dict[str, Any]:
        return {**super().positions(config), "rotary": cls.partial(config, 0.5)}

    def linear_names(self) -> list[str]:
        return [*super().linear_names()[:4], "mlp.gate_up_proj", "mlp.down_proj"]

    def rotated(self, layer: Scope, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        half = cos.shape[-1] // 2
        cos, sin = (masks.repeat_last(narrow(unsqueeze(table, 1), -1, half)) for table in (cos, sin))
        return rotate_part(q, k, cos, sin, rotate_pairs)

    def mlp(self, layer: Scope, x: Tensor) -> Tensor:
        return gate_up_mlp(self, layer, x)
