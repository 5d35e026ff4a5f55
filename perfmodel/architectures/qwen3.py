"""Qwen 3: Qwen 2 with a norm over each head's query and key, and no biases on q, k and v.

Source: transformers/models/qwen3/modeling_qwen3.py.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..tape.shape import transpose, view
from ..tape.tensor import Tensor
from .base import Scope
from .config import Config
from .qwen2 import Qwen2
from .registered import architecture
from .traits import Traits


@architecture("qwen3")
@dataclass(frozen=True)
class Qwen3(Qwen2):
    """Dims of a Qwen 3."""

    traits: ClassVar[Traits] = replace(
        Qwen2.traits, norms=(*Qwen2.traits.norms, "q_norm", "k_norm"), fused=("liger", "axolotl")
    )
    defaults: ClassVar[dict[str, int]] = {**Qwen2.defaults, "head_dim": 128}

    @classmethod
    def biases(cls, config: Config) -> dict[str, Any]:
        bias = config.flag("attention_bias", False)
        return {"qkv_bias": bias, "output_bias": bias}

    def split_heads(self, layer: Scope, name: str, y: Tensor, heads: int) -> Tensor:
        y = view(y, (*y.shape[:-1], heads, self.head_dim))
        return transpose(y if name == "v_proj" else self.head_norm(layer, name, y), 1, 2)
