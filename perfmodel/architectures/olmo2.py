"""OLMo 2: Llama with norms after attention and MLP instead of before, and over all queries and keys; fp32 rotation.

Source: transformers/models/olmo2/modeling_olmo2.py.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..tape.pointwise import cast
from ..tape.tensor import Tensor
from .base import Scope
from .config import Config
from .llama import Llama
from .norms import wide_rms_norm
from .registered import architecture
from .traits import Targets, Traits


@architecture("olmo2")
@dataclass(frozen=True)
class Olmo2(Llama):
    """Dims of an OLMo 2."""

    traits: ClassVar[Traits] = replace(
        Llama.traits, norm=wide_rms_norm, targets=Targets(), fused=(),
        norms=("post_attention_layernorm", "post_feedforward_layernorm", "norm", "q_norm", "k_norm"),
    )  # fmt: skip
    around: ClassVar[tuple[str | None, ...]] = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")

    @classmethod
    def biases(cls, config: Config) -> dict[str, Any]:
        bias = config.flag("attention_bias", False)
        return {"qkv_bias": bias, "output_bias": bias}

    def rotary_tables(self, position_ids: Tensor, dtype: str) -> tuple[Tensor, ...]:
        return super().rotary_tables(position_ids, "fp32")

    def split_heads(self, layer: Scope, name: str, y: Tensor, heads: int) -> Tensor:
        y = y if name == "v_proj" else layer.norm(f"self_attn.{name[0]}_norm", y)
        return super().split_heads(layer, name, y, heads)

    def rotated(self, layer: Scope, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        dtypes = q.dtype, k.dtype
        q, k = super().rotated(layer, q, k, cos, sin)
        return cast(q, dtypes[0]), cast(k, dtypes[1])
