"""Mistral: Llama without biases; every layer attends within a sliding window, where there is one.

Source: transformers/models/mistral/modeling_mistral.py.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from .config import Config
from .llama import Llama
from .registered import architecture
from .traits import Traits


@architecture("mistral")
@dataclass(frozen=True)
class Mistral(Llama):
    """Dims of a Mistral."""

    traits: ClassVar[Traits] = replace(Llama.traits, targets=replace(Llama.traits.targets, adalora=None))
    defaults: ClassVar[dict[str, int]] = {"num_key_value_heads": 8, "sliding_window": 4096}

    @classmethod
    def biases(cls, config: Config) -> dict[str, Any]:
        return {}

    @classmethod
    def windows(cls, config: Config) -> dict[str, Any]:
        return {"window": cls.count(config, "sliding_window", 0) or None}
