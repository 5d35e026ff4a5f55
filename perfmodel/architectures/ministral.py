"""Ministral: Mistral whose layers may attend differently.

Source: transformers/models/ministral/modeling_ministral.py.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from .config import Config
from .llama import SLIDING
from .mistral import Mistral
from .registered import architecture
from .traits import Targets, Traits
from .windows import layer_types


@architecture("ministral")
@dataclass(frozen=True)
class Ministral(Mistral):
    """Dims of a Ministral."""

    traits: ClassVar[Traits] = replace(Mistral.traits, targets=Targets(), fused=("axolotl",))

    @classmethod
    def windows(cls, config: Config) -> dict[str, Any]:
        usual = [SLIDING] * config.count("num_hidden_layers")
        return {"window": config.count("sliding_window", default=4096), "layer_types": layer_types(config, usual)}
