"""DistilBERT: BERT's blocks under names of their own, without token types.

Source: transformers/models/distilbert/modeling_distilbert.py. PEFT has no default targets for it.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..tape.linalg import linear
from ..tape.nn import masked_lm_loss
from ..tape.pointwise import add, dropout, relu
from ..tape.shape import reshape, transpose, view
from ..tape.split import select
from ..tape.tensor import Tensor
from . import masks
from .activations import ACTIVATIONS
from .attend import attend
from .base import Architecture, Linear, Scope
from .config import Config
from .heads import beside_loss
from .norms import layer_norm
from .registered import architecture
from .traits import Traits


@architecture("distilbert")
@dataclass(frozen=True)
class DistilBert(Architecture):
    """Dims of a DistilBERT and its dropout rates."""

    activation: str = "gelu"
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    classifier_dropout: float = 0.2

    layer_path: ClassVar[str] = "distilbert.transformer.layer"
    traits: ClassVar[Traits] = Traits(
        head="masked",
        heads=("sequence", "token"),
        norm=layer_norm,
        norms=("LayerNorm", "sa_layer_norm", "output_layer_norm", "vocab_layer_norm"),
    )

    @classmethod
    def dims(cls, config: Config) -> dict[str, Any]:
        hidden, heads = config.count("dim", "hidden_size"), config.count("n_heads", "num_attention_heads")
        config.refuse(chunk_size_feed_forward=0)
        return {
            "layers": config.count("n_layers", "num_hidden_layers"),
            "hidden": hidden,
            "heads": heads,
            "kv_heads": heads,
            "head_dim": config.divide("dim", "n_heads", hidden, heads),
            "intermediate": config.count("hidden_dim"),
            "vocab": config.count("vocab_size"),
            "max_positions": config.count("max_position_embeddings"),
            "tied": config.flag("tie_word_embeddings", True),
            "activation": config.one_of("activation", "gelu", tuple(ACTIVATIONS)),
            "hidden_dropout": config.fraction("dropout", 0.1),
            "attention_dropout": config.fraction("attention_dropout", 0.1),
            "classifier_dropout": config.fraction("seq_classif_dropout", 0.2),
        }

    def linear_names(self) -> list[str]:
        return [*(f"attention.{n}_lin" for n in ("q", "k", "v", "out")), "ffn.lin1", "ffn.lin2"]

    def forward(self, model: Scope, ids: Tensor, attention: Tensor, labels: Tensor) -> Tensor:
        hidden = self._encoder(model, ids, attention)
        head = self._predictions if self.classifier is None else self._classes
        return masked_lm_loss(beside_loss(model, head(model, hidden)), labels)

    def _classes(self, model: Scope, hidden: Tensor) -> Tensor:
        assert self.classifier is not None
        labels = self.classifier.labels
        if self.classifier.of == "token":
            return model.linear("classifier", dropout(hidden, self.hidden_dropout), labels, bias=True)
        pooled = relu(model.linear("pre_classifier", select(hidden, 1), self.hidden, bias=True))
        return model.linear("classifier", dropout(pooled, self.classifier_dropout), labels, bias=True)

    def _predictions(self, model: Scope, hidden: Tensor) -> Tensor:
        hidden = model.linear("vocab_transform", hidden, self.hidden, bias=True)
        hidden = ACTIVATIONS[self.activation](hidden)
        hidden = model.norm("vocab_layer_norm", hidden)
        if not self.tied:
            return Linear(model, "vocab_projector", self.hidden, self.vocab, True)(hidden)
        weight = model.parameter("distilbert.embeddings.word_embeddings.weight", (), "embedding")
        return linear(hidden, weight, model.parameter("vocab_projector.bias", (self.vocab,), "bias"))

    def _embedded(self, model: Scope, ids: Tensor) -> Tensor:
        masks.check_positions(model, ids.shape[1])
        assert self.max_positions is not None
        words = model.embedding("distilbert.embeddings.word_embeddings", self.vocab, self.hidden, ids)
        words = model.build.method.embedded(model, words)
        at = masks.model_buffer((1, ids.shape[1]))
        located = model.embedding("distilbert.embeddings.position_embeddings", self.max_positions, self.hidden, at)
        return dropout(model.norm("distilbert.embeddings.LayerNorm", add(words, located)), self.hidden_dropout)

    def _encoder(self, model: Scope, ids: Tensor, attention: Tensor) -> Tensor:
        model.begin("embeddings")
        hidden = self._embedded(model, ids)
        setup = model.build.setup
        mask = masks.bidirectional_mask(attention, setup.attention, hidden.dtype, padded=setup.explicit_mask)
        hidden = model.layers(self.block, hidden, mask)
        model.begin("head")
        return hidden

    def block(self, layer: Scope, x: Tensor, mask: Tensor | None) -> Tensor:
        """One encoder layer: (batch, seq, hidden) → the same."""
        attended, _ = self.attention(layer, x, mask)
        attended = layer.sublayer("attention", attended, x, "sa_layer_norm")
        attended = layer.norm("sa_layer_norm", add(attended, x))
        grown = layer.sublayer("mlp", self.mlp(layer, attended), attended, "output_layer_norm")
        return layer.norm("output_layer_norm", add(grown, attended))

    def mlp(self, layer: Scope, x: Tensor) -> Tensor:
        """Two linear layers."""
        x = ACTIVATIONS[self.activation](layer.linear("ffn.lin1", x, self.intermediate, bias=True))
        return dropout(layer.linear("ffn.lin2", x, self.hidden, bias=True), self.hidden_dropout)

    def attention(self, layer: Scope, x: Tensor, mask: Tensor | None) -> Any:
        """Bidirectional multi-head attention; also returns the weights, if any."""
        q, k, v = (
            transpose(view(y, (*x.shape[:-1], self.heads, self.head_dim)), 1, 2)
            for y in (layer.linear(f"attention.{n}_lin", x, self.hidden, bias=True) for n in ("q", "k", "v"))
        )
        out, weights = attend(layer, q, k, v, mask, causal=False, form="plain", p=self.attention_dropout)
        out = reshape(out, (*x.shape[:-1], self.hidden))
        return layer.linear("attention.out_lin", out, self.hidden, bias=True), weights
