"""Llama and its kin (Llama 1-3.x, TinyLlama, SmolLM2, Mistral, Qwen1.5-2.5): RMSNorm, RoPE, GQA, SwiGLU.

Source: transformers/models/llama/modeling_llama.py (mistral, qwen2 differ in biases and sliding window only).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import UserError
from ..program.dims import product
from ..tape.core import tape
from ..tape.nn import causal_lm_loss, shifted_labels
from ..tape.packages.liger import linear_cross_entropy, rope, silu_mul
from ..tape.pointwise import add, cat, mul, neg, silu
from ..tape.shape import narrow, reshape, transpose, unsqueeze, view
from ..tape.tensor import Tensor
from . import masks
from .attend import attend
from .base import Architecture, Scope, architecture
from .config import Config


@architecture("llama", "mistral", "qwen2")
@dataclass(frozen=True)
class Llama(Architecture):
    """Dims of a Llama-like model.

    Attributes:
        qkv_bias, output_bias, mlp_bias: which linear layers have a bias.
        window: sliding attention window in tokens, None for full attention.
    """

    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    window: int | None = None
    attention_dropout: float = 0.0

    layer_path: ClassVar[str] = "model.layers"
    has_liger: ClassVar[bool] = True

    @classmethod
    def from_config(cls, config: Config) -> "Llama":
        model_type = config.text("model_type")
        hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
        default_kv = 8 if model_type == "mistral" else heads
        kv_heads = config.count("num_key_value_heads", default=default_kv)
        config.divide("num_attention_heads", "num_key_value_heads", heads, kv_heads)
        head_dim = config.values.get("head_dim") and config.count("head_dim")
        if not head_dim:
            head_dim = config.divide("hidden_size", "num_attention_heads", hidden, heads)
        if head_dim % 2:
            raise UserError(f"{config.origin}: head_dim {head_dim} must be even for rotary positions")
        config.one_of("hidden_act", "silu", ("silu", "swish"))
        if config.flag("use_sliding_window", False):
            raise UserError(f"{config.origin}: use_sliding_window true (per-layer windows of qwen2) is not supported")
        window = config.count("sliding_window", default=0) if model_type == "mistral" else 0
        attention_bias = model_type == "llama" and config.flag("attention_bias", False)
        return cls(
            name=config.name,
            model_type=model_type,
            layers=config.count("num_hidden_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate=config.count("intermediate_size"),
            vocab=config.count("vocab_size"),
            max_positions=None,
            tied=config.flag("tie_word_embeddings", False),
            qkv_bias=model_type == "qwen2" or attention_bias,
            output_bias=attention_bias,
            mlp_bias=model_type == "llama" and config.flag("mlp_bias", False),
            window=window or None,
            attention_dropout=config.fraction("attention_dropout", 0.0),
        )

    def linear_names(self) -> list[str]:
        attention = [f"self_attn.{n}_proj" for n in ("q", "k", "v", "o")]
        return attention + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]

    def forward(self, model: Scope, ids: Tensor, attention: Tensor, labels: Tensor) -> Tensor:
        model.begin("embeddings")
        hidden = self._decoder(model, ids, attention)
        if model.build.setup.kernels == "liger":
            return self._liger_loss(model, hidden, labels)
        logits = model.lm_head(hidden, "model.embed_tokens", self.vocab)
        return causal_lm_loss(logits, labels)

    def _liger_loss(self, model: Scope, hidden: Tensor, labels: Tensor) -> Tensor:
        """Liger's `lce_forward`: the head's weight goes into the loss, whatever wraps its module."""
        name, kind = ("model.embed_tokens", "embedding") if self.tied else ("lm_head", "weight")
        weight = model.parameter(f"{name}.weight", (self.vocab, self.hidden), kind)
        target = shifted_labels(labels)
        hidden = view(hidden, (product(hidden.shape[:-1]), self.hidden))
        return linear_cross_entropy(hidden, weight, target, scaled=model.build.setup.grad_accum > 1)

    def _decoder(self, model: Scope, ids: Tensor, attention: Tensor) -> Tensor:
        embedded = model.embedding("model.embed_tokens", self.vocab, self.hidden, ids)
        embedded = model.build.method.embedded(model, embedded)
        seq = embedded.shape[1]
        position_ids = masks.positions(seq)
        setup = model.build.setup
        mask = masks.causal_mask(
            attention, seq, setup.attention, embedded.dtype, self.window, padded=setup.explicit_mask
        )
        rotary = masks.rotary_tables(position_ids, self.head_dim // 2, embedded.dtype)
        hidden = model.layers(self.block, embedded, mask, *rotary)
        model.begin("head")
        return model.rms_norm("model.norm", hidden)

    def block(self, layer: Scope, x: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        """One decoder layer: (batch, seq, hidden) → the same."""
        residual = x
        x = layer.rms_norm("input_layernorm", x)
        x, _ = self.attention(layer, x, mask, cos, sin)
        x = layer.sublayer("attention", x, residual)
        x = add(residual, x)
        residual = x
        x = layer.rms_norm("post_attention_layernorm", x)
        x = self.mlp(layer, x)
        x = layer.sublayer("mlp", x, residual)
        return add(residual, x)

    def attention(self, layer: Scope, x: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor) -> Any:
        """Grouped-query attention with rotary positions; also returns the weights, if any."""
        q, k, v = self._projected(layer, x)
        setup = layer.build.setup
        q, k = rope(q, k, cos, sin) if setup.kernels == "liger" else rotate(q, k, cos, sin)
        k, v = layer.extended(k, v)
        out, weights = attend(q, k, v, mask, setup.attention, causal=True, form="upcast", p=self.attention_dropout)
        out = reshape(out, (*x.shape[:-1], self.heads * self.head_dim))
        out = layer.linear("self_attn.o_proj", out, self.hidden, bias=self.output_bias)
        return out, weights

    def _projected(self, layer: Scope, x: Tensor) -> list[Tensor]:
        """q, k and v, (batch, heads, seq, head_dim)."""
        heads = {"q_proj": self.heads, "k_proj": self.kv_heads, "v_proj": self.kv_heads}
        sizes = {f"self_attn.{name}": n * self.head_dim for name, n in heads.items()}
        layers = tuple(layer.linear_layer(name, self.hidden, n, bias=self.qkv_bias) for name, n in sizes.items())
        with tape().belonging_to("adapter"):
            fused = layer.build.method.qkv(layers, x)
        if fused is not None:
            return [self._heads(y, n) for y, n in zip(fused, heads.values(), strict=True)]
        return [
            self._heads(layer.linear(name, x, size, bias=self.qkv_bias), n)
            for (name, size), n in zip(sizes.items(), heads.values(), strict=True)
        ]

    def _heads(self, y: Tensor, heads: int) -> Tensor:
        return transpose(view(y, (*y.shape[:-1], heads, self.head_dim)), 1, 2)

    def mlp(self, layer: Scope, x: Tensor) -> Tensor:
        """SwiGLU."""
        sizes = {"gate_proj": (self.hidden, self.intermediate), "up_proj": (self.hidden, self.intermediate)}
        sizes["down_proj"] = (self.intermediate, self.hidden)
        layers = (layer.linear_layer(f"mlp.{name}", *size, bias=self.mlp_bias) for name, size in sizes.items())
        with tape().belonging_to("adapter"):
            fused = layer.build.method.mlp(tuple(layers), x)
        if fused is not None:
            return fused
        if layer.build.setup.kernels == "liger":
            gate = layer.linear("mlp.gate_proj", x, self.intermediate, bias=self.mlp_bias)
            gate = silu_mul(gate, layer.linear("mlp.up_proj", x, self.intermediate, bias=self.mlp_bias))
            return layer.linear("mlp.down_proj", gate, self.hidden, bias=self.mlp_bias)
        gate = silu(layer.linear("mlp.gate_proj", x, self.intermediate, bias=self.mlp_bias))
        up = layer.linear("mlp.up_proj", x, self.intermediate, bias=self.mlp_bias)
        gate = mul(gate, up)
        del up
        return layer.linear("mlp.down_proj", gate, self.hidden, bias=self.mlp_bias)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of q and k, (batch, heads, seq, head_dim)."""
    cos, sin = unsqueeze(cos, 1), unsqueeze(sin, 1)
    q = add(mul(q, cos), mul(_rotate_half(q), sin))
    return q, add(mul(k, cos), mul(_rotate_half(k), sin))


def _rotate_half(x: Tensor) -> Tensor:
    half: Any = x.shape[-1] // 2
    first, second = narrow(x, -1, half), narrow(x, -1, half)
    return cat((neg(second), first), -1)
