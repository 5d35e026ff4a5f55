"""StableLM 2 (1.6B, 3B): Llama with LayerNorm, of whose heads a quarter of the dims turn.

Source: transformers/models/stablelm/modeling_stablelm.py.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..tape.pointwise import add
from ..tape.shape import unsqueeze
from ..tape.tensor import Tensor
from .base import Scope
from .config import Config
from .llama import QV, Llama, Masks
from .norms import layer_norm
from .registered import architecture
from .rotary import rotate_half, rotate_part
from .traits import Targets, Traits


@architecture("stablelm")
@dataclass(frozen=True)
class StableLm(Llama):
    """Dims of a StableLM."""

    traits: ClassVar[Traits] = replace(Llama.traits, norm=layer_norm, targets=Targets(lora=QV, fourierft=QV), fused=())
    defaults: ClassVar[dict[str, int]] = {"num_key_value_heads": 32}

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        config.refuse(qk_layernorm=False, use_parallel_residual=False, hidden_dropout=0.0)

    @classmethod
    def biases(cls, config: Config) -> dict[str, Any]:
        return {"qkv_bias": config.flag("use_qkv_bias", False)}

    @classmethod
    def positions(cls, config: Config) -> dict[str, Any]:
        return {**super().positions(config), "rotary": cls.partial(config, 0.25)}

    def rotated(self, layer: Scope, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rotate_part(q, k, unsqueeze(cos, 1), unsqueeze(sin, 1), rotate_half)

    def block(self, layer: Scope, x: Tensor, mask_of: Masks, cos: Tensor, sin: Tensor) -> Tensor:
        """One decoder layer that holds on to the outputs of norm and attention: (batch, seq, hidden) → the same."""
        residual = x
        x = layer.norm("input_layernorm", x)
        attended, _ = self.attention(layer, x, mask_of, cos, sin)
        attended = layer.sublayer("attention", attended, residual)
        residual = add(residual, attended)
        fed = self.mlp(layer, layer.norm("post_attention_layernorm", residual))
        return add(residual, layer.sublayer("mlp", fed, residual))
