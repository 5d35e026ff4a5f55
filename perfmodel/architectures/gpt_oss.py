"""gpt-oss: mixtures of experts with biases and interleaved gates; attention with sinks, in a window every other layer.

Checkpoints hold the experts in MXFP4; what is trained is dequantised (`Mxfp4Config(dequantize=True)`), as all is here.
Source: transformers/models/gpt_oss/modeling_gpt_oss.py.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..tape.attention import sink_attention
from ..tape.core import tape
from ..tape.gather import clamp, rows_of, top_values
from ..tape.grouped import grouped_mm
from ..tape.inplace import add_in_place
from ..tape.linalg import linear, matmul
from ..tape.nn import softmax
from ..tape.pointwise import add, mul, sigmoid
from ..tape.shape import every_other, reshape, split, unsqueeze
from ..tape.split import select
from ..tape.tensor import Tensor
from . import masks
from .attend import extended
from .base import Scope
from .config import Config
from .llama import FULL, SLIDING, Llama, Masks
from .masks import read_scalar
from .moe import Mixture
from .norms import wide_rms_norm
from .registered import architecture
from .rotary import turned
from .traits import Traits


@architecture("gpt_oss")
@dataclass(frozen=True)
class GptOss(Mixture):
    """Dims of a gpt-oss."""

    traits: ClassVar[Traits] = Traits(
        head="causal", norm=wide_rms_norm, norms=Llama.traits.norms, attention=("eager",), cut_loss=True
    )
    defaults: ClassVar[dict[str, int]] = {
        "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128, "num_local_experts": 128,
        "num_experts_per_tok": 4,
    }  # fmt: skip
    router: ClassVar[str] = "mlp.router"
    masked: ClassVar[int] = 0

    def rotary_tables(self, position_ids: Tensor, dtype: str) -> tuple[Tensor, ...]:
        return masks.rotary_tables(position_ids, self.head_dim // 2, dtype, layout="once")

    @classmethod
    def biases(cls, config: Config) -> dict[str, Any]:
        bias = config.flag("attention_bias", True)
        return {"qkv_bias": bias, "output_bias": bias}

    @classmethod
    def windows(cls, config: Config) -> dict[str, Any]:
        alternating = [FULL if i % 2 else SLIDING for i in range(config.count("num_hidden_layers"))]
        return {
            "window": cls.count(config, "sliding_window", 128),
            "layer_types": config.each_of("layer_types", alternating, (FULL, SLIDING)),
        }

    def attention(self, layer: Scope, x: Tensor, mask_of: Masks, cos: Tensor, sin: Tensor) -> Any:
        q, k, v = self.projected(layer, x)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        k, v = extended(layer, k, v)
        sinks = layer.parameter("self_attn.sinks", (self.heads,), "weight")
        with tape().belonging_to("attention"):
            out, weights = sink_attention(q, k, v, mask_of[self.reach(layer.index)], sinks, p=self.attention_dropout)
        out = reshape(out, (*x.shape[:-1], self.heads * self.head_dim))
        return layer.linear("self_attn.o_proj", out, self.hidden, bias=self.output_bias), weights

    def route(self, layer: Scope, x: Tensor) -> tuple[Tensor, Tensor]:
        tape().part.host.modules += 1
        weight = layer.stacked(f"{self.router}.weight", (self.experts, self.hidden))
        logits = linear(x, weight, layer.parameter(f"{self.router}.bias", (self.experts,), "bias"))
        top, chosen = top_values(logits, self.top_k)
        return softmax(top, top.dtype), chosen

    def expert_linear(
        self, layer: Scope, name: str, x: Tensor, n_out: int, chosen: Tensor, ends: Tensor, biases: list[Tensor]
    ) -> Tensor:
        weight = layer.stacked(f"mlp.experts.{name}", (self.experts, x.shape[1], n_out), flipped=True)
        biases[:] = [rows_of(layer.parameter(f"mlp.experts.{name}_bias", (self.experts, n_out), "bias"), chosen)]
        return add_in_place(grouped_mm(x, weight, ends, self.routing(layer)), *biases)

    def expert_product(
        self, layer: Scope, name: str, x: Tensor, n_out: int, number: Tensor, stacks: dict[str, Tensor]
    ) -> Tensor:
        bias = f"{name}_bias"
        if name not in stacks:
            shape = (self.experts, x.shape[1], n_out)
            stacks[name] = layer.stacked(f"mlp.experts.{name}", shape, flipped=True)
            stacks[bias] = layer.parameter(f"mlp.experts.{bias}", (self.experts, n_out), "bias")
        read_scalar(number)
        out = matmul(x, select(stacks[name], 0))
        read_scalar(number)
        return add(out, select(stacks[bias], 0))

    def gated(self, x: Tensor) -> Tensor:
        gate, up = every_other(x), every_other(x)
        gate = clamp(gate, high=True)
        up = clamp(up, low=True, high=True)
        glu = mul(gate, sigmoid(mul(gate, 1.702)))
        return mul(add(up, 1.0), glu)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding whose tables have half the width of a head."""
    cos, sin = unsqueeze(cos, 1), unsqueeze(sin, 1)
    first, second = split(x, (x.shape[-1] // 2,) * 2, -1)
    return turned(first, second, cos, sin)
