"""DeepSeek V2, V2.5 and V2 Lite: latent attention whose positions turn complex numbers; a router with softmax.

Source: transformers/models/deepseek_v2/modeling_deepseek_v2.py.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..tape.core import tape
from ..tape.gather import fill_where, largest_last, top_values
from ..tape.nn import softmax
from ..tape.pointwise import cast, mul
from ..tape.shape import unsqueeze
from ..tape.spectrum import turn_pairs
from ..tape.tensor import Tensor
from . import masks
from .base import Scope
from .config import Config
from .latent import Latent
from .registered import architecture
from .traits import Traits

GROUPED = "group_limited_greedy"


@architecture("deepseek_v2")
@dataclass(frozen=True)
class DeepseekV2(Latent):
    """Dims of a DeepSeek V2.

    Attributes:
        by_groups: whether groups of experts are chosen before experts.
    """

    by_groups: bool = False

    traits: ClassVar[Traits] = replace(Latent.traits, heads=("sequence",))
    counted: ClassVar[tuple[str, ...]] = ("num_experts", "n_routed_experts")
    defaults: ClassVar[dict[str, int]] = {
        "n_shared_experts": 2, "n_routed_experts": 64, "kv_lora_rank": 512, "q_lora_rank": 1536,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "moe_intermediate_size": 1407,
    }  # fmt: skip

    @classmethod
    def widths(cls, config: Config) -> dict[str, Any]:
        found = super().widths(config)
        config.divide("hidden_size", "num_attention_heads", found["hidden"], found["heads"])  # checked by transformers
        by_groups = config.one_of("topk_method", "greedy", ("greedy", GROUPED)) == GROUPED
        return {**found, **(cls.grouped(config, found["experts"], 1) if by_groups else {}), "by_groups": by_groups}

    @classmethod
    def biases(cls, config: Config) -> dict[str, Any]:
        return {**super().biases(config), "mlp_bias": config.flag("mlp_bias", False)}

    def rotary_tables(self, position_ids: Tensor, dtype: str) -> tuple[Tensor, ...]:
        assert self.rotary is not None
        return masks.rotary_tables(position_ids, self.rotary // 2, dtype, longrope=self.longrope, layout="complex")

    def rotated(self, layer: Scope, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """`apply_rotary_emb`, in fp32; the table of complex numbers comes in the place of both."""
        wide, turns = (cast(q, "fp32"), cast(k, "fp32")), unsqueeze(cos, 1)
        turned_q, turned_k = (turn_pairs(x, turns) for x in wide)
        return cast(turned_q, q.dtype), cast(turned_k, k.dtype)

    def route(self, layer: Scope, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = softmax(self.logits(layer, x), "fp32")
        if self.by_groups:
            with tape().no_grad():
                outside = self.outside(largest_last(self.by_group(scores), keep=False))
            scores = fill_where(scores, outside)
        weights, chosen = top_values(scores, self.top_k)
        return mul(weights, 1.0), chosen
