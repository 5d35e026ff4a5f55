"""Gemma 2: every other layer attends within a window, soft caps, four norms a block.

transformers has no fused attention with a soft cap, except flash-attn; `query_pre_attn_scalar` changes values only.
Source: transformers/models/gemma2/modeling_gemma2.py.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from .config import Config
from .gemma import Gemma
from .registered import architecture
from .traits import Traits
from .windows import alternating


@architecture("gemma2")
@dataclass(frozen=True)
class Gemma2(Gemma):
    """Dims of a Gemma 2."""

    traits: ClassVar[Traits] = replace(
        Gemma.traits,
        norms=(*Gemma.traits.norms, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        attention=("eager", "flash2"),
        fused=("liger", "axolotl"),
        cache="by layer",
    )
    around: ClassVar[tuple[str | None, ...]] = (
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
    )  # fmt: skip
    defaults: ClassVar[dict[str, int]] = {"num_key_value_heads": 4, "head_dim": 256}

    @classmethod
    def check(cls, config: Config) -> None:
        config.one_of("hidden_activation", "gelu_pytorch_tanh", ("gelu_pytorch_tanh",))
        config.divide(
            "hidden_size", "num_attention_heads", config.count("hidden_size"), config.count("num_attention_heads")
        )
        cls.check_causal(config)

    @classmethod
    def widths(cls, config: Config) -> dict[str, Any]:
        return {
            **super().widths(config),
            "attention_cap": config.number("attn_logit_softcapping", 50.0),
            "logit_cap": config.number("final_logit_softcapping", 30.0),
        }

    @classmethod
    def windows(cls, config: Config) -> dict[str, Any]:
        return alternating(config, 2, 4096)
