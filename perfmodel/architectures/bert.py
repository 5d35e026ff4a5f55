"""BERT as a masked language model: post-LayerNorm encoder, token types, transform head with a tied decoder.

Source: transformers/models/bert/modeling_bert.py (`BertForMaskedLM`).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..program.dims import product
from ..tape.core import emit
from ..tape.linalg import linear
from ..tape.nn import cross_entropy
from ..tape.pointwise import add, dropout, gelu
from ..tape.shape import expand, reshape, transpose, view
from ..tape.tensor import Tensor
from . import masks
from .attend import attend
from .base import Architecture, Linear, Scope, architecture
from .config import Config
from .norms import layer_norm
from .traits import Targets, Traits


@architecture("bert")
@dataclass(frozen=True)
class Bert(Architecture):
    """Dims of a BERT and its dropout rates."""

    token_types: int = 2
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1

    layer_path: ClassVar[str] = "bert.encoder.layer"
    traits: ClassVar[Traits] = Traits(
        head="masked",
        norm=layer_norm,
        norms=("LayerNorm",),
        targets=Targets(
            lora=("query", "value"), adalora=("query", "value"), fourierft=("query", "value"), beft=("value",),
            ia3=("key", "value", "output.dense"), feedforward=("output.dense",), s2ft=("output.dense",),
        ),
    )  # fmt: skip

    @classmethod
    def dims(cls, config: Config) -> dict[str, Any]:
        hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
        config.one_of("hidden_act", "gelu", ("gelu",))
        config.one_of("position_embedding_type", "absolute", ("absolute",))
        config.refuse(is_decoder=False, add_cross_attention=False, chunk_size_feed_forward=0)
        return {
            "layers": config.count("num_hidden_layers"),
            "hidden": hidden,
            "heads": heads,
            "kv_heads": heads,
            "head_dim": config.divide("hidden_size", "num_attention_heads", hidden, heads),
            "intermediate": config.count("intermediate_size"),
            "vocab": config.count("vocab_size"),
            "max_positions": config.count("max_position_embeddings"),
            "tied": config.flag("tie_word_embeddings", True),
            "token_types": config.count("type_vocab_size", default=2),
            "hidden_dropout": config.fraction("hidden_dropout_prob", 0.1),
            "attention_dropout": config.fraction("attention_probs_dropout_prob", 0.1),
        }

    def linear_names(self) -> list[str]:
        attention = [f"attention.self.{n}" for n in ("query", "key", "value")] + ["attention.output.dense"]
        return [*attention, "intermediate.dense", "output.dense"]

    def forward(self, model: Scope, ids: Tensor, attention: Tensor, labels: Tensor) -> Tensor:
        hidden = self._encoder(model, ids, attention)
        logits = self._predictions(model, hidden)
        return cross_entropy(
            view(logits, (product(logits.shape[:-1]), self.vocab)), view(labels, (product(labels.shape),))
        )

    def _predictions(self, model: Scope, hidden: Tensor) -> Tensor:
        hidden = self._transform(model, hidden)
        bias = model.parameter("cls.predictions.bias", (self.vocab,), "bias")
        if self.tied:
            return linear(hidden, model.parameter("bert.embeddings.word_embeddings.weight", (), "embedding"), bias)
        # untied, the decoder brings its own bias, and `bias` stays unused
        return Linear(model, "cls.predictions.decoder", self.hidden, self.vocab, True)(hidden)

    def _transform(self, model: Scope, hidden: Tensor) -> Tensor:
        hidden = model.linear("cls.predictions.transform.dense", hidden, self.hidden, bias=True)
        hidden = gelu(hidden)
        return model.norm("cls.predictions.transform.LayerNorm", hidden)

    def _encoder(self, model: Scope, ids: Tensor, attention: Tensor) -> Tensor:
        model.begin("embeddings")
        embedded = self._embeddings(model, ids)
        setup = model.build.setup
        mask = masks.bidirectional_mask(attention, setup.attention, embedded.dtype, padded=setup.explicit_mask)
        hidden = model.layers(self.block, embedded, mask)
        model.begin("head")
        return hidden

    def _embeddings(self, model: Scope, ids: Tensor) -> Tensor:
        batch, seq = ids.shape
        model.check_positions(seq)
        assert self.max_positions is not None
        table = masks.model_buffer((1, self.max_positions))
        position_ids = masks.model_buffer((1, seq))
        types = expand(emit("gather", (table, position_ids), (1, seq), "i64"), (batch, seq))
        words = model.embedding("bert.embeddings.word_embeddings", self.vocab, self.hidden, ids)
        words = model.build.method.embedded(model, words)
        kinds = model.embedding("bert.embeddings.token_type_embeddings", self.token_types, self.hidden, types)
        hidden = add(words, kinds)
        located = model.embedding("bert.embeddings.position_embeddings", self.max_positions, self.hidden, position_ids)
        hidden = model.norm("bert.embeddings.LayerNorm", add(hidden, located))
        return dropout(hidden, self.hidden_dropout)

    def block(self, layer: Scope, x: Tensor, mask: Tensor | None) -> Tensor:
        """One encoder layer: (batch, seq, hidden) → the same."""
        attended, _ = self.attention(layer, x, mask)
        middle = self.intermediate_layer(layer, attended)
        return self.output(layer, "output", middle, attended)

    def intermediate_layer(self, layer: Scope, x: Tensor) -> Tensor:
        """The MLP's first half."""
        x = layer.linear("intermediate.dense", x, self.intermediate, bias=True)
        return gelu(x)

    def output(self, layer: Scope, name: str, x: Tensor, residual: Tensor) -> Tensor:
        """Projection, dropout, residual and LayerNorm after attention and after the MLP."""
        x = layer.linear(f"{name}.dense", x, self.hidden, bias=True)
        x = dropout(x, self.hidden_dropout)
        norm = f"{name}.LayerNorm"
        x = layer.sublayer("mlp" if name == "output" else "attention", x, residual, norm)
        return layer.norm(norm, add(x, residual))

    def attention(self, layer: Scope, x: Tensor, mask: Tensor | None) -> Any:
        """Bidirectional multi-head attention with its output projection; also returns the weights, if any."""
        attended, weights = self.self_attention(layer, x, mask)
        attended = self.output(layer, "attention.output", attended, x)
        return attended, weights

    def self_attention(self, layer: Scope, x: Tensor, mask: Tensor | None) -> Any:
        """Attention before its output projection."""
        q, k, v = (
            transpose(view(y, (*x.shape[:-1], self.heads, self.head_dim)), 1, 2)
            for y in (layer.linear(f"attention.self.{n}", x, self.hidden, bias=True) for n in ("query", "key", "value"))
        )
        setup = layer.build.setup
        out, weights = attend(q, k, v, mask, setup.attention, causal=False, form="plain", p=self.attention_dropout)
        return reshape(out, (*x.shape[:-1], self.hidden)), weights
