"""BERT as a masked language model: post-LayerNorm encoder, token types, transform head with a tied decoder.

Source: transformers/models/bert/modeling_bert.py (`BertForMaskedLM`).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..tape.core import emit, tape
from ..tape.linalg import linear
from ..tape.nn import masked_lm_loss
from ..tape.pointwise import add, dropout, gelu, tanh
from ..tape.shape import expand, reshape, transpose, view
from ..tape.split import select
from ..tape.tensor import Tensor
from . import masks
from .attend import attend
from .base import Architecture, Linear, Scope
from .config import Config
from .heads import beside_loss
from .norms import layer_norm
from .registered import architecture
from .traits import Targets, Traits


@architecture("bert")
@dataclass(frozen=True)
class Bert(Architecture):
    """Dims of a BERT and its dropout rates."""

    token_types: int = 2
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1

    layer_path: ClassVar[str] = "bert.encoder.layer"
    root: ClassVar[str] = "bert.embeddings"
    lm_head: ClassVar[tuple[str, ...]] = (  # its dense layer, norm, bias, and the decoder where it is not tied
        "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias",
        "cls.predictions.decoder",
    )  # fmt: skip
    traits: ClassVar[Traits] = Traits(
        head="masked",
        heads=("sequence", "token"),
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
        head = self._predictions if self.classifier is None else self.classes
        return masked_lm_loss(beside_loss(model, head(model, hidden)), labels)

    def _predictions(self, model: Scope, hidden: Tensor) -> Tensor:
        dense, norm, own_bias, decoder = self.lm_head
        hidden = model.linear(dense, hidden, self.hidden, bias=True)
        hidden = gelu(hidden)
        hidden = model.norm(norm, hidden)
        bias = model.parameter(own_bias, (self.vocab,), "bias")
        if self.tied:
            return linear(hidden, model.parameter(f"{self.root}.word_embeddings.weight", (), "embedding"), bias)
        # untied, the decoder brings its own bias, and `bias` stays unused
        return Linear(model, decoder, self.hidden, self.vocab, True)(hidden)

    def classes(self, model: Scope, hidden: Tensor) -> Tensor:
        """Logits of the classes of each token or, from the first token, of each sequence."""
        classifier = self.classifier
        assert classifier is not None
        p = self.hidden_dropout if classifier.dropout is None else classifier.dropout
        if classifier.of == "sequence":
            return self.classes_of_sequence(model, select(hidden, 1), p, classifier.labels)
        return model.linear("classifier", dropout(hidden, p), classifier.labels, bias=True)

    def classes_of_sequence(self, model: Scope, first: Tensor, p: float, labels: int) -> Tensor:
        """Logits of a sequence from the (batch, hidden) of its first token: a pooler, dropout p, and the classifier."""
        pooled = tanh(model.linear("bert.pooler.dense", first, self.hidden, bias=True))
        return model.linear("classifier", dropout(pooled, p), labels, bias=True)

    def _encoder(self, model: Scope, ids: Tensor, attention: Tensor) -> Tensor:
        model.begin("embeddings")
        embedded = self._embeddings(model, ids)
        setup = model.build.setup
        mask = masks.bidirectional_mask(attention, setup.attention, embedded.dtype, padded=setup.explicit_mask)
        hidden = model.layers(self.block, embedded, mask)
        model.begin("head")
        return hidden

    def _embeddings(self, model: Scope, ids: Tensor) -> Tensor:
        masks.check_positions(model, ids.shape[1])
        tape().buffers += [masks.model_buffer((1, self.table)).spec] * 2  # of positions and of token types
        position_ids, types = self.places(ids)
        words = model.embedding(f"{self.root}.word_embeddings", self.vocab, self.hidden, ids)
        words = model.build.method.embedded(model, words)
        kinds = model.embedding(f"{self.root}.token_type_embeddings", self.token_types, self.hidden, types)
        hidden = add(words, kinds)
        located = model.embedding(f"{self.root}.position_embeddings", self.table, self.hidden, position_ids)
        hidden = model.norm(f"{self.root}.LayerNorm", add(hidden, located))
        return dropout(hidden, self.hidden_dropout)

    def places(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (1 or batch, seq) and token types (batch, seq)."""
        batch, seq = ids.shape
        table = masks.model_buffer((1, self.table))
        position_ids = masks.model_buffer((1, seq))
        return position_ids, expand(emit("gather", (table, position_ids), (1, seq), "i64"), (batch, seq))

    @property
    def table(self) -> int:
        """Rows of the position table."""
        assert self.max_positions is not None
        return self.max_positions

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
        out, weights = attend(layer, q, k, v, mask, causal=False, form="plain", p=self.attention_dropout)
        return reshape(out, (*x.shape[:-1], self.hidden)), weights
