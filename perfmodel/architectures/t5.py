"""T5 and mT5: an encoder and a decoder with relative positions, RMSNorms before their sublayers, and no biases.

The decoder reads the labels, shifted by one. The first block of each stack makes the position bias for all blocks.
Transformers ties the head of every config; that of one that says `tie_word_embeddings: false` (T5 1.1, Flan-T5, mT5)
comes untied out of its checkpoint, which holds both weights.
Source: transformers/models/t5/modeling_t5.py (`T5ForConditionalGeneration`), models/mt5/modeling_mt5.py.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from ..errors import UserError
from ..program.dims import is_one
from ..tape.core import record, tape
from ..tape.nn import masked_lm_loss
from ..tape.pointwise import add, cast, dropout, fill, mul
from ..tape.shape import clone, narrow, reshape, transpose, view
from ..tape.split import select
from ..tape.tensor import Tensor
from . import masks
from .activations import ACTIVATIONS
from .attend import attend
from .base import Architecture, Scope
from .config import Config
from .heads import beside_loss, lm_head
from .norms import t5_norm
from .registered import architecture
from .relative import biased_mask, position_bias
from .traits import Targets, Traits

Biased = tuple[Tensor, Tensor | None, Tensor | None]  # a block's output, and the biases of its attention and across


@architecture("t5")
@dataclass(frozen=True)
class T5(Architecture):
    """Dims of a T5; its blocks are those of the encoder, then those of the decoder."""

    encoder_layers: int = 6
    buckets: int = 32
    activation: str = "relu"
    gated: bool = False
    scaled: bool = True
    dropout: float = 0.1

    layer_path: ClassVar[str] = "decoder.block"
    caveat: ClassVar[str] = "seq is the length of the encoder's input and of the decoder's target alike"
    traits: ClassVar[Traits] = Traits(
        head="seq2seq",
        norm=t5_norm,
        norms=("layer_norm", "final_layer_norm"),
        attention=("sdpa", "eager"),
        reentrant=(),
        cache=None,
        targets=Targets(
            lora=("q", "v"), adalora=("q", "k", "v", "o", "wi", "wo"), fourierft=("q", "v"), beft=("v",),
            ia3=("k", "v", "wo"), feedforward=("wo",),
        ),
    )  # fmt: skip

    @classmethod
    def dims(cls, config: Config) -> dict[str, Any]:
        gate, _, activation = config.text("feed_forward_proj", cls.feed_forward).rpartition("-")
        activation = "gelu_new" if (gate, activation) == ("gated", "gelu") else activation
        if gate not in ("", "gated") or activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise UserError(f"{config.origin}: feed_forward_proj must be one of {known}, or gated-ONE of them")
        config.refuse(is_encoder_decoder=True, is_decoder=False)
        encoder, tied = config.count("num_layers", "num_hidden_layers"), config.flag("tie_word_embeddings", True)
        heads = config.count("num_heads", "num_attention_heads")
        return {
            "layers": encoder + config.count("num_decoder_layers", default=encoder),
            "encoder_layers": encoder,
            "hidden": config.count("d_model", "hidden_size"),
            "heads": heads,
            "kv_heads": heads,
            "head_dim": config.count("d_kv", "head_dim"),
            "intermediate": config.count("d_ff"),
            "vocab": config.count("vocab_size"),
            "max_positions": None,
            "tied": tied,
            "buckets": config.count("relative_attention_num_buckets", default=32),
            "activation": activation,
            "gated": gate == "gated",
            "scaled": config.flag("scale_decoder_outputs", tied) and cls.scales,
            "dropout": config.fraction("dropout_rate", 0.1),
        }

    feed_forward: ClassVar[str] = "relu"  # where the config does not say
    scales: ClassVar[bool] = True  # whether a tied head's input is scaled

    @property
    def stacks(self) -> tuple[tuple[str, int], ...]:
        return (("encoder.block", self.encoder_layers), ("decoder.block", self.layers - self.encoder_layers))

    def layer_kind(self, layer: int) -> tuple[bool, str]:
        """Whether it is the decoder's, and where it is there.

        The first block makes the bias; in the last one's backward no gradient waits of what the blocks share.
        """
        ends = {0: "first", self.encoder_layers: "first", self.encoder_layers - 1: "last", self.layers - 1: "last"}
        return layer >= self.encoder_layers, ends.get(layer, "between")

    def linear_names(self) -> list[str]:
        attention = [
            f"layer.{i}.{name}.{p}" for i, name in ((0, "SelfAttention"), (1, "EncDecAttention")) for p in "qkvo"
        ]
        mlp = ("wi_0", "wi_1", "wo") if self.gated else ("wi", "wo")
        return [*attention, *(f"layer.{i}.DenseReluDense.{p}" for i in (1, 2) for p in mlp)]

    def forward(self, model: Scope, ids: Tensor, attention: Tensor, labels: Tensor) -> Tensor:
        if model.dtype == "fp16":
            raise UserError(
                f"{self.name}: T5 with fp16 weights clamps its hidden states, which is not modelled; use bf16"
            )
        encoded = beside_loss(model, self._encoded(model, ids, attention))
        decoded = self._decoded(model, labels, encoded, attention)
        hidden = mul(decoded, 1.0) if self.scaled else decoded
        logits = beside_loss(model, lm_head(model, hidden, "shared", self.vocab))
        return masked_lm_loss(logits, labels)

    def _encoded(self, model: Scope, ids: Tensor, attention: Tensor) -> Tensor:
        model.begin("embeddings")
        embedded = self._embedded(model, ids)
        setup = model.build.setup
        mask = masks.bidirectional_mask(attention, setup.attention, embedded.dtype, padded=setup.explicit_mask)
        hidden = dropout(embedded, self.dropout)
        block = partial(self.block, mask=mask)
        hidden = model.layers(block, hidden, None, None, among=range(self.encoder_layers))
        model.begin("between")
        return dropout(model.norm("encoder.final_layer_norm", hidden), self.dropout)

    def _decoded(self, model: Scope, labels: Tensor, encoded: Tensor, attention: Tensor) -> Tensor:
        embedded = self._embedded(model, shifted_right(labels))
        setup = model.build.setup
        mask = masks.decoder_mask(labels.shape, setup.attention, embedded.dtype)
        across = masks.bidirectional_mask(attention, setup.attention, embedded.dtype, padded=setup.explicit_mask)
        hidden = dropout(embedded, self.dropout)
        block = partial(self.block, mask=mask, encoded=encoded, across=across)
        hidden = model.layers(block, hidden, None, None, among=range(self.encoder_layers, self.layers))
        model.begin("head")
        return dropout(model.norm("decoder.final_layer_norm", hidden), self.dropout)

    def _embedded(self, model: Scope, ids: Tensor) -> Tensor:
        return model.build.method.embedded(model, model.embedding("shared", self.vocab, self.hidden, ids))

    def block(
        self, layer: Scope, x: Tensor, bias: Tensor | None, bias_across: Tensor | None, *, mask: Tensor | None,
        encoded: Tensor | None = None, across: Tensor | None = None,
    ) -> Biased:  # fmt: skip
        """One block: (batch, seq, hidden) → the same, and the biases that it was given or made."""
        x, bias, _ = self.sublayer(layer, "layer.0", "SelfAttention", x, None, mask, bias)
        if encoded is not None:
            x, bias_across, _ = self.sublayer(layer, "layer.1", "EncDecAttention", x, encoded, across, bias_across)
        return self.mlp(layer, "layer.1" if encoded is None else "layer.2", x), bias, bias_across

    def sublayer(
        self, layer: Scope, path: str, name: str, x: Tensor, encoded: Tensor | None, mask: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """x + attention(norm(x)), the bias of its scores, and the weights, if any."""
        normed = layer.norm(f"{path}.layer_norm", x)
        out, bias, weights = self.attention(layer, f"{path}.{name}", normed, encoded, mask, bias)
        out = dropout(out, self.dropout)
        if encoded is None:
            out = layer.sublayer("attention", out, x)
        out = add(x, out)
        return out, bias, weights

    def attention(
        self, layer: Scope, path: str, x: Tensor, encoded: Tensor | None, mask: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Attention to itself, or to what is encoded."""
        inner, setup = self.heads * self.head_dim, layer.build.setup

        def heads_of(name: str, x: Tensor) -> Tensor:
            y = layer.linear(f"{path}.{name}", x, inner)
            return transpose(view(y, (*x.shape[:-1], self.heads, self.head_dim)), 1, 2)

        q = heads_of("q", x)
        source = x if encoded is None else encoded
        k, v = heads_of("k", source), heads_of("v", source)
        decoder = layer.index >= self.encoder_layers
        causal = decoder and encoded is None and not is_one(x.shape[1])
        if bias is None:
            bias = self._bias(layer, path, q) if encoded is None else self._no_bias(layer, q, k)
        if setup.attention == "eager":
            out, weights = attend(layer, q, k, v, mask, causal=causal, form="plain", p=self.dropout, bias=bias)
        else:
            added = biased_mask(bias, mask, x.shape[1], causal=causal)
            out, weights = attend(layer, q, k, v, added, causal=False, form="plain", p=self.dropout)
        out = reshape(out, (*x.shape[:-1], inner))
        return layer.linear(f"{path}.o", out, self.hidden), bias, weights

    def _bias(self, layer: Scope, path: str, q: Tensor) -> Tensor:
        return position_bias(
            layer, f"{path}.relative_attention_bias", q.shape[2], buckets=self.buckets, heads=self.heads,
            both_ways=layer.index < self.encoder_layers,
        )  # fmt: skip

    def _no_bias(self, layer: Scope, q: Tensor, k: Tensor) -> Tensor:
        """Zeros across stacks, which need a gradient where blocks are checkpointed."""
        zeros = fill("zeros", (1, self.heads, q.shape[2], k.shape[2]), q.dtype)
        zeros.requires_grad = layer.build.setup.checkpoint != "none"
        return zeros

    def mlp(self, layer: Scope, path: str, x: Tensor) -> Tensor:
        """x + wo(dropout(activation(wi(norm(x))))), or with a gate beside the activation."""
        forwarded = self._dense(layer, f"{path}.DenseReluDense", layer.norm(f"{path}.layer_norm", x))
        return add(x, layer.sublayer("mlp", dropout(forwarded, self.dropout), x))

    def _dense(self, layer: Scope, path: str, x: Tensor) -> Tensor:
        activate = ACTIVATIONS[self.activation]
        if self.gated:
            gate = activate(layer.linear(f"{path}.wi_0", x, self.intermediate))
            up = layer.linear(f"{path}.wi_1", x, self.intermediate)
            x = mul(gate, up)
        else:
            x = activate(layer.linear(f"{path}.wi", x, self.intermediate))
        x = dropout(x, self.dropout)
        method, wo = layer.build.method, f"{path}.wo"
        stored = method.dtype_of_trained if method.trains(f"{wo}.weight", "weight", layer.layer) else method.base_dtype
        x = cast(x, stored(layer.dtype))
        return layer.linear(wo, x, self.hidden)


def shifted_right(labels: Tensor) -> Tensor:
    """`_shift_right`: what the decoder reads, (batch, seq)."""
    ids, others = fill("new_zeros", labels.shape, "i64", labels), labels.shape[1] - 1
    rest = narrow(ids, 1, others)
    record("copy_", (rest, clone(narrow(labels, 1, others))), (rest,))
    first, start = select(ids, 1), masks.model_buffer(())
    if tape().device == "cuda":
        start = fill("scalar_tensor", (), "i64")
    record("fill_.Tensor" if tape().device == "cpu" else "copy_", (first, start), (first,))
    record("masked_fill_.Scalar", (ids, masks.unary_bool(ids)), (ids,))
    return ids


@architecture("mt5")
@dataclass(frozen=True)
class Mt5(T5):
    """Dims of an mT5."""

    feed_forward: ClassVar[str] = "gated-gelu"
    scales: ClassVar[bool] = False
    traits: ClassVar[Traits] = replace(
        T5.traits,
        targets=Targets(
            lora=("q", "v"), adalora=("q", "k", "v", "o", "wi_0", "wi_1", "wo"), fourierft=("q", "v"), beft=("v",),
            ia3=("k", "v", "wi_1"), feedforward=(),
        ),
    )  # fmt: skip
