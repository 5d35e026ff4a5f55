"""Phi-1.5 and Phi-2: attention and MLP side by side behind one norm, partly rotary positions, biases everywhere.

Source: transformers/models/phi/modeling_phi.py. Norms of queries and keys, which no published Phi has, are refused.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..tape.pointwise import add, dropout
from ..tape.shape import reshape, transpose, view
from ..tape.tensor import Tensor
from .activations import ACTIVATIONS
from .attend import attend, extended
from .base import Architecture, Scope
from .config import Config
from .decoder import decoded, rotary_width, rotate_partly
from .heads import decoder_loss
from .llama import QV
from .norms import layer_norm
from .registered import architecture
from .traits import Targets, Traits


@architecture("phi")
@dataclass(frozen=True)
class Phi(Architecture):
    """Dims of a Phi, its dropout rates, and how many dims of a head have rotary positions."""

    rotary: int = 0
    activation: str = "gelu_new"
    embedding_dropout: float = 0.0
    residual_dropout: float = 0.0
    attention_dropout: float = 0.0

    layer_path: ClassVar[str] = "model.layers"
    traits: ClassVar[Traits] = Traits(
        head="causal",
        heads=("sequence", "token"),
        packs=True,
        norm=layer_norm,
        norms=("input_layernorm", "final_layernorm"),
        targets=Targets(
            lora=(*QV, "fc1", "fc2"), vera=QV, fourierft=(*QV, "fc1", "fc2"), beft=("v_proj",), ia3=(*QV, "fc2"),
            feedforward=("fc2",), s2ft=("dense", "fc2"),
        ),
        dropout_modules=("embedding_dropout", "residual_dropout"),
    )  # fmt: skip

    @classmethod
    def dims(cls, config: Config) -> dict[str, Any]:
        hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
        kv_heads = config.count("num_key_value_heads", default=heads)
        config.divide("num_attention_heads", "num_key_value_heads", heads, kv_heads)
        head_dim = config.divide("hidden_size", "num_attention_heads", hidden, heads)
        config.refuse(qk_layernorm=False, head_dim=head_dim)
        return {
            "layers": config.count("num_hidden_layers"),
            "hidden": hidden,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "intermediate": config.count("intermediate_size"),
            "vocab": config.count("vocab_size"),
            "max_positions": None,
            "tied": config.flag("tie_word_embeddings", False),
            "rotary": rotary_width(config, head_dim, "partial_rotary_factor", 0.5),
            "activation": config.one_of("hidden_act", "gelu_new", tuple(ACTIVATIONS)),
            "embedding_dropout": config.fraction("embd_pdrop", 0.0),
            "residual_dropout": config.fraction("resid_pdrop", 0.0),
            "attention_dropout": config.fraction("attention_dropout", 0.0),
        }

    def linear_names(self) -> list[str]:
        return [*(f"self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "dense")), "mlp.fc1", "mlp.fc2"]

    def forward(self, model: Scope, ids: Tensor, attention: Tensor, labels: Tensor) -> Tensor:
        model.begin("embeddings")
        words, norm = "model.embed_tokens", "model.final_layernorm"
        hidden = decoded(model, ids, attention, self.block, words, norm, width=self.rotary, p=self.embedding_dropout)
        return decoder_loss(model, hidden, ids, labels, words, bias=True)

    def block(self, layer: Scope, x: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        """One decoder layer: (batch, seq, hidden) → the same."""
        residual = x
        x = layer.norm("input_layernorm", x)
        attended, _ = self.attention(layer, x, mask, cos, sin)
        attended = layer.sublayer("attention", dropout(attended, self.residual_dropout), residual)
        grown = layer.sublayer("mlp", dropout(self.mlp(layer, x), self.residual_dropout), residual)
        return add(add(attended, grown), residual)

    def attention(self, layer: Scope, x: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor) -> Any:
        """Attention with rotary positions on a part of each head; also returns the weights, if any."""
        q, k, v = (
            transpose(view(y, (*y.shape[:-1], heads, self.head_dim)), 1, 2)
            for heads, y in (
                (n, layer.linear(f"self_attn.{name}", x, n * self.head_dim, bias=True))
                for name, n in (("q_proj", self.heads), ("k_proj", self.kv_heads), ("v_proj", self.kv_heads))
            )
        )
        q, k = rotate_partly(q, k, cos, sin)
        k, v = extended(layer, k, v)
        out, weights = attend(layer, q, k, v, mask, causal=True, form="upcast", p=self.attention_dropout)
        out = reshape(out, (*x.shape[:-1], self.hidden))
        return layer.linear("self_attn.dense", out, self.hidden, bias=True), weights

    def mlp(self, layer: Scope, x: Tensor) -> Tensor:
        """Two linear layers."""
        x = layer.linear("mlp.fc1", x, self.intermediate, bias=True)
        x = ACTIVATIONS[self.activation](x)
        return layer.linear("mlp.fc2", x, self.hidden, bias=True)
