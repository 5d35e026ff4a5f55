"""Seed-OSS: Llama with biases on q, k and v, and dropout after attention and MLP.

Source: transformers/models/seed_oss/modeling_seed_oss.py.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..tape.pointwise import add, dropout
from ..tape.tensor import Tensor
from .config import Config
from .llama import Llama
from .registered import architecture
from .traits import Targets, Traits


@architecture("seed_oss")
@dataclass(frozen=True)
class SeedOss(Llama):
    """Dims of a Seed-OSS."""

    residual_dropout: float = 0.0

    traits: ClassVar[Traits] = replace(Llama.traits, targets=Targets(), fused=())
    defaults: ClassVar[dict[str, int]] = {"num_key_value_heads": 8, "head_dim": 128}

    @classmethod
    def widths(cls, config: Config) -> dict[str, Any]:
        dropouts = {key: config.fraction(key, 0.1) for key in ("attention_dropout", "residual_dropout")}
        return {**super().widths(config), **dropouts}

    @classmethod
    def biases(cls, config: Config) -> dict[str, Any]:
        return {
            "qkv_bias": config.flag("attention_bias", True),
            "output_bias": config.flag("attention_out_bias", False),
            "mlp_bias": config.flag("mlp_bias", False),
        }

    def joined(self, residual: Tensor, x: Tensor) -> Tensor:
        return add(residual, dropout(x, self.residual_dropout))
