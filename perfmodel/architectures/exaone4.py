"""EXAONE 4: norms after attention and MLP and over heads; layers that attend to all beside sliding ones do not rotate.

Source: transformers/models/exaone4/modeling_exaone4.py.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..tape.tensor import Tensor
from .base import Scope
from .config import Config
from .llama import FULL, SLIDING, Llama
from .registered import architecture
from .traits import Targets, Traits
from .windows import alternating, layer_types


@architecture("exaone4")
@dataclass(frozen=True)
class Exaone4(Llama):
    """Dims of an EXAONE 4."""

    traits: ClassVar[Traits] = replace(
        Llama.traits, targets=Targets(), fused=("axolotl",),
        norms=("post_attention_layernorm", "post_feedforward_layernorm", "norm", "q_norm", "k_norm"),
    )  # fmt: skip
    around: ClassVar[tuple[str | None, ...]] = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
    defaults: ClassVar[dict[str, int]] = {"num_key_value_heads": 32, "sliding_window": 4096}

    @classmethod
    def biases(cls, config: Config) -> dict[str, Any]:
        return {}

    @classmethod
    def windows(cls, config: Config) -> dict[str, Any]:
        if not cls.count(config, "sliding_window", 0):
            layer_types(config, [FULL] * config.count("num_hidden_layers"))
            return {}
        listed = config.values.get("layer_types") is not None  # then the pattern may be a string, which nothing reads
        return alternating(config, 4 if listed else config.count("sliding_window_pattern", default=4), 4096)

    def projected(self, layer: Scope, x: Tensor) -> list[Tensor]:
        return self.head_norms(layer, super().projected(layer, x))

    def rotated(self, layer: Scope, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        turns = self.window is None or self.reach(layer.index) == SLIDING
        return super().rotated(layer, q, k, cos, sin) if turns else (q, k)
