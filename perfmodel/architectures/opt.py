"""OPT: learned positions (offset 2), pre-LayerNorm, ReLU, biases everywhere.

Source: transformers/models/opt/modeling_opt.py. Post-norm and projected embeddings (opt-350m) are refused.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import UserError
from ..program.dims import product, same
from ..tape.core import emit
from ..tape.pointwise import add, cast, dropout, mul, relu, sub
from ..tape.shape import narrow, reshape, transpose, view
from ..tape.tensor import Tensor
from . import masks
from .attend import attend, extended
from .base import Architecture, Scope
from .config import Config
from .heads import decoder_loss
from .norms import layer_norm
from .registered import architecture
from .traits import Targets, Traits

LINEAR = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@architecture("opt")
@dataclass(frozen=True)
class Opt(Architecture):
    """Dims of an OPT model and its dropout rates."""

    residual_dropout: float = 0.1
    attention_dropout: float = 0.0

    layer_path: ClassVar[str] = "model.decoder.layers"
    traits: ClassVar[Traits] = Traits(
        head="causal",
        heads=("sequence",),
        norm=layer_norm,
        norms=("self_attn_layer_norm", "final_layer_norm"),
        targets=Targets(
            lora=("q_proj", "v_proj"), adalora=LINEAR, fourierft=("q_proj", "v_proj"), beft=("v_proj",),
            ia3=("q_proj", "k_proj", "fc2"), feedforward=("fc2",), s2ft=("out_proj",),
        ),
    )  # fmt: skip

    @classmethod
    def dims(cls, config: Config) -> dict[str, Any]:
        hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
        if config.count("word_embed_proj_dim", default=hidden) != hidden:
            raise UserError(f"{config.origin}: word_embed_proj_dim other than hidden_size is not supported")
        if not config.flag("do_layer_norm_before", True):
            raise UserError(f"{config.origin}: do_layer_norm_before false is not supported")
        config.one_of("activation_function", "relu", ("relu",))
        config.refuse(enable_bias=True, layer_norm_elementwise_affine=True, layerdrop=0.0)
        return {
            "layers": config.count("num_hidden_layers"),
            "hidden": hidden,
            "heads": heads,
            "kv_heads": heads,
            "head_dim": config.divide("hidden_size", "num_attention_heads", hidden, heads),
            "intermediate": config.count("ffn_dim"),
            "vocab": config.count("vocab_size"),
            "max_positions": config.count("max_position_embeddings"),
            "tied": config.flag("tie_word_embeddings", True),
            "residual_dropout": config.fraction("dropout", 0.1),
            "attention_dropout": config.fraction("attention_dropout", 0.0),
        }

    def linear_names(self) -> list[str]:
        return [f"self_attn.{n}" for n in ("k_proj", "v_proj", "q_proj", "out_proj")] + ["fc1", "fc2"]

    def forward(self, model: Scope, ids: Tensor, attention: Tensor, labels: Tensor) -> Tensor:
        model.begin("embeddings")
        hidden = self._decoder(model, ids, attention)
        return decoder_loss(model, hidden, ids, labels, "model.decoder.embed_tokens")

    def _decoder(self, model: Scope, ids: Tensor, attention: Tensor) -> Tensor:
        setup = model.build.setup
        masks.check_positions(model, attention.shape[1])
        assert self.max_positions is not None
        embedded = model.embedding("model.decoder.embed_tokens", self.vocab, self.hidden, ids)
        embedded = model.build.method.embedded(model, embedded)
        seq = embedded.shape[1]
        position_ids = cast(sub(mul(_counted(attention), attention), 1), "i64")
        if not same(attention.shape[1], seq):
            position_ids = narrow(position_ids, 1, seq)
        model.build.positions = position_ids
        mask = masks.causal_mask(attention, seq, setup.attention, embedded.dtype, None, padded=setup.explicit_mask)
        located = model.embedding(
            "model.decoder.embed_positions", self.max_positions + 2, self.hidden, add(position_ids, 2)
        )
        hidden = model.layers(self.block, add(embedded, located), mask)
        model.begin("head")
        return model.norm("model.decoder.final_layer_norm", hidden)

    def block(self, layer: Scope, x: Tensor, mask: Tensor | None) -> Tensor:
        """One decoder layer: (batch, seq, hidden) → the same."""
        residual = x
        x = layer.norm("self_attn_layer_norm", x)
        x, _ = self.attention(layer, x, mask)
        x = dropout(x, self.residual_dropout)
        x = layer.sublayer("attention", x, residual)
        x = add(residual, x)
        shape = x.shape
        x = reshape(x, (product(shape[:-1]), shape[-1]))
        residual = x
        x = layer.norm("final_layer_norm", x)
        x = layer.linear("fc1", x, self.intermediate, bias=True)
        x = relu(x)
        x = layer.linear("fc2", x, self.hidden, bias=True)
        x = dropout(x, self.residual_dropout)
        x = layer.sublayer("mlp", x, residual)
        return view(add(residual, x), shape)

    def attention(self, layer: Scope, x: Tensor, mask: Tensor | None) -> Any:
        """Multi-head attention, the query scaled after its projection; also returns the weights, if any."""
        q = self._split(mul(layer.linear("self_attn.q_proj", x, self.hidden, bias=True), self.head_dim**-0.5))
        k = self._split(layer.linear("self_attn.k_proj", x, self.hidden, bias=True))
        v = self._split(layer.linear("self_attn.v_proj", x, self.hidden, bias=True))
        k, v = extended(layer, k, v)
        out, weights = attend(layer, q, k, v, mask, causal=True, form="upcast", p=self.attention_dropout)
        out = reshape(out, (*x.shape[:-1], self.hidden))
        return layer.linear("self_attn.out_proj", out, self.hidden, bias=True), weights

    def _split(self, y: Tensor) -> Tensor:
        return transpose(view(y, (*y.shape[:-1], self.heads, self.head_dim)), 1, 2)


def _counted(attention: Tensor) -> Tensor:
    """`torch.cumsum(attention, dim=1)`: the positions of the tokens, counted from 1."""
    return emit("cumsum", (attention,), attention.shape, attention.dtype)
