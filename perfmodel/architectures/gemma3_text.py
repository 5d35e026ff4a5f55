"""Gemma 3 (its text model): Gemma 2 without caps on attention, with norms over heads and two rotary tables.

Source: transformers/models/gemma3/modeling_gemma3.py.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..tape.tensor import Tensor
from .base import Scope
from .config import Config
from .gemma2 import Gemma2
from .llama import Llama
from .registered import architecture
from .traits import Traits
from .windows import TwoTables, alternating


@architecture("gemma3_text")
@dataclass(frozen=True)
class Gemma3Text(TwoTables, Gemma2):
    """Dims of a Gemma 3."""

    text_path: ClassVar[str] = "model.language_model"  # in the models of 4B, 12B and 27B, which see images too
    traits: ClassVar[Traits] = replace(
        Gemma2.traits,
        norms=(*Gemma2.traits.norms, "q_norm", "k_norm"),
        attention=Llama.traits.attention,
        heads=("sequence",),
    )

    @classmethod
    def widths(cls, config: Config) -> dict[str, Any]:
        logit_cap = config.number("final_logit_softcapping", None)
        return {**super().widths(config), "attention_cap": None, "logit_cap": logit_cap}  # the former is never applied

    @classmethod
    def windows(cls, config: Config) -> dict[str, Any]:
        return alternating(config, config.count("sliding_window_pattern", default=6), 4096)

    def projected(self, layer: Scope, x: Tensor) -> list[Tensor]:
        return self.head_norms(layer, super().projected(layer, x))
