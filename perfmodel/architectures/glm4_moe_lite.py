"""GLM 4.7 Flash: DeepSeek V3, whose config says of each block whether its MLP is a mixture.

Source: transformers/models/glm4_moe_lite/modeling_glm4_moe_lite.py.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from .config import Config
from .deepseek_v3 import DeepseekV3
from .registered import architecture
from .traits import Traits

DENSE, SPARSE = "dense", "sparse"  # of `mlp_layer_types`


@architecture("glm4_moe_lite")
@dataclass(frozen=True)
class Glm4MoeLite(DeepseekV3):
    """Dims of a GLM 4.7 Flash."""

    traits: ClassVar[Traits] = replace(DeepseekV3.traits, heads=())
    defaults: ClassVar[dict[str, int]] = {
        "num_key_value_heads": 20, "n_shared_experts": 1, "n_routed_experts": 64, "kv_lora_rank": 512,
        "q_lora_rank": 768, "qk_rope_head_dim": 64, "v_head_dim": 256, "qk_nope_head_dim": 192, "n_group": 1,
        "topk_group": 1, "num_experts_per_tok": 4, "moe_intermediate_size": 1536,
    }  # fmt: skip

    @classmethod
    def dense_blocks(cls, config: Config, layers: int) -> tuple[int, ...]:
        usual = [DENSE] + [SPARSE] * (layers - 1)
        return tuple(
            i for i, kind in enumerate(config.each_of("mlp_layer_types", usual, (DENSE, SPARSE))) if kind == DENSE
        )
