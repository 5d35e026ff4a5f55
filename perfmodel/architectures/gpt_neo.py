"""GPT-Neo: GPT-2 with separate q, k, v, attention in fp32 under a stored mask, local windows in every other block.

A local window changes the mask's values and no op, so all blocks cost the same. transformers has no fused attention
for it, except flash-attn, which is refused here.
Source: transformers/models/gpt_neo/modeling_gpt_neo.py.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..tape.core import tape
from ..tape.linalg import matmul
from ..tape.nn import softmax
from ..tape.pointwise import add, cast, dropout, gelu_tanh, masked
from ..tape.shape import contiguous, transpose, view
from ..tape.tensor import Tensor
from ..tape.transfers import scalar
from . import masks
from .attend import extended
from .base import Architecture, Scope
from .config import Config
from .heads import decoder_loss
from .norms import layer_norm
from .registered import architecture
from .traits import Targets, Traits

QV = ("q_proj", "v_proj")


@architecture("gpt_neo")
@dataclass(frozen=True)
class GptNeo(Architecture):
    """Dims of a GPT-Neo and its dropout rates."""

    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0

    layer_path: ClassVar[str] = "transformer.h"
    traits: ClassVar[Traits] = Traits(
        head="causal",
        heads=("sequence", "token"),
        token_head=("classifier", False),
        norm=layer_norm,
        norms=("ln_1", "ln_2", "ln_f"),
        targets=Targets(
            lora=QV, adalora=QV, fourierft=QV, beft=("v_proj",), ia3=(*QV, "c_proj"), feedforward=("c_proj",),
            s2ft=("out_proj", "mlp.c_proj"),
        ),
        attention=("eager",),
        reentrant=(),
        dropout_modules=("embedding_dropout", "attention_dropout", "residual_dropout"),
    )  # fmt: skip

    @classmethod
    def dims(cls, config: Config) -> dict[str, Any]:
        hidden, heads = config.count("hidden_size"), config.count("num_heads", "num_attention_heads")
        config.one_of("activation_function", "gelu_new", ("gelu_new",))
        return {
            "layers": config.count("num_layers", "num_hidden_layers"),
            "hidden": hidden,
            "heads": heads,
            "kv_heads": heads,
            "head_dim": config.divide("hidden_size", "num_heads", hidden, heads),
            "intermediate": config.count("intermediate_size", default=4 * hidden),
            "vocab": config.count("vocab_size"),
            "max_positions": config.count("max_position_embeddings"),
            "tied": config.flag("tie_word_embeddings", True),
            "embedding_dropout": config.fraction("embed_dropout", 0.0),
            "attention_dropout": config.fraction("attention_dropout", 0.0),
            "residual_dropout": config.fraction("resid_dropout", 0.0),
        }

    def linear_names(self) -> list[str]:
        attention = [f"attn.attention.{n}" for n in ("k_proj", "v_proj", "q_proj", "out_proj")]
        return [*attention, "mlp.c_fc", "mlp.c_proj"]

    def forward(self, model: Scope, ids: Tensor, attention: Tensor, labels: Tensor) -> Tensor:
        model.begin("embeddings")
        hidden = self._decoder(model, ids, attention)
        return decoder_loss(model, hidden, ids, labels, "transformer.wte")

    def _decoder(self, model: Scope, ids: Tensor, attention: Tensor) -> Tensor:
        setup = model.build.setup
        masks.check_positions(model, attention.shape[1])
        assert self.max_positions is not None
        of_block = masks.model_buffer((1, 1, self.max_positions, self.max_positions), "bool")
        tape().buffers += [of_block.spec] * self.layers
        embedded = model.build.method.embedded(model, model.embedding("transformer.wte", self.vocab, self.hidden, ids))
        seq = embedded.shape[1]
        position_ids = masks.positions(seq)
        mask = masks.causal_mask(attention, seq, "eager", embedded.dtype, None, padded=setup.explicit_mask)
        located = model.embedding("transformer.wpe", self.max_positions, self.hidden, position_ids)
        allowed = masks.model_buffer((1, 1, seq, attention.shape[1]), "bool")
        hidden = model.layers(
            self.block, dropout(add(embedded, located), self.embedding_dropout), mask, allowed
        )  # fmt: skip
        model.begin("head")
        return model.norm("transformer.ln_f", hidden)

    def block(self, layer: Scope, x: Tensor, mask: Tensor, allowed: Tensor) -> Tensor:
        """One decoder layer: (batch, seq, hidden) → the same."""
        residual = x
        x = layer.norm("ln_1", x)
        attended, _ = self.attention(layer, x, mask, allowed)
        attended = layer.sublayer("attention", attended, residual)
        x = add(attended, residual)
        residual = x
        x = layer.norm("ln_2", x)
        x = layer.sublayer("mlp", self.mlp(layer, x), residual)
        return add(residual, x)

    def attention(self, layer: Scope, x: Tensor, mask: Tensor, allowed: Tensor) -> Any:
        """Multi-head attention with fp32 scores; also returns the weights."""
        q, k, v = (layer.linear(f"attn.attention.{n}_proj", x, self.hidden) for n in ("q", "k", "v"))
        q, k, v = self._split(q), self._split(k), self._split(v)
        k, v = extended(layer, k, v)
        with tape().belonging_to("attention"):
            out, weights = self._attend(q, k, v, mask, allowed)
        out = contiguous(transpose(out, 1, 2))
        out = view(out, (*x.shape[:-1], self.hidden))
        out = layer.linear("attn.attention.out_proj", out, self.hidden, bias=True)
        return dropout(out, self.residual_dropout), weights

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
        q, k = cast(q, "fp32"), cast(k, "fp32")
        weights = matmul(q, transpose(k, 2, 3))
        mask_value = scalar(weights.dtype)
        weights = masked(allowed, weights, mask_value)
        weights = add(weights, mask)
        weights = softmax(weights)
        weights = cast(weights, v.dtype)
        weights = dropout(weights, self.attention_dropout)
        return matmul(weights, v), weights

    def _split(self, y: Tensor) -> Tensor:
        return transpose(view(y, (*y.shape[:-1], self.heads, self.head_dim)), 1, 2)

    def mlp(self, layer: Scope, x: Tensor) -> Tensor:
        """Two linear layers with GELU between."""
        x = layer.linear("mlp.c_fc", x, self.intermediate, bias=True)
        x = gelu_tanh(x)
        x = layer.linear("mlp.c_proj", x, self.hidden, bias=True)
        return dropout(x, self.residual_dropout)
