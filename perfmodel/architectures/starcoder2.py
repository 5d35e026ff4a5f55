"""StarCoder2: grouped heads and rotary positions with LayerNorm, biases everywhere and an MLP without gate.

Source: transformers/models/starcoder2/modeling_starcoder2.py.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..tape.pointwise import add, dropout, gelu
from ..tape.tensor import Tensor
from .base import Scope
from .config import Config
from .llama import Llama
from .norms import layer_norm
from .registered import architecture
from .traits import Targets, Traits


@architecture("starcoder2")
@dataclass(frozen=True)
class Starcoder2(Llama):
    """Dims of a StarCoder2."""

    residual_dropout: float = 0.0
    embedding_dropout: float = 0.0

    traits: ClassVar[Traits] = replace(Llama.traits, norm=layer_norm, targets=Targets(), fused=("axolotl",))
    defaults: ClassVar[dict[str, int]] = {"num_key_value_heads": 2}

    @classmethod
    def check(cls, config: Config) -> None:
        config.one_of("hidden_act", "gelu_pytorch_tanh", ("gelu_pytorch_tanh",))

    @classmethod
    def widths(cls, config: Config) -> dict[str, Any]:
        dropouts = {key: config.fraction(key, 0.0) for key in ("residual_dropout", "embedding_dropout")}
        return {**super().widths(config), **dropouts, "tied": config.flag("tie_word_embeddings", True)}

    @classmethod
    def biases(cls, config: Config) -> dict[str, Any]:
        return dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias"), config.flag("use_bias", True))

    @classmethod
    def windows(cls, config: Config) -> dict[str, Any]:
        return {"window": cls.count(config, "sliding_window", 0) or None}

    def linear_names(self) -> list[str]:
        return [*super().linear_names()[:4], "mlp.c_fc", "mlp.c_proj"]

    def scaled_words(self, x: Tensor) -> Tensor:
        return dropout(x, self.embedding_dropout)

    def mlp(self, layer: Scope, x: Tensor) -> Tensor:
        x = layer.linear("mlp.c_fc", x, self.intermediate, bias=self.mlp_bias)
        return layer.linear("mlp.c_proj", gelu(x), self.hidden, bias=self.mlp_bias)

    def joined(self, residual: Tensor, x: Tensor) -> Tensor:
        return add(residual, dropout(x, self.residual_dropout))
