"""Gemma 2: every other layer attends within a window, soft caps, four norms a block, a scaled embedding.

transformers has no fused attention with a soft cap, except flash-attn; `query_pre_attn_scalar` changes values only.
Source: transformers/models/gemma2/modeling_gemma2.py.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import UserError
from ..tape.pointwise import add, gelu, mul
from ..tape.tensor import Tensor
from . import masks
from .base import Scope, architecture
from .config import Config
from .llama import FULL, SLIDING, TARGETS, Llama, Masks
from .norms import offset_rms_norm
from .traits import Traits


@architecture("gemma2")
@dataclass(frozen=True)
class Gemma2(Llama):
    """Dims of a Gemma 2."""

    traits: ClassVar[Traits] = Traits(
        head="causal",
        norm=offset_rms_norm,
        norms=(*Llama.traits.norms, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        targets=TARGETS,
        attention=("eager", "flash2"),
        cache="by layer",
    )
    defaults: ClassVar[dict[str, int]] = {"num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096}

    @classmethod
    def check(cls, config: Config) -> None:
        config.one_of("hidden_activation", "gelu_pytorch_tanh", ("gelu_pytorch_tanh",))
        config.divide(
            "hidden_size", "num_attention_heads", config.count("hidden_size"), config.count("num_attention_heads")
        )
        if config.values.get("use_bidirectional_attention"):
            raise UserError(f"{config.origin}: use_bidirectional_attention true is not supported")

    @classmethod
    def widths(cls, config: Config) -> dict[str, Any]:
        return {
            **super().widths(config),
            "tied": config.flag("tie_word_embeddings", True),
            "attention_cap": config.number("attn_logit_softcapping", 50.0),
            "logit_cap": config.number("final_logit_softcapping", 30.0),
        }

    @classmethod
    def biases(cls, config: Config) -> dict[str, Any]:
        bias = config.flag("attention_bias", False)
        return {"qkv_bias": bias, "output_bias": bias}

    @classmethod
    def windows(cls, config: Config) -> dict[str, Any]:
        alternating = [FULL if i % 2 else SLIDING for i in range(config.count("num_hidden_layers"))]
        return {
            "window": cls.count(config, "sliding_window", 4096),
            "layer_types": config.each_of("layer_types", alternating, (FULL, SLIDING)),
        }

    def embed(self, model: Scope, ids: Tensor) -> Tensor:
        return mul(super().embed(model, ids), masks.model_buffer((), model.dtype))

    def activation(self, x: Tensor) -> Tensor:
        return gelu(x)  # its tanh form, one op of PyTorch as well

    def block(self, layer: Scope, x: Tensor, mask_of: Masks, cos: Tensor, sin: Tensor) -> Tensor:
        """One decoder layer, with a norm before and after attention and MLP: (batch, seq, hidden) → the same."""
        residual = x
        x = layer.norm("input_layernorm", x)
        x, _ = self.attention(layer, x, mask_of, cos, sin)
        x = layer.norm("post_attention_layernorm", layer.sublayer("attention", x, residual))
        x = add(residual, x)
        residual = x
        x = self.mlp(layer, layer.norm("pre_feedforward_layernorm", x))
        x = layer.norm("post_feedforward_layernorm", layer.sublayer("mlp", x, residual))
        return add(residual, x)
