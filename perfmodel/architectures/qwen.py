"""Qwen (the first, of 2023, as Qwen-1.8B and Qwen-7B): its own program beside transformers.

Fused qkv with a bias, RMSNorm, rotary positions in fp32, SwiGLU, logits in the dtype of the weights. With the
flash-attn package (attention flash2) it takes that package's norm and rotary kernels too, as its authors' image has
them: docker/Dockerfile installs flash-attn 2.3.3 with csrc/layer_norm. Without it, scaled_dot_product_attention under a
mask that every block makes anew.

Source: https://huggingface.co/Qwen/Qwen-7B/blob/main/modeling_qwen.py;
https://github.com/QwenLM/Qwen/blob/6c467b507b/docker/Dockerfile.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import UserError
from ..program.dims import decide
from ..setup import Setup
from ..tape.attention import flash_attn, sdpa_attention
from ..tape.core import emit, tape
from ..tape.nn import cross_entropy
from ..tape.packages import flash_attn as package
from ..tape.pointwise import add, cast, cat, fill, mul, neg, silu
from ..tape.prefix import unbind_pair
from ..tape.shape import contiguous, expand, narrow, split, squeeze, transpose, unsqueeze, view, view_as
from ..tape.tensor import Parameter, Tensor
from . import masks
from .base import Architecture, Scope
from .config import Config
from .heads import beside_loss, lm_head
from .norms import rms_norm
from .registered import architecture
from .traits import Traits


def _norm(parameter: Callable[[str], Parameter], x: Tensor, setup: Setup) -> Tensor:
    """`RMSNorm`: flash-attn's kernel where it is there, else as transformers writes it out."""
    return package.rms_norm(x, parameter("weight")) if setup.attention == "flash2" else rms_norm(parameter, x, setup)


@architecture("qwen")
@dataclass(frozen=True)
class Qwen(Architecture):
    """Dims of a Qwen of 2023.

    Attributes:
        linear_bias: whether linear layers other than the fused qkv have a bias (`no_bias` false).
    """

    linear_bias: bool = False

    layer_path: ClassVar[str] = "transformer.h"
    traits: ClassVar[Traits] = Traits(
        head="causal", norm=_norm, norms=("ln_1", "ln_2", "ln_f"), attention=("sdpa", "flash2"), cache=None
    )

    @classmethod
    def dims(cls, config: Config) -> dict[str, Any]:
        hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
        head_dim = config.divide("hidden_size", "num_attention_heads", hidden, heads)
        config.refuse(
            kv_channels=head_dim, rotary_pct=1.0, emb_dropout_prob=0.0, attn_dropout_prob=0.0,
            tie_word_embeddings=False, fp32=False,
        )  # fmt: skip
        config.check_rotary("head_dim", head_dim)
        return {
            "layers": config.count("num_hidden_layers"),
            "hidden": hidden,
            "heads": heads,
            "kv_heads": heads,
            "head_dim": head_dim,
            "intermediate": config.divide("intermediate_size", "2", config.count("intermediate_size"), 2),
            "vocab": config.count("vocab_size"),
            "max_positions": None,
            "tied": False,
            "linear_bias": not config.flag("no_bias", True),
        }

    def linear_names(self) -> list[str]:
        return ["attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj"]

    def forward(self, model: Scope, ids: Tensor, attention: Tensor, labels: Tensor) -> Tensor:
        setup = model.build.setup
        if setup.attention == "flash2" and setup.dtype == "fp32":
            raise UserError(f"attention flash2: {self.name}'s program takes it with 16-bit weights only; use sdpa")
        model.begin("embeddings")
        embedded = model.embedding("transformer.wte", self.vocab, self.hidden, ids)
        embedded = model.build.method.embedded(model, embedded)
        seq = embedded.shape[1]
        if decide(seq < 2):
            raise UserError(f"seq 1: {self.name} learns each token from the one before; use --seq 2 or more")
        fill("arange.start", (seq,), "i64")  # position ids, which nothing reads
        mask = _additive_mask(attention, setup.dtype)
        tables = (masks.model_buffer((1, seq, 1, self.head_dim), "fp32") for _ in range(2))  # kept between steps
        hidden = model.layers(self.block, embedded, mask, *tables)
        model.begin("head")
        hidden = model.norm("transformer.ln_f", hidden)
        logits = beside_loss(model, lm_head(model, hidden, "transformer.wte", self.vocab))
        return _loss(logits, labels) if model.build.labelled else logits

    def block(self, layer: Scope, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """One decoder layer: (batch, seq, hidden) → the same."""
        residual = x
        x = self.attention(layer, layer.norm("ln_1", x), mask, cos, sin)
        x = add(layer.sublayer("attention", x, residual), residual)
        residual = x
        x = self.mlp(layer, layer.norm("ln_2", x))
        return add(residual, layer.sublayer("mlp", x, residual))

    def attention(self, layer: Scope, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Multi-head attention from one fused projection, with rotary positions."""
        fused = layer.linear("attn.c_attn", x, 3 * self.hidden, bias=True)
        q, k, v = (view(y, (*x.shape[:-1], self.heads, self.head_dim)) for y in split(fused, [self.hidden] * 3, 2))
        del fused
        flash = layer.build.setup.attention == "flash2"
        rotate = _rotate_fused if flash else _rotate
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        with tape().belonging_to("attention"):
            out = flash_attn(q, k, v, causal=True) if flash else _masked_attention(q, k, v, mask)
        out = view(contiguous(out), x.shape)
        return layer.linear("attn.c_proj", out, self.hidden, bias=self.linear_bias)

    def mlp(self, layer: Scope, x: Tensor) -> Tensor:
        """SwiGLU: w1·x times silu(w2·x)."""
        up = layer.linear("mlp.w1", x, self.intermediate, bias=self.linear_bias)
        gate = silu(layer.linear("mlp.w2", x, self.intermediate, bias=self.linear_bias))
        up = mul(up, gate)
        del gate
        return layer.linear("mlp.c_proj", up, self.hidden, bias=self.linear_bias)


def _additive_mask(attention: Tensor, dtype: str) -> Tensor:
    """`(1 - mask) * lowest` of a (batch, keys) mask, as (batch, 1, 1, keys), which flash-attn does not read."""
    keys = cast(unsqueeze(unsqueeze(attention, 1), 2), dtype)
    return mul(emit("rsub.Scalar", (keys,), keys.shape, dtype), 1.0)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of (batch, seq, heads, head_dim), in fp32; what is left of a head (nothing) is joined again."""
    dtype, x = x.dtype, cast(x, "fp32")
    passed = narrow(x, -1, 0)
    pairs = view(x, (*x.shape[:-1], 2, x.shape[-1] // 2))
    first, second = unbind_pair(pairs, -2)
    half = cat((neg(second), first), -1)
    return cast(cat((add(mul(x, cos), mul(half, sin)), passed), -1), dtype)


def _rotate_fused(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """flash-attn's kernel on fp32 copies."""
    halves = (narrow(squeeze(squeeze(table, 0), 1), -1, table.shape[-1] // 2) for table in (cos, sin))
    return cast(package.rotary(cast(x, "fp32"), *halves), x.dtype)


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """`scaled_dot_product_attention` under a causal mask that is made here; (b, s, h, d) in and out."""
    square = (q.shape[1], q.shape[1])
    causal = emit("tril", (fill("ones", square, "bool"),), square, "bool")
    causal = view(causal, (1, 1, *square))
    q, k, v = (transpose(x, 1, 2) for x in (q, k, v))
    mask = expand(mask, (mask.shape[0], 1, *square))
    hidden = emit("bitwise_not", (causal,), causal.shape, "bool")
    mask = emit("masked_fill.Scalar", (mask, hidden), mask.shape, mask.dtype)
    return sdpa_attention(q, k, v, mask, causal=False, p=0.0)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of the logits as they are, all but the last against all but the first label."""
    batch, seq, vocab = logits.shape
    kept = contiguous(narrow(logits, 1, seq - 1))
    target = contiguous(view_as("slice.Tensor", labels, (batch, seq - 1), labels.strides))
    rows = batch * (seq - 1)
    return cross_entropy(view(kept, (rows, vocab)), view(target, (rows,)))
