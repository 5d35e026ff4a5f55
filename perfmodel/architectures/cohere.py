"""Cohere (Command R, Aya 23): attention and MLP side by side behind one LayerNorm, rotation of pairs in fp32.

Source: transformers/models/cohere/modeling_cohere.py.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..tape.pointwise import add, cast, mul
from ..tape.tensor import Tensor
from . import masks
from .base import Scope
from .config import Config
from .llama import Llama, Masks
from .norms import centred_norm
from .registered import architecture
from .rotary import rotate, rotate_pairs
from .traits import Traits


@architecture("cohere")
@dataclass(frozen=True)
class Cohere(Llama):
    """Dims of a Command R."""

    traits: ClassVar[Traits] = Traits(
        head="causal", norm=centred_norm, norms=("input_layernorm", "norm"), packs=True, cut_loss=True
    )

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        config.refuse(use_qk_norm=False)

    @classmethod
    def widths(cls, config: Config) -> dict[str, Any]:
        return {**super().widths(config), "tied": config.flag("tie_word_embeddings", True)}

    @classmethod
    def biases(cls, config: Config) -> dict[str, Any]:
        bias = config.flag("attention_bias", False)
        return {"qkv_bias": bias, "output_bias": bias}

    def rotary_tables(self, position_ids: Tensor, dtype: str) -> tuple[Tensor, ...]:
        half = self.head_dim // 2
        return masks.rotary_tables(position_ids, half, dtype, longrope=self.longrope, layout="interleaved")

    def rotated(self, layer: Scope, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        dtype = q.dtype
        q, k = rotate(cast(q, "fp32"), cast(k, "fp32"), cos, sin, rotate_pairs)
        return cast(q, dtype), cast(k, dtype)

    def scaled_logits(self, logits: Tensor) -> Tensor:
        return mul(logits, 1.0)

    def block(self, layer: Scope, x: Tensor, mask_of: Masks, cos: Tensor, sin: Tensor) -> Tensor:
        """x + attention(norm(x)) + mlp(norm(x)): (batch, seq, hidden) → the same."""
        residual = x
        x = layer.norm("input_layernorm", x)
        attended, _ = self.attention(layer, x, mask_of, cos, sin)
        attended = layer.sublayer("attention", attended, residual)
        out = layer.sublayer("mlp", self.mlp(layer, x), residual)
        return add(add(residual, attended), out)  # what the norm gave lives until then, as transformers' variable does
