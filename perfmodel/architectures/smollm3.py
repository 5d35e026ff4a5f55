"""SmolLM3: Llama of whose layers every fourth knows no positions (NoPE).

Source: transformers/models/smollm3/modeling_smollm3.py.
"""

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..tape.tensor import Tensor
from .base import Scope
from .config import Config
from .llama import FULL, SLIDING, Llama
from .registered import architecture
from .traits import Targets, Traits
from .windows import layer_types


@architecture("smollm3")
@dataclass(frozen=True)
class SmolLM3(Llama):
    """Dims of a SmolLM3.

    Attributes:
        rope: for each layer 1 if it turns queries and keys, else 0 (the config's `no_rope_layers`).
    """

    rope: tuple[int, ...] = ()

    traits: ClassVar[Traits] = replace(Llama.traits, targets=Targets(), fused=("liger", "axolotl"))
    defaults: ClassVar[dict[str, int]] = {"num_key_value_heads": 4}

    @classmethod
    def widths(cls, config: Config) -> dict[str, Any]:
        return {**super().widths(config), "tied": config.flag("tie_word_embeddings", True), "rope": cls.ropes(config)}

    @classmethod
    def ropes(cls, config: Config) -> tuple[int, ...]:
        """1 for each layer with rotary positions, 0 for the others."""
        every = config.count("no_rope_layer_interval", default=4)
        usual = [int((i + 1) % every != 0) for i in range(config.count("num_hidden_layers"))]
        return config.each_of("no_rope_layers", usual, (0, 1))

    @classmethod
    def windows(cls, config: Config) -> dict[str, Any]:
        window = cls.count(config, "sliding_window", 0) if config.flag("use_sliding_window", False) else 0
        usual = [SLIDING if window and not rope else FULL for rope in cls.ropes(config)]
        types = layer_types(config, usual)
        if SLIDING not in types:
            return {}
        return {"window": window or config.count("sliding_window"), "layer_types": types}

    def layer_kind(self, layer: int) -> Hashable:
        return self.reach(layer), self.rope[layer]

    def rotated(self, layer: Scope, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return super().rotated(layer, q, k, cos, sin) if self.rope[layer.index] else (q, k)
