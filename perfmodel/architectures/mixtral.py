"""Mixtral: Mistral whose MLPs are mixtures of experts.

Source: transformers/models/mixtral/modeling_mixtral.py.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from .config import Config
from .mistral import Mistral
from .moe import Mixture
from .registered import architecture
from .traits import Traits


@architecture("mixtral")
@dataclass(frozen=True)
class Mixtral(Mixture, Mistral):
    """Dims of a Mixtral."""

    traits: ClassVar[Traits] = replace(
        Mistral.traits,
        targets=replace(Mistral.traits.targets, ia3=("k_proj", "v_proj"), feedforward=()),  # its w2 names nothing
        fused=("axolotl",),
        stacked=(("gate", "gate.weight"), ("w1", "gate_up_proj"), ("w3", "gate_up_proj"), ("w2", "down_proj")),
    )
    defaults: ClassVar[dict[str, int]] = {
        "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    }  # fmt: skip

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        config.refuse(router_jitter_noise=0.0)
