"""Falcon: attention and MLP side by side, fused qkv; 7B with one key and value head, 40B, 180B and 11B with groups.

The one head is left to broadcasting, for which PyTorch has no fused attention; groups are copied out to all heads.
Source: transformers/models/falcon/modeling_falcon.py. ALiBi, biases and blocks in sequence (falcon-rw) are refused.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..errors import UserError
from ..tape.attention import sdpa_attention
from ..tape.core import tape
from ..tape.gather import take_one
from ..tape.inplace import add_in_place, div_in_place
from ..tape.linalg import matmul
from ..tape.nn import softmax
from ..tape.pointwise import add, dropout
from ..tape.shape import contiguous, expand, narrow, reshape, transpose, view
from ..tape.tensor import Tensor
from .activations import ACTIVATIONS
from .attend import extended
from .base import Architecture, Scope
from .config import Config
from .decoder import decoded
from .gpt_neox import GptNeox
from .heads import decoder_loss
from .norms import layer_norm
from .registered import architecture
from .rotary import rotate, rotate_half
from .traits import Traits

HINT = "its program is not mirrored; --traced predicts it from the real one"


@architecture("falcon")
@dataclass(frozen=True)
class Falcon(Architecture):
    """Dims of a Falcon.

    Attributes:
        grouped: whether it has the newer blocks (`new_decoder_architecture`).
        parallel_norms: norms in front of attention and MLP: one for both, or one each.
    """

    grouped: bool = False
    parallel_norms: int = 1
    activation: str = "gelu"
    hidden_dropout: float = 0.0

    layer_path: ClassVar[str] = "transformer.h"

    @property
    def traits(self) -> Traits:  # type: ignore[override]
        """What it is like; its norms are named after what they serve where there are two."""
        norms = ("ln_attn", "ln_mlp") if self.parallel_norms == 2 else ("input_layernorm",)
        targets = replace(GptNeox.traits.targets, adalora=None, s2ft=("self_attention.dense", "dense_4h_to_h"))
        return Traits(
            head="causal", norm=layer_norm, norms=(*norms, "ln_f"), targets=targets, by_matmul=True,
            attention=("sdpa", "eager"), heads=("sequence",), reentrant=("sdpa",),  # eager, it returns weights
            cache=None,  # PEFT's has as many heads as the queries
        )  # fmt: skip

    @classmethod
    def dims(cls, config: Config) -> dict[str, Any]:
        hidden, heads = config.count("hidden_size", "n_embed"), config.count("num_attention_heads", "n_head")
        head_dim = config.divide("hidden_size", "num_attention_heads", hidden, heads)
        grouped = config.flag("new_decoder_architecture", False)
        usual = {"alibi": False, "bias": False, "parallel_attn": True} | ({} if grouped else {"multi_query": True})
        for key, value in usual.items():
            if config.flag(key, value) != value:
                raise UserError(f"{config.origin}: {key} {config.values[key]!r} of falcon: {HINT}")
        kv_heads = config.count("num_kv_heads", default=heads) if grouped else 1
        config.divide("num_attention_heads", "num_kv_heads", heads, kv_heads)
        config.check_rotary("head_dim", head_dim)
        return {
            "layers": config.count("num_hidden_layers", "n_layer"),
            "hidden": hidden,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "intermediate": config.count("ffn_hidden_size", default=4 * hidden),
            "vocab": config.count("vocab_size"),
            "max_positions": None,
            "tied": config.flag("tie_word_embeddings", True),
            "grouped": grouped,
            "parallel_norms": min(config.count("num_ln_in_parallel_attn", default=2), 2) if grouped else 1,
            "activation": config.one_of("activation", "gelu", tuple(ACTIVATIONS)),
            "hidden_dropout": config.fraction("hidden_dropout", 0.0),
        }

    def linear_names(self) -> list[str]:
        return ["self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]

    def forward(self, model: Scope, ids: Tensor, attention: Tensor, labels: Tensor) -> Tensor:
        model.begin("embeddings")
        words, norm = "transformer.word_embeddings", "transformer.ln_f"
        hidden = decoded(model, ids, attention, self.block, words, norm, width=self.head_dim, skip=False)
        return decoder_loss(model, hidden, ids, labels, words)

    def block(self, layer: Scope, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """One decoder layer: (batch, seq, hidden) → the same."""
        normed = mlp_input = layer.norm("ln_attn" if self.parallel_norms == 2 else "input_layernorm", x)
        if self.parallel_norms == 2:
            mlp_input = layer.norm("ln_mlp", x)
        attended, _ = self.attention(layer, normed, mask, cos, sin)
        attended = layer.sublayer("attention", attended, x)
        grown = layer.sublayer("mlp", self.mlp(layer, mlp_input), x)
        grown = add_in_place(grown, attended)
        return add(x, dropout(grown, self.hidden_dropout))

    def mlp(self, layer: Scope, x: Tensor) -> Tensor:
        """Two linear layers."""
        x = ACTIVATIONS[self.activation](layer.linear("mlp.dense_h_to_4h", x, self.intermediate))
        return layer.linear("mlp.dense_4h_to_h", x, self.hidden)

    def attention(self, layer: Scope, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Any:
        """Attention with rotary positions from one fused projection; also returns the weights, if any."""
        fused = layer.linear("self_attention.query_key_value", x, (self.heads + 2 * self.kv_heads) * self.head_dim)
        q, k, v = (transpose(y, 1, 2) for y in self._split(fused))
        q, k, v = (reshape(y, y.shape) for y in (q, k, v))
        q, k = rotate(q, k, cos, sin, rotate_half)
        k, v = extended(layer, k, v)
        with tape().belonging_to("attention"):
            if layer.build.setup.attention == "sdpa":
                out, weights = sdpa_attention(q, k, v, mask, causal=True, p=0.0, broadcast=True), None
            else:
                weights = div_in_place(matmul(q, transpose(k, -1, -2)))
                weights = softmax(add(weights, mask), x.dtype)
                out = contiguous(transpose(matmul(weights, v), 1, 2))
        out = reshape(out, (*x.shape[:-1], self.hidden))
        return layer.linear("self_attention.dense", out, self.hidden), weights

    def _split(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, (batch, seq, heads, head_dim), of (batch, seq, …): the keys and values of a group follow it."""
        batch, seq, _ = fused.shape
        groups = self.heads // self.kv_heads
        if not self.grouped:
            fused = view(fused, (batch, seq, groups + 2, self.head_dim))
            return narrow(fused, 2, groups), take_one(fused, 2), take_one(fused, 2)
        fused = view(fused, (batch, seq, self.kv_heads, groups + 2, self.head_dim))
        q, k, v = narrow(fused, 3, groups), take_one(fused, 3), take_one(fused, 3)
        k, v = expand(k, q.shape), expand(v, q.shape)
        shape = (batch, seq, self.heads, self.head_dim)
        return reshape(q, shape), reshape(k, shape), reshape(v, shape)
