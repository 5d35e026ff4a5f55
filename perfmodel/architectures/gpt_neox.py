"""GPT-NeoX (Pythia, GPT-NeoX-20B, Dolly): attention and MLP side by side, fused qkv, partly rotary positions.

Source: transformers/models/gpt_neox/modeling_gpt_neox.py.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..tape.pointwise import add, dropout
from ..tape.shape import reshape, split, transpose, view
from ..tape.tensor import Tensor
from .activations import ACTIVATIONS
from .attend import attend, extended
from .base import Architecture, Scope
from .config import Config
from .decoder import decoded, rotary_width, rotate_partly
from .heads import decoder_loss
from .norms import layer_norm
from .registered import architecture
from .traits import Targets, Traits

QKV = ("query_key_value",)


@architecture("gpt_neox")
@dataclass(frozen=True)
class GptNeox(Architecture):
    """Dims of a GPT-NeoX, its dropout rates, and how its blocks are wired.

    Attributes:
        rotary: dims of a head with rotary positions.
        parallel: whether attention and MLP read the same input, each behind its norm.
        attention_bias: whether the linear layers of attention have a bias.
    """

    rotary: int = 0
    parallel: bool = True
    attention_bias: bool = True
    activation: str = "gelu"
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0

    layer_path: ClassVar[str] = "gpt_neox.layers"
    traits: ClassVar[Traits] = Traits(
        head="causal",
        heads=("sequence", "token"),
        packs=True,
        token_head=("classifier", True),
        norm=layer_norm,
        norms=("input_layernorm", "post_attention_layernorm", "final_layer_norm"),
        targets=Targets(
            lora=QKV, adalora=QKV, fourierft=QKV, ia3=(*QKV, "dense_4h_to_h"), feedforward=("dense_4h_to_h",),
            s2ft=("attention.dense", "dense_4h_to_h"),
        ),
        dropout_modules=("hidden_dropout",),
    )  # fmt: skip

    @classmethod
    def dims(cls, config: Config) -> dict[str, Any]:
        hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
        head_dim = config.divide("hidden_size", "num_attention_heads", hidden, heads)
        return {
            "layers": config.count("num_hidden_layers"),
            "hidden": hidden,
            "heads": heads,
            "kv_heads": heads,
            "head_dim": head_dim,
            "intermediate": config.count("intermediate_size"),
            "vocab": config.count("vocab_size"),
            "max_positions": None,
            "tied": config.flag("tie_word_embeddings", False),
            "rotary": rotary_width(config, head_dim, "rotary_pct", 0.25),
            "parallel": config.flag("use_parallel_residual", True),
            "attention_bias": config.flag("attention_bias", True),
            "activation": config.one_of("hidden_act", "gelu", tuple(ACTIVATIONS)),
            "hidden_dropout": config.fraction("hidden_dropout", 0.0),
            "attention_dropout": config.fraction("attention_dropout", 0.0),
        }

    def linear_names(self) -> list[str]:
        return ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]

    def forward(self, model: Scope, ids: Tensor, attention: Tensor, labels: Tensor) -> Tensor:
        model.begin("embeddings")
        words, norm = "gpt_neox.embed_in", "gpt_neox.final_layer_norm"
        hidden = decoded(model, ids, attention, self.block, words, norm, width=self.rotary, p=self.hidden_dropout)
        return decoder_loss(model, hidden, ids, labels, words)

    def block(self, layer: Scope, x: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        """One decoder layer: (batch, seq, hidden) → the same."""
        attended, _ = self.attention(layer, layer.norm("input_layernorm", x), mask, cos, sin)
        attended = layer.sublayer("attention", dropout(attended, self.hidden_dropout), x)
        if not self.parallel:
            attended = add(attended, x)
        residual = x if self.parallel else attended
        grown = layer.sublayer("mlp", self.mlp(layer, layer.norm("post_attention_layernorm", residual)), residual)
        return add(add(grown, attended), x) if self.parallel else add(grown, attended)

    def mlp(self, layer: Scope, x: Tensor) -> Tensor:
        """Two linear layers; their input lives until they are done."""
        hidden = layer.linear("mlp.dense_h_to_4h", x, self.intermediate, bias=True)
        hidden = ACTIVATIONS[self.activation](hidden)
        hidden = layer.linear("mlp.dense_4h_to_h", hidden, self.hidden, bias=True)
        return dropout(hidden, self.hidden_dropout)

    def attention(self, layer: Scope, x: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor) -> Any:
        """Multi-head attention, q, k and v of each head next to one another; also returns the weights, if any."""
        fused = layer.linear("attention.query_key_value", x, 3 * self.hidden, bias=self.attention_bias)
        fused = transpose(view(fused, (*x.shape[:-1], self.heads, 3 * self.head_dim)), 1, 2)
        q, k, v = split(fused, [self.head_dim] * 3, -1)
        q, k = rotate_partly(q, k, cos, sin)
        k, v = extended(layer, k, v)
        out, weights = attend(layer, q, k, v, mask, causal=True, form="upcast", p=self.attention_dropout)
        out = reshape(out, (*x.shape[:-1], self.hidden))
        return layer.linear("attention.dense", out, self.hidden, bias=self.attention_bias), weights
