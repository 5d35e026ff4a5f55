"""Llama (1-3.x, TinyLlama, SmolLM2) and what its kin share: RMSNorm, RoPE, GQA, SwiGLU.

Source: transformers/models/llama/modeling_llama.py.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..errors import UserError
from ..program.dims import product
from ..tape.core import tape
from ..tape.nn import shifted_labels
from ..tape.packages.liger import linear_cross_entropy, rope, silu_mul
from ..tape.pointwise import add, cat, mul, neg, silu
from ..tape.shape import narrow, reshape, transpose, unsqueeze, view
from ..tape.tensor import Tensor
from . import masks
from .attend import attend
from .base import Architecture, Scope, architecture
from .config import Config
from .heads import decoder_loss
from .norms import rms_norm
from .traits import Targets, Traits

Masks = dict[str, Tensor | None]  # the attention mask for each kind of layer


FULL, SLIDING = "full_attention", "sliding_attention"  # `layer_types` of transformers' configs
QV = ("q_proj", "v_proj")
TARGETS = Targets(
    lora=QV, adalora=QV, fourierft=QV, beft=("v_proj",), ia3=(*QV, "down_proj"), feedforward=("down_proj",),
    s2ft=("o_proj", "down_proj"),
)  # fmt: skip  # of most of Llama's kin


@architecture("llama")
@dataclass(frozen=True)
class Llama(Architecture):
    """Dims of a Llama-like model. Its kin extend `widths`, `biases` or `windows`, and override parts of the forward.

    Attributes:
        qkv_bias, output_bias, mlp_bias: which linear layers have a bias.
        window: sliding attention window in tokens, None for full attention.
        layer_types: how each layer attends, where some slide and others do not; else empty.
    """

    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    window: int | None = None
    layer_types: tuple[str, ...] = ()
    attention_dropout: float = 0.0

    layer_path: ClassVar[str] = "model.layers"
    traits: ClassVar[Traits] = Traits(
        head="causal",
        norm=rms_norm,
        norms=("input_layernorm", "post_attention_layernorm", "norm"),
        targets=replace(TARGETS, ia3=("k_proj", "v_proj", "down_proj")),
        fused=("liger", "unsloth", "lorafusion"),
        heads=("sequence", "token"),
    )
    defaults: ClassVar[dict[str, int]] = {}  # what the model type's config class has for a missing key

    @classmethod
    def dims(cls, config: Config) -> dict[str, Any]:
        cls.check(config)
        return {**cls.widths(config), **cls.biases(config), **cls.windows(config)}

    @classmethod
    def check(cls, config: Config) -> None:
        """Raise `UserError` where the config asks for a program that is not mirrored."""
        config.one_of("hidden_act", "silu", ("silu", "swish"))

    @classmethod
    def count(cls, config: Config, key: str, null: int) -> int:
        """A count; the model type's own default where the key is missing, `null` where it is null."""
        return config.count(key, default=null if key in config.values else cls.defaults.get(key, null))

    @classmethod
    def widths(cls, config: Config) -> dict[str, Any]:
        """Numbers of layers and heads, widths, dropout."""
        hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
        kv_heads = cls.count(config, "num_key_value_heads", heads)
        config.divide("num_attention_heads", "num_key_value_heads", heads, kv_heads)
        head_dim = cls.count(config, "head_dim", 0)
        head_dim = head_dim or config.divide("hidden_size", "num_attention_heads", hidden, heads)
        if head_dim % 2:
            raise UserError(f"{config.origin}: head_dim {head_dim} must be even for rotary positions")
        return {
            "layers": config.count("num_hidden_layers"),
            "hidden": hidden,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "intermediate": config.count("intermediate_size"),
            "vocab": config.count("vocab_size"),
            "max_positions": None,
            "tied": config.flag("tie_word_embeddings", False),
            "attention_dropout": config.fraction("attention_dropout", 0.0),
        }

    @classmethod
    def biases(cls, config: Config) -> dict[str, Any]:
        """Which linear layers have a bias."""
        attention = config.flag("attention_bias", False)
        return {"qkv_bias": attention, "output_bias": attention, "mlp_bias": config.flag("mlp_bias", False)}

    @classmethod
    def windows(cls, config: Config) -> dict[str, Any]:
        """Which layers see a sliding window only, and how wide it is."""
        return {}

    def layer_kind(self, layer: int) -> str:
        if self.layer_types:
            return self.layer_types[layer]
        return SLIDING if self.window else FULL

    def window_of(self, layer: int) -> int | None:
        return self.window if self.layer_kind(layer) == SLIDING else None

    def linear_names(self) -> list[str]:
        attention = [f"self_attn.{n}_proj" for n in ("q", "k", "v", "o")]
        return attention + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]

    def forward(self, model: Scope, ids: Tensor, attention: Tensor, labels: Tensor) -> Tensor:
        model.begin("embeddings")
        hidden = self._decoder(model, ids, attention)
        if model.build.setup.kernels == "liger" and self.classifier is None:
            return self._liger_loss(model, hidden, labels)
        return decoder_loss(model, hidden, ids, labels, "model.embed_tokens")

    def _liger_loss(self, model: Scope, hidden: Tensor, labels: Tensor) -> Tensor:
        """Liger's `lce_forward`: the head's weight goes into the loss, whatever wraps its module."""
        name, kind = ("model.embed_tokens", "embedding") if self.tied else ("lm_head", "weight")
        weight = model.parameter(f"{name}.weight", (self.vocab, self.hidden), kind)
        target = shifted_labels(labels)
        hidden = view(hidden, (product(hidden.shape[:-1]), self.hidden))
        return linear_cross_entropy(hidden, weight, target, scaled=model.build.setup.grad_accum > 1)

    def _decoder(self, model: Scope, ids: Tensor, attention: Tensor) -> Tensor:
        embedded = model.build.method.embedded(model, self.embed(model, ids))
        seq, setup = embedded.shape[1], model.build.setup
        position_ids = masks.positions(seq)
        mask_of = {
            kind: masks.causal_mask(
                attention, seq, setup.attention, embedded.dtype, self.window if kind == SLIDING else None,
                padded=setup.explicit_mask,
            )
            for kind in ((FULL, SLIDING) if self.layer_types else (self.layer_kind(0),))
        }  # fmt: skip
        rotary = masks.rotary_tables(position_ids, self.head_dim // 2, embedded.dtype)
        hidden = model.layers(self.block, embedded, mask_of, *rotary)
        model.begin("head")
        return model.norm("model.norm", hidden)

    def embed(self, model: Scope, ids: Tensor) -> Tensor:
        """The embedding of the words."""
        return model.embedding("model.embed_tokens", self.vocab, self.hidden, ids)

    def block(self, layer: Scope, x: Tensor, mask_of: Masks, cos: Tensor, sin: Tensor) -> Tensor:
        """One decoder layer: (batch, seq, hidden) → the same."""
        residual = x
        x = layer.norm("input_layernorm", x)
        x, _ = self.attention(layer, x, mask_of, cos, sin)
        x = layer.sublayer("attention", x, residual)
        x = add(residual, x)
        residual = x
        x = layer.norm("post_attention_layernorm", x)
        x = self.mlp(layer, x)
        x = layer.sublayer("mlp", x, residual)
        return add(residual, x)

    def attention(self, layer: Scope, x: Tensor, mask_of: Masks, cos: Tensor, sin: Tensor) -> Any:
        """Grouped-query attention with rotary positions; also returns the weights, if any."""
        q, k, v = self._projected(layer, x)
        setup = layer.build.setup
        q, k = rope(q, k, cos, sin) if setup.kernels == "liger" else rotate(q, k, cos, sin)
        k, v = layer.extended(k, v)
        mask, p, capped = mask_of[self.layer_kind(layer.index)], self.attention_dropout, self.attention_cap is not None
        out, weights = attend(q, k, v, mask, setup.attention, causal=True, form="upcast", p=p, capped=capped)
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
            return [self._split(layer, name, y, n) for y, (name, n) in zip(fused, heads.items(), strict=True)]
        return [
            self._split(layer, name, layer.linear(f"self_attn.{name}", x, n * self.head_dim, bias=self.qkv_bias), n)
            for name, n in heads.items()
        ]

    def _split(self, layer: Scope, name: str, y: Tensor, heads: int) -> Tensor:
        return transpose(self.split_heads(layer, name, view(y, (*y.shape[:-1], heads, self.head_dim))), 1, 2)

    def split_heads(self, layer: Scope, name: str, y: Tensor) -> Tensor:
        """What becomes of a projection (q_proj, k_proj, v_proj) that is split into heads, (batch, seq, heads, d)."""
        return y

    def activation(self, x: Tensor) -> Tensor:
        """What the MLP's gate passes through."""
        return silu(x)

    def mlp(self, layer: Scope, x: Tensor) -> Tensor:
        """A gated MLP (SwiGLU)."""
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
        gate = self.activation(layer.linear("mlp.gate_proj", x, self.intermediate, bias=self.mlp_bias))
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
