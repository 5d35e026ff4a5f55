"""Qwen 3 MoE: Qwen 3 whose MLPs, all but some, are mixtures of experts.

Source: transformers/models/qwen3_moe/modeling_qwen3_moe.py.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..errors import UserError
from ..tape.pointwise import cast
from ..tape.tensor import Tensor
from .config import Config
from .moe import STACKED, Mixture
from .qwen3 import Qwen3
from .registered import architecture
from .traits import Targets, Traits


@architecture("qwen3_moe")
@dataclass(frozen=True)
class Qwen3Moe(Mixture, Qwen3):
    """Dims of a Qwen 3 MoE.

    Attributes:
        dense: the blocks whose MLP is no mixture.
        normalised: whether the weights of a token's experts add up to 1.
    """

    dense: tuple[int, ...] = ()
    normalised: bool = False

    traits: ClassVar[Traits] = replace(Qwen3.traits, targets=Targets(), fused=("axolotl",), stacked=STACKED)
    defaults: ClassVar[dict[str, int]] = {
        "num_key_value_heads": 4, "sliding_window": 4096, "num_local_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    }  # fmt: skip

    @classmethod
    def widths(cls, config: Config) -> dict[str, Any]:
        found, every = super().widths(config), config.count("decoder_sparse_step", default=1)
        only = config.values.get("mlp_only_layers") or []
        if not isinstance(only, list) or not all(type(layer) is int for layer in only):
            raise UserError(f"{config.origin}: mlp_only_layers must list numbers of blocks, got {only!r}")
        return {
            **found,
            "expert_width": cls.count(config, "moe_intermediate_size", 0),
            "dense": tuple(i for i in range(found["layers"]) if i in only or (i + 1) % every),
            "normalised": config.flag("norm_topk_prob", False),
        }

    @classmethod
    def windows(cls, config: Config) -> dict[str, Any]:
        sliding = config.flag("use_sliding_window", False)
        return {"window": cls.count(config, "sliding_window", 0) or None} if sliding else {}

    def is_mixture(self, layer: int) -> bool:
        return layer not in self.dense

    def scaled(self, top: Tensor, dtype: str) -> Tensor:
        return cast(super().scaled(top, dtype) if self.normalised else top, dtype)
