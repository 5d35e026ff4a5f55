"""GPT-BigCode (StarCoder, SantaCoder): GPT-2 with plain linear layers and one key and value head for all queries.

Source: transformers/models/gpt_bigcode/modeling_gpt_bigcode.py.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..tape.core import tape
from ..tape.shape import split, transpose, unsqueeze, view
from ..tape.tensor import Tensor
from . import masks
from .activations import ACTIVATIONS
from .base import Scope
from .config import Config
from .gpt2 import Gpt2
from .registered import architecture
from .traits import Traits


@architecture("gpt_bigcode")
@dataclass(frozen=True)
class GptBigCode(Gpt2):
    """Dims of a GPT-BigCode; `kv_heads` is 1, or that of the queries without `multi_query`."""

    activation: str = "gelu_pytorch_tanh"

    softmax_form: ClassVar[str] = "upcast"
    hands_positions: ClassVar[bool] = False
    traits: ClassVar[Traits] = replace(
        Gpt2.traits,
        conv1d=False,
        targets=replace(Gpt2.traits.targets, c3a=("mlp.c_proj",), s2ft=("attn.c_proj", "mlp.c_proj")),
        dropout_modules=("embedding_dropout", "residual_dropout"),
    )

    @classmethod
    def dims(cls, config: Config) -> dict[str, Any]:
        config.refuse(scale_attn_weights=True, add_cross_attention=False)
        dims = cls.widths(config)
        kv_heads = 1 if config.flag("multi_query", True) else dims["heads"]
        activation = config.one_of("activation_function", "gelu_pytorch_tanh", tuple(ACTIVATIONS))
        return {**dims, "kv_heads": kv_heads, "activation": activation}

    def _decoder(self, model: Scope, ids: Tensor, attention: Tensor) -> Tensor:
        tape().buffers.append(masks.model_buffer((self.max_positions,) * 2, "bool").spec)  # which nothing reads
        return super()._decoder(model, ids, attention)

    def heads_of(self, layer: Scope, x: Tensor) -> list[Tensor]:
        if self.kv_heads > 1:
            fused = layer.linear("attn.c_attn", x, 3 * self.hidden, bias=True)
            fused = transpose(view(fused, (*x.shape[:-1], self.heads, 3 * self.head_dim)), 1, 2)
            return split(fused, [self.head_dim] * 3, 3)
        fused = unsqueeze(layer.linear("attn.c_attn", x, self.hidden + 2 * self.head_dim, bias=True), 1)
        q, k, v = split(fused, [self.hidden, self.head_dim, self.head_dim], 3)
        return [transpose(view(q, (*x.shape[:-1], self.heads, self.head_dim)), 1, 2), k, v]
