"""Gemma (the first, 2B and 7B; CodeGemma): Llama with GELU, an offset RMSNorm and a scaled embedding.

Source: transformers/models/gemma/modeling_gemma.py.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import UserError
from ..tape.core import tape
from ..tape.pointwise import cast, gelu, mul
from ..tape.tensor import Tensor
from . import masks
from .base import Scope
from .config import Config
from .llama import TARGETS, Llama
from .norms import offset_rms_norm
from .registered import architecture
from .traits import Traits


@architecture("gemma")
@dataclass(frozen=True)
class Gemma(Llama):
    """Dims of a Gemma."""

    traits: ClassVar[Traits] = Traits(
        head="causal",
        norm=offset_rms_norm,
        norms=Llama.traits.norms,
        targets=TARGETS,
        fused=("axolotl",),
        cut_loss=True,
        heads=("sequence", "token"),
        packs=True,
    )
    gate: ClassVar[str] = "geglu"
    defaults: ClassVar[dict[str, int]] = {"num_key_value_heads": 16, "head_dim": 256}

    @classmethod
    def check(cls, config: Config) -> None:
        config.one_of("hidden_act", "gelu_pytorch_tanh", ("gelu_pytorch_tanh", "gelu"))  # "gelu" is read as the former
        cls.check_causal(config)

    @classmethod
    def check_causal(cls, config: Config) -> None:
        """Raise `UserError` where every token attends to every other."""
        if config.values.get("use_bidirectional_attention"):
            raise UserError(f"{config.origin}: use_bidirectional_attention true is not supported")

    @classmethod
    def widths(cls, config: Config) -> dict[str, Any]:
        return {**super().widths(config), "tied": config.flag("tie_word_embeddings", True)}

    @classmethod
    def biases(cls, config: Config) -> dict[str, Any]:
        bias = config.flag("attention_bias", False)
        return {"qkv_bias": bias, "output_bias": bias}

    def embed(self, model: Scope, ids: Tensor) -> Tensor:
        def scaled(x: Tensor) -> Tensor:
            scale = masks.model_buffer((), tape().buffer_dtype or model.dtype)
            tape().buffers.append(scale.spec)
            return mul(x, cast(scale, model.dtype))

        return model.embedding("model.embed_tokens", self.vocab, self.hidden, ids, scaled)

    def activation(self, x: Tensor) -> Tensor:
        return gelu(x)  # its tanh form, one op of PyTorch as well
