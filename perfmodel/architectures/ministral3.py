"""Ministral 3 (its text model): Mistral whose queries grow with their position, as Llama 4's do.

Source: transformers/models/ministral3/modeling_ministral3.py.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from ..tape.core import emit
from ..tape.pointwise import add, cast, mul, unary
from ..tape.shape import unsqueeze
from ..tape.tensor import Tensor
from . import masks
from .base import Scope
from .mistral import Mistral
from .registered import architecture
from .traits import Targets, Traits


@architecture("ministral3")
@dataclass(frozen=True)
class Ministral3(Mistral):
    """Dims of a Ministral 3."""

    traits: ClassVar[Traits] = replace(Mistral.traits, targets=Targets(), fused=("axolotl",), packs=False)
    defaults: ClassVar[dict[str, int]] = {"num_key_value_heads": 8, "head_dim": 128}

    def rotated(self, layer: Scope, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = super().rotated(layer, q, k, cos, sin)
        position_ids = masks.model_buffer((1, q.shape[2]))
        steps = unary("floor", emit("div.Tensor", (position_ids,), position_ids.shape, "fp32"))
        scaling = add(mul(unary("log", add(steps, 1.0)), 0.1), 1.0)
        scaling = unsqueeze(unsqueeze(scaling, 1), 3)
        return mul(q, cast(scaling, q.dtype)), k
