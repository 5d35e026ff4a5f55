"""Llama (1-3.x, TinyLlama, SmolLM2) and what its kin share: RMSNorm, RoPE, GQA, SwiGLU.

Source: transformers/models/llama/modeling_llama.py.
"""

from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self, TypeVar

from ..errors import UserError
from ..program.dims import product
from ..program.ranks import Ranks
from ..tape.core import tape
from ..tape.nn import shifted_labels
from ..tape.packages.cut_loss import cut_cross_entropy
from ..tape.packages.fused_head import fused_head_loss
from ..tape.packages.liger import gated, linear_cross_entropy, rope
from ..tape.pointwise import add, mul, silu
from ..tape.shape import reshape, transpose, view
from ..tape.tensor import Tensor
from ..tape.transfers import summed_in_place
from . import masks
from .attend import attend, extended
from .base import Architecture, Scope
from .config import Config
from .heads import decoder_loss
from .norms import rms_norm
from .registered import architecture
from .rotary import rotate, rotate_half
from .traits import Targets, Traits

A = TypeVar("A", bound=Architecture)
Masks = dict[str, Tensor | None]  # the attention mask for each kind of layer


FULL, SLIDING = "full_attention", "sliding_attention"  # `layer_types` of transformers' configs
QV = ("q_proj", "v_proj")
TARGETS = Targets(
    lora=QV, adalora=QV, fourierft=QV, beft=("v_proj",), ia3=(*QV, "down_proj"), feedforward=("down_proj",),
    s2ft=("o_proj", "down_proj"),
)  # fmt: skip  # of most of Llama's kin


@architecture("llama")
@dataclass(frozen=True, eq=False, repr=False)  # `Compared` has both; most cold starts make this one
class Llama(Architecture):
    """Dims of a Llama-like model. Its kin extend `widths`, `biases` or `windows`, and override parts of the forward.

    Attributes:
        qkv_bias, output_bias, mlp_bias: which linear layers have a bias.
        window: sliding attention window in tokens, None for full attention.
        layer_types: how each layer attends, where some slide and others do not; else empty.
        rotary: dims of a head that turn with the position, the others pass; None: all.
        longrope: whether every forward pass chooses between two sets of rotary frequencies (LongRoPE).
    """

    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    window: int | None = None
    layer_types: tuple[str, ...] = ()
    rotary: int | None = None
    longrope: bool = False
    attention_dropout: float = 0.0

    layer_path: ClassVar[str] = "model.layers"
    registers_late: ClassVar[tuple[str, ...]] = (
        "self_attn.q_norm", "self_attn.k_norm", "mlp.gate", "input_layernorm", "post_attention_layernorm",
        "pre_feedforward_layernorm", "post_feedforward_layernorm",
    )  # fmt: skip
    traits: ClassVar[Traits] = Traits(
        head="causal",
        norm=rms_norm,
        norms=("input_layernorm", "post_attention_layernorm", "norm"),
        targets=replace(TARGETS, ia3=("k_proj", "v_proj", "down_proj")),
        fused=("liger", "unsloth", "lorafusion", "axolotl"),
        cut_loss=True,
        heads=("sequence", "token"),
        packs=True,
    )
    around: ClassVar[tuple[str | None, ...]] = ("input_layernorm", None, "post_attention_layernorm", None)
    gate: ClassVar[str] = "swiglu"  # Liger's name of the MLP's gate
    defaults: ClassVar[dict[str, int]] = {}  # what the model type's config class has for a missing key

    @classmethod
    def dims(cls, config: Config) -> dict[str, Any]:
        cls.check(config)
        return {**cls.widths(config), **cls.biases(config), **cls.windows(config), **cls.positions(config)}

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
        head_dim = cls.head_width(config, hidden, heads)
        config.check_rotary("head_dim", head_dim)
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
    def head_width(cls, config: Config, hidden: int, heads: int) -> int:
        """Dims of a head."""
        given = cls.count(config, "head_dim", 0)
        return given or config.divide("hidden_size", "num_attention_heads", hidden, heads)

    @classmethod
    def biases(cls, config: Config) -> dict[str, Any]:
        """Which linear layers have a bias."""
        attention = config.flag("attention_bias", False)
        return {"qkv_bias": attention, "output_bias": attention, "mlp_bias": config.flag("mlp_bias", False)}

    @classmethod
    def windows(cls, config: Config) -> dict[str, Any]:
        """Which layers see a sliding window only, and how wide it is."""
        return {}

    @classmethod
    def positions(cls, config: Config) -> dict[str, Any]:
        """What is unusual about rotary positions."""
        return {"longrope": rope_table(config)["rope_type"] == "longrope"}

    @classmethod
    def partial(cls, config: Config, default: float) -> int:
        """Dims of a head that turn with the position (`partial_rotary_factor`)."""
        factor = rope_table(config).get("partial_rotary_factor", config.values.get("partial_rotary_factor", default))
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor <= 1:
            raise UserError(f"{config.origin}: partial_rotary_factor must be above 0 and at most 1, got {factor!r}")
        dims = int(cls.widths(config)["head_dim"] * factor)
        if not dims or dims % 2:
            raise UserError(
                f"{config.origin}: partial_rotary_factor {factor} leaves {dims} rotary dims, not an even number"
            )
        return dims

    def layer_kind(self, layer: int) -> Hashable:
        return self.reach(layer)

    def reach(self, layer: int) -> str:
        """How far a layer attends, as `layer_types` says it."""
        if self.layer_types:
            return self.layer_types[layer]
        return SLIDING if self.window else FULL

    def window_of(self, layer: int) -> int | None:
        return self.window if self.reach(layer) == SLIDING else None

    def cuts(self, name: str) -> str:
        if name.endswith(("o_proj", "down_proj")):
            return "rows"
        return "columns" if name == "lm_head" or name in self.linear_names() else ""

    def part_of(self, ranks: int) -> Self:
        if self.model_type not in CUT or self.output_bias or self.mlp_bias or self.classifier:
            return super().part_of(ranks)
        return divided(self, ranks)

    def staged(self) -> None:
        if self.model_type not in STAGED or self.classifier:
            super().staged()
        if self.tied:
            raise UserError(
                f"pp: {self.name} shares one weight between its embedding and its head, which lie on two "
                "stages: not modelled; use --pp 1"
            )

    def linear_names(self) -> list[str]:
        attention = [f"self_attn.{n}_proj" for n in ("q", "k", "v", "o")]
        return attention + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]

    def forward(self, model: Scope, ids: Tensor, attention: Tensor, labels: Tensor) -> Tensor:
        model.begin("embeddings")
        hidden = self._decoder(model, ids, attention)
        if not model.build.ends:
            return hidden
        if model.build.setup.kernels != "torch" and self.classifier is None and model.build.labelled:
            return self._fused_loss(model, hidden, labels)
        return decoder_loss(model, hidden, ids, labels, "model.embed_tokens", scaled=self.scaled_logits)

    def _fused_loss(self, model: Scope, hidden: Tensor, labels: Tensor) -> Tensor:
        """Liger's `lce_forward`, or `cce_forward`: the head's weight goes into the loss, whatever wraps its module."""
        if self.tied:
            weight = model.tied_weight("model.embed_tokens")
        else:
            weight = model.parameter("lm_head.weight", (self.vocab, self.hidden), "weight")
        setup, wrapping = model.build.setup, tape().wrapping
        there: Tensor = weight if wrapping is None else wrapping.weight(weight)
        if there is not weight and not setup.uses("trl"):
            raise UserError(
                f"kernels {setup.kernels}: the loss reads the head's weight, which lies in shards there (accelerate's "
                "FSDP2 around PEFT's model), and PyTorch ends in an error; use --fsdp-units blocks, or --kernels torch"
            )
        if setup.uses("cce"):
            return cut_cross_entropy(self.scaled_logits(hidden), weight, labels)
        if setup.uses("trl"):
            return fused_head_loss(hidden, there, labels)
        target = shifted_labels(labels)
        hidden = view(hidden, (product(hidden.shape[:-1]), self.hidden))
        return linear_cross_entropy(hidden, weight, target, scaled=setup.grad_accum > 1)

    def _decoder(self, model: Scope, ids: Tensor, attention: Tensor) -> Tensor:
        embedded = self.scaled_words(model.build.method.embedded(model, self.embed(model, ids)))
        setup = model.build.setup
        seq = embedded.shape[1] * (setup.tp if setup.sequence_parallel else 1)
        position_ids = masks.positions_of(model, ids, seq)
        mask_of = {
            kind: masks.causal_mask(
                attention, seq, setup.attention, embedded.dtype, self.window if kind == SLIDING else None,
                padded=setup.explicit_mask, packed=model.build.packed,
            )
            for kind in ((FULL, SLIDING) if self.layer_types else (self.reach(0),))
        }  # fmt: skip
        rotary = self.rotary_tables(position_ids, embedded.dtype)  # a local: blocks may make tables of their own of it
        hidden = model.layers(self.block, embedded, mask_of, *rotary)
        model.begin("head")  # what the blocks shared dies here
        return model.norm("model.norm", hidden) if model.build.ends else hidden

    def embed(self, model: Scope, ids: Tensor) -> Tensor:
        """The embedding of the words, or what the stage before sends of them."""
        if model.build.received is not None:
            return model.build.received
        return model.embedding("model.embed_tokens", self.vocab, self.hidden, ids)

    def rotary_tables(self, position_ids: Tensor, dtype: str) -> tuple[Tensor, ...]:
        """What blocks turn queries and keys by: cos and sin of (1, seq, rotary dims)."""
        return masks.rotary_tables(position_ids, (self.rotary or self.head_dim) // 2, dtype, longrope=self.longrope)

    def scaled_words(self, x: Tensor) -> Tensor:
        """What becomes of the embedded words, virtual tokens among them, before the first block."""
        return x

    def scaled_logits(self, logits: Tensor) -> Tensor:
        """What becomes of the head's logits before the loss."""
        return logits

    def block(self, layer: Scope, x: Tensor, mask_of: Masks, cos: Tensor, sin: Tensor) -> Tensor:
        """One decoder layer, with norms before or after attention and MLP: (batch, seq, hidden) → the same."""
        before_attention, after_attention, before_mlp, after_mlp = self.around
        residual = x
        x = _normed(layer, before_attention, x)
        x, _ = self.attention(layer, x, mask_of, cos, sin)
        x = _normed(layer, after_attention, layer.sublayer("attention", x, residual))
        x = self.joined(residual, x)
        residual = x
        x = _normed(layer, before_mlp, x)
        x = self.mlp(layer, x)
        x = _normed(layer, after_mlp, layer.sublayer("mlp", x, residual))
        return self.joined(residual, x)

    def joined(self, residual: Tensor, x: Tensor) -> Tensor:
        """The residual stream with the output of attention or MLP."""
        return add(residual, x)

    def attention(self, layer: Scope, x: Tensor, mask_of: Masks, cos: Tensor, sin: Tensor) -> Any:
        """Grouped-query attention with rotary positions; also returns the weights, if any."""
        q, k, v = self.projected(layer, x)
        q, k = self.rotated(layer, q, k, cos, sin)
        k, v = extended(layer, k, v)
        mask, p, capped = mask_of[self.reach(layer.index)], self.attention_dropout, self.attention_cap is not None
        out, weights = attend(
            layer, q, k, v, mask, causal=True, form="upcast", p=p, capped=capped, window=self.window_of(layer.index)
        )
        out = reshape(out, (*x.shape[:-1], self.heads * self.head_dim))
        out = layer.linear("self_attn.o_proj", out, self.hidden, bias=self.output_bias)
        return out, weights

    def rotated(self, layer: Scope, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys (batch, heads, seq, head_dim), turned by their positions."""
        return rope(q, k, cos, sin) if layer.build.setup.uses("liger") else rotate(q, k, cos, sin, rotate_half)

    def projected(self, layer: Scope, x: Tensor) -> list[Tensor]:
        """q, k and v, (batch, heads, seq, head_dim)."""
        heads = {"q_proj": self.heads, "k_proj": self.kv_heads, "v_proj": self.kv_heads}
        sizes = {f"self_attn.{name}": n * self.head_dim for name, n in heads.items()}
        layers = tuple(layer.linear_layer(name, self.hidden, n, bias=self.qkv_bias) for name, n in sizes.items())
        with tape().belonging_to("adapter"):
            fused = layer.build.method.qkv(layers, x)
        if fused is not None:
            return [self.split_heads(layer, name, y, n) for y, (name, n) in zip(fused, heads.items(), strict=True)]
        made = []
        for name, n in heads.items():
            y = layer.linear(f"self_attn.{name}", x, n * self.head_dim, bias=self.qkv_bias)
            made.append(self.split_heads(layer, name, y, n))
        return made

    def split_heads(self, layer: Scope, name: str, y: Tensor, heads: int) -> Tensor:
        """A projection (q_proj, k_proj, v_proj) of (batch, seq, heads · d) as (batch, heads, seq, d)."""
        return transpose(view(y, (*y.shape[:-1], heads, self.head_dim)), 1, 2)

    def head_norm(self, layer: Scope, name: str, y: Tensor) -> Tensor:
        """A norm of each head of a projection (q_proj, k_proj), whose gradient ranks with other heads sum."""
        norm, ranks = f"self_attn.{name[0]}_norm", layer.build.setup.tp
        y = layer.norm(norm, y)
        if ranks > 1:
            layer.made[f"{norm}.weight"].arrived = partial(summed_in_place, ranks=Ranks(ranks))
        return y

    def head_norms(self, layer: Scope, projections: list[Tensor]) -> list[Tensor]:
        """Queries and keys pass norms of each head, behind all three projections."""
        for i, name in enumerate(("q_proj", "k_proj")):
            projections[i] = self.head_norm(layer, name, projections[i])
        return projections

    def activation(self, x: Tensor) -> Tensor:
        """What the MLP's gate passes through."""
        return silu(x)

    def mlp(self, layer: Scope, x: Tensor) -> Tensor:
        """A block's own MLP."""
        return self.gated_mlp(layer, x, "mlp", self.intermediate)

    def gated_mlp(self, layer: Scope, x: Tensor, path: str, width: int) -> Tensor:
        """A gated MLP (SwiGLU) of some width, whose layers lie under a path in the block."""
        sizes = {"gate_proj": (self.hidden, width), "up_proj": (self.hidden, width), "down_proj": (width, self.hidden)}
        layers = (layer.linear_layer(f"{path}.{name}", *size, bias=self.mlp_bias) for name, size in sizes.items())
        with tape().belonging_to("adapter"):
            fused = layer.build.method.mlp(tuple(layers), x, self.gate)
        if fused is not None:
            return fused
        if layer.build.setup.uses("liger"):
            gate = layer.linear(f"{path}.gate_proj", x, width, bias=self.mlp_bias)
            gate = gated(self.gate, gate, layer.linear(f"{path}.up_proj", x, width, bias=self.mlp_bias))
            return layer.linear(f"{path}.down_proj", gate, self.hidden, bias=self.mlp_bias)
        gate = self.activation(layer.linear(f"{path}.gate_proj", x, width, bias=self.mlp_bias))
        up = layer.linear(f"{path}.up_proj", x, width, bias=self.mlp_bias)
        gate = mul(gate, up)
        del up
        return layer.linear(f"{path}.down_proj", gate, self.hidden, bias=self.mlp_bias)


# model types of whose program a stage was compared with the real one (`validate.oracle.pipeline`)
STAGED = ("llama", "mistral", "qwen2", "qwen3")
# Model types whose `base_model_tp_plan` in transformers is this one, of which a rank was compared with the real program
CUT = (
    "llama", "mistral", "qwen2", "qwen3", "granite", "smollm3", "ministral", "ministral3", "seed_oss", "gemma",
    "gemma2", "gemma3_text", "exaone4", "cohere", "cohere2",
)  # fmt: skip
# Those of them whose blocks have two norms, before attention and before the MLP: NeMo Automodel's plan
SHARING_TOKENS = ("llama", "mistral", "qwen2", "granite", "smollm3", "ministral", "ministral3", "seed_oss")


def divided(model: A, ranks: int) -> A:
    """A model with the heads and the width of the MLP that one of so many tensor-parallel ranks has.

    Raises:
        UserError: they do not divide, or not the vocabulary.
    """
    for what in ("heads", "kv_heads", "intermediate", "vocab"):
        if getattr(model, what) % ranks:
            raise UserError(f"tp {ranks} does not divide the {what} of {model.name}, {getattr(model, what)}")
    heads, kv_heads = model.heads // ranks, model.kv_heads // ranks
    return replace(model, heads=heads, kv_heads=kv_heads, intermediate=model.intermediate // ranks)


def _normed(layer: Scope, name: str | None, x: Tensor) -> Tensor:
    return x if name is None else layer.norm(name, x)


def rope_table(config: Config) -> dict[str, Any]:
    """What a config says of its rotary positions, in the old form or the new; "type" was "rope_type" once."""
    table = config.table("rope_parameters", "rope_scaling")
    return {**table, "rope_type": table.get("rope_type", table.get("type", "default"))}
