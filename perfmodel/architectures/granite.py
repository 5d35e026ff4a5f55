"""Granite 3 (dense): Llama with factors on the embedding, on what joins the residual stream, and on the logits.

Source: transformers/models/granite/modeling_granite.py.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from ..tape.elementary import div
from ..tape.pointwise import add, mul
from ..tape.tensor import Tensor
from .llama import Llama
from .registered import architecture
from .traits import Targets, Traits


@architecture("granite")
@dataclass(frozen=True)
class Granite(Llama):
    """Dims of a Granite; its multipliers change values only."""

    traits: ClassVar[Traits] = replace(Llama.traits, targets=Targets(), fused=("axolotl",))

    def scaled_words(self, x: Tensor) -> Tensor:
        return mul(x, 1.0)

    def joined(self, residual: Tensor, x: Tensor) -> Tensor:
        return add(residual, mul(x, 1.0))

    def scaled_logits(self, logits: Tensor) -> Tensor:
        return div(logits, 1.0)
