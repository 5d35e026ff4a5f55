"""GPT-2: learned positions, pre-LayerNorm, fused qkv as Conv1D, GELU written out in tanh form (Cerebras-GPT: one op).

Source: transformers/models/gpt2/modeling_gpt2.py, pytorch_utils.py (`Conv1D`).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..tape.pointwise import add, dropout
from ..tape.shape import reshape, split, transpose, view
from ..tape.tensor import Tensor
from . import masks
from .activations import ACTIVATIONS
from .attend import attend, extended
from .base import Architecture, Scope
from .config import Config
from .heads import decoder_loss
from .norms import layer_norm
from .registered import architecture
from .traits import Targets, Traits


@architecture("gpt2")
@dataclass(frozen=True)
class Gpt2(Architecture):
    """Dims of a GPT-2 and its three dropout rates."""

    embedding_dropout: float = 0.1
    attention_dropout: float = 0.1
    residual_dropout: float = 0.1
    activation: str = "gelu_new"

    softmax_form: ClassVar[str] = "value"  # of eager attention (`eager_attention`)
    hands_positions: ClassVar[bool] = True  # whether blocks hand them to the attention's implementation
    layer_path: ClassVar[str] = "transformer.h"
    traits: ClassVar[Traits] = Traits(
        head="causal",
        heads=("sequence", "token"),
        token_head=("classifier", False),
        norm=layer_norm,
        norms=("ln_1", "ln_2", "ln_f"),
        targets=Targets(
            lora=("c_attn",), adalora=("c_attn",), fourierft=("mlp.c_proj",), ia3=("c_attn", "mlp.c_proj"),
            feedforward=("mlp.c_proj",),
        ),
        conv1d=True,
        dropout_modules=("embedding_dropout", "attention_dropout", "residual_dropout"),
    )  # fmt: skip

    @classmethod
    def dims(cls, config: Config) -> dict[str, Any]:
        config.refuse(
            scale_attn_by_inverse_layer_idx=False, reorder_and_upcast_attn=False, add_cross_attention=False,
            scale_attn_weights=True,
        )  # fmt: skip
        activation = config.one_of("activation_function", "gelu_new", ("gelu_new", "gelu"))
        return {**cls.widths(config), "activation": activation}

    @classmethod
    def widths(cls, config: Config) -> dict[str, Any]:
        """Numbers of layers and heads, widths, dropout."""
        hidden, heads = config.count("n_embd", "hidden_size"), config.count("n_head", "num_attention_heads")
        return {
            "layers": config.count("n_layer", "num_hidden_layers"),
            "hidden": hidden,
            "heads": heads,
            "kv_heads": heads,
            "head_dim": config.divide("n_embd", "n_head", hidden, heads),
            "intermediate": config.count("n_inner", default=4 * hidden),
            "vocab": config.count("vocab_size"),
            "max_positions": config.count("n_positions", "max_position_embeddings"),
            "tied": config.flag("tie_word_embeddings", True),
            "embedding_dropout": config.fraction("embd_pdrop", 0.1),
            "attention_dropout": config.fraction("attn_pdrop", 0.1),
            "residual_dropout": config.fraction("resid_pdrop", 0.1),
        }

    def linear_names(self) -> list[str]:
        return ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]

    def forward(self, model: Scope, ids: Tensor, attention: Tensor, labels: Tensor) -> Tensor:
        model.begin("embeddings")
        hidden = self._decoder(model, ids, attention)
        return decoder_loss(model, hidden, ids, labels, "transformer.wte")

    def _decoder(self, model: Scope, ids: Tensor, attention: Tensor) -> Tensor:
        setup = model.build.setup
        masks.check_positions(model, attention.shape[1])
        assert self.max_positions is not None
        embedded = model.build.method.embedded(model, model.embedding("transformer.wte", self.vocab, self.hidden, ids))
        seq = embedded.shape[1]
        position_ids = masks.positions(seq)
        model.build.positions = position_ids if self.hands_positions else None
        located = model.embedding("transformer.wpe", self.max_positions, self.hidden, position_ids)
        mask = masks.causal_mask(attention, seq, setup.attention, embedded.dtype, None, padded=setup.explicit_mask)
        hidden = model.layers(self.block, dropout(add(embedded, located), self.embedding_dropout), mask)
        model.begin("head")
        return model.norm("transformer.ln_f", hidden)

    def block(self, layer: Scope, x: Tensor, mask: Tensor | None) -> Tensor:
        """One decoder layer: (batch, seq, hidden) → the same."""
        residual = x
        x = layer.norm("ln_1", x)
        attended, _ = self.attention(layer, x, mask)
        attended = layer.sublayer("attention", attended, residual)
        x = add(attended, residual)
        residual = x
        x = layer.norm("ln_2", x)
        x = layer.sublayer("mlp", self.mlp(layer, x), residual)
        return add(residual, x)

    def attention(self, layer: Scope, x: Tensor, mask: Tensor | None) -> Any:
        """Multi-head attention from one fused projection; also returns the weights, if any."""
        q, k, v = self.heads_of(layer, x)
        k, v = extended(layer, k, v)
        form, p = self.softmax_form, self.attention_dropout
        out, weights = attend(layer, q, k, v, mask, causal=True, form=form, p=p)
        out = reshape(out, (*x.shape[:-1], self.hidden))
        out = layer.linear("attn.c_proj", out, self.hidden, bias=True)
        return dropout(out, self.residual_dropout), weights

    def heads_of(self, layer: Scope, x: Tensor) -> list[Tensor]:
        """q, k and v, (batch, heads, seq, head_dim)."""
        fused = layer.linear("attn.c_attn", x, 3 * self.hidden, bias=True)
        return [
            transpose(view(y, (*x.shape[:-1], self.heads, self.head_dim)), 1, 2)
            for y in split(fused, [self.hidden] * 3, 2)
        ]

    def activated(self, x: Tensor) -> Tensor:
        """What is between the linear layers of the MLP."""
        return ACTIVATIONS[self.activation](x)

    def mlp(self, layer: Scope, x: Tensor) -> Tensor:
        """Two linear layers with GELU between."""
        x = layer.linear("mlp.c_fc", x, self.intermediate, bias=True)
        x = self.activated(x)
        x = layer.linear("mlp.c_proj", x, self.hidden, bias=True)
        return dropout(x, self.residual_dropout)
