"""DeepSeek V3 and R1, Moonlight: latent attention; a router with scores of their own and a bias that balances loads.

The bias is a buffer, which no gradient changes. Of the config, `topk_method`, `scoring_func` and `moe_layer_freq`
decide nothing in transformers' own code.
Source: transformers/models/deepseek_v3/modeling_deepseek_v3.py.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..tape.core import tape
from ..tape.elementary import sum_dim
from ..tape.gather import fill_where, top_values
from ..tape.inplace import divide_in_place
from ..tape.pointwise import add, mul, sigmoid
from ..tape.scores import gather_last
from ..tape.tensor import Tensor
from . import masks
from .base import Scope
from .config import Config
from .latent import Latent
from .registered import architecture
from .rotary import rotate, rotate_half, rotate_interleaved

BEST = 2  # experts by whose scores a group is chosen


@architecture("deepseek_v3")
@dataclass(frozen=True)
class DeepseekV3(Latent):
    """Dims of a DeepSeek V3.

    Attributes:
        interleaved: whether neighbouring dims turn together.
    """

    interleaved: bool = True

    counted: ClassVar[tuple[str, ...]] = ("num_local_experts", "n_routed_experts")
    defaults: ClassVar[dict[str, int]] = {
        "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256, "kv_lora_rank": 512,
        "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "n_group": 8,
        "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "moe_intermediate_size": 2048,
    }  # fmt: skip

    @classmethod
    def widths(cls, config: Config) -> dict[str, Any]:
        found = super().widths(config)
        return {
            **found,
            **cls.grouped(config, found["experts"], BEST),
            "normalised": config.flag("norm_topk_prob", True),
            "interleaved": config.flag("rope_interleave", True),
        }

    def rotated(self, layer: Scope, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rotate_interleaved(q, k, cos, sin) if self.interleaved else rotate(q, k, cos, sin, rotate_half)

    def route(self, layer: Scope, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = sigmoid(self.logits(layer, x))
        with tape().no_grad():  # which experts are chosen has none
            biased = add(scores, masks.model_buffer((self.experts,), "fp32"))
            best, _ = top_values(self.by_group(biased), BEST)
            biased = fill_where(biased, self.outside(sum_dim(best, -1)))
            _, chosen = top_values(biased, self.top_k)
        weights = gather_last(scores, chosen)
        if self.normalised:
            weights = divide_in_place(weights, add(sum_dim(weights, -1, keep=True), 1e-20))
        return mul(weights, 1.0), chosen
