"""Phi-3, Phi-3.5 and Phi-4 (not the multimodal ones): Llama with q, k, v and gate, up as one linear layer each.

Source: transformers/models/phi3/modeling_phi3.py.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..tape.pointwise import add, dropout, mul
from ..tape.shape import narrow, split, transpose, unsqueeze, view
from ..tape.tensor import Tensor
from .base import Scope
from .config import Config
from .llama import Llama, rope_table
from .registered import architecture
from .rotary import rotate_half, rotate_part
from .traits import Targets, Traits


@architecture("phi3")
@dataclass(frozen=True)
class Phi3(Llama):
    """Dims of a Phi-3 or Phi-4."""

    residual_dropout: float = 0.0

    traits: ClassVar[Traits] = replace(Llama.traits, targets=Targets(), fused=(), dropout_modules=("residual_dropout",))

    @classmethod
    def widths(cls, config: Config) -> dict[str, Any]:
        return {**super().widths(config), "residual_dropout": config.fraction("resid_pdrop", 0.0)}

    @classmethod
    def biases(cls, config: Config) -> dict[str, Any]:
        return {}

    @classmethod
    def windows(cls, config: Config) -> dict[str, Any]:
        return {"window": cls.count(config, "sliding_window", 0) or None}

    @classmethod
    def positions(cls, config: Config) -> dict[str, Any]:
        longrope = rope_table(config)["rope_type"] in ("longrope", "su", "yarn")  # two old names
        return {"rotary": cls.partial(config, 1.0), "longrope": longrope}

    def linear_names(self) -> list[str]:
        return ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]

    def first_linear(self) -> str:
        return "self_attn.o_proj"

    def projected(self, layer: Scope, x: Tensor) -> list[Tensor]:
        heads = (self.heads, self.kv_heads, self.kv_heads)
        qkv = layer.linear("self_attn.qkv_proj", x, sum(heads) * self.head_dim)
        slices = [narrow(qkv, -1, n * self.head_dim) for n in heads]
        return [transpose(view(y, (*y.shape[:-1], n, self.head_dim)), 1, 2) for y, n in zip(slices, heads, strict=True)]

    def rotated(self, layer: Scope, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rotate_part(q, k, unsqueeze(cos, 1), unsqueeze(sin, 1), rotate_half)

    def mlp(self, layer: Scope, x: Tensor) -> Tensor:
        return gate_up_mlp(self, layer, x)

    def joined(self, residual: Tensor, x: Tensor) -> Tensor:
        return add(residual, dropout(x, self.residual_dropout))


def gate_up_mlp(model: Llama, layer: Scope, x: Tensor) -> Tensor:
    """A gated MLP (SwiGLU) whose gate and up projections are one linear layer."""
    up = layer.linear("mlp.gate_up_proj", x, 2 * model.intermediate)
    gate, up = split(up, (model.intermediate, model.intermediate), -1)
    up = mul(up, model.activation(gate))
    return layer.linear("mlp.down_proj", up, model.hidden)
