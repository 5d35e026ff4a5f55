"""Qwen 1.5 to 2.5: Llama with biases on q, k and v; the upper layers may attend within a sliding window.

Source: transformers/models/qwen2/modeling_qwen2.py.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..errors import UserError
from .config import Config
from .llama import FULL, SLIDING, TARGETS, Llama
from .registered import architecture
from .traits import Traits


@architecture("qwen2")
@dataclass(frozen=True)
class Qwen2(Llama):
    """Dims of a Qwen 1.5, 2 or 2.5."""

    traits: ClassVar[Traits] = replace(Llama.traits, targets=TARGETS)
    defaults: ClassVar[dict[str, int]] = {"num_key_value_heads": 32, "sliding_window": 4096}

    @classmethod
    def biases(cls, config: Config) -> dict[str, Any]:
        return {"qkv_bias": True}

    @classmethod
    def windows(cls, config: Config) -> dict[str, Any]:
        window = cls.count(config, "sliding_window", 0) if config.flag("use_sliding_window", False) else 0
        full = config.count("max_window_layers", default=28, least=0)  # the layers below the first that slides
        layers = config.count("num_hidden_layers")
        usual = [SLIDING if window and i >= full else FULL for i in range(layers)]
        types = config.each_of("layer_types", usual, (FULL, SLIDING))
        if SLIDING not in types:
            return {}
        if not window:
            raise UserError(f"{config.origin}: layer_types has {SLIDING}, but use_sliding_window is false")
        return {"window": window, "layer_types": types}
