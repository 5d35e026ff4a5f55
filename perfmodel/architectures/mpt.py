"""MPT as transformers has it: ALiBi instead of positions, fused qkv, norms without biases, no biases at all.

Its attention is written out: scores are turned to fp32 by the bias that is added to them. What MosaicML's own code
can besides (`attn_impl`, learned positions, biases) transformers leaves out: it is another program (`mpt_causal_lm`).
Source: transformers/models/mpt/modeling_mpt.py.
"""

from dataclasses import dataclass
from math import ceil, log2
from typing import Any, ClassVar

from ..tape.core import tape
from ..tape.gather import clamp, fill_where
from ..tape.linalg import matmul
from ..tape.nn import softmax
from ..tape.pointwise import add, cast, cat, dropout, fill, gelu, mul, unary
from ..tape.shape import contiguous, narrow, permute, reshape, split, squeeze, transpose, view
from ..tape.tensor import Tensor
from . import masks
from .attend import extended
from .base import Architecture, Scope
from .config import Config
from .heads import decoder_loss
from .norms import layer_norm_without_bias
from .registered import architecture
from .traits import Targets, Traits


@architecture("mpt")
@dataclass(frozen=True)
class Mpt(Architecture):
    """Dims of an MPT.

    Attributes:
        residual_dropout: of attention's probabilities and behind both halves of a block (`attn_pdrop`).
        clips: whether queries, keys and values are clamped (`clip_qkv`).
    """

    residual_dropout: float = 0.0
    clips: bool = False

    layer_path: ClassVar[str] = "transformer.blocks"
    traits: ClassVar[Traits] = Traits(
        head="causal",
        heads=("sequence", "token"),
        token_head=("classifier", False),
        norm=layer_norm_without_bias,
        norms=("norm_1", "norm_2", "norm_f"),
        targets=Targets(lora=("Wqkv",), fourierft=("Wqkv",), s2ft=("out_proj", "down_proj")),
        attention=("eager",),
        reentrant=(),
    )

    @classmethod
    def dims(cls, config: Config) -> dict[str, Any]:
        attention = Config(config.table("attn_config"), f"{config.origin}: attn_config", config.name)
        return {
            **cls.widths(config),
            "residual_dropout": attention.fraction("attn_pdrop", 0.0),
            "clips": attention.number("clip_qkv", None) is not None,
        }

    @classmethod
    def widths(cls, config: Config) -> dict[str, Any]:
        """Numbers of layers and heads, widths."""
        hidden, heads = config.count("d_model", "hidden_size"), config.count("n_heads", "num_attention_heads")
        return {
            "layers": config.count("n_layers", "num_hidden_layers"),
            "hidden": hidden,
            "heads": heads,
            "kv_heads": heads,
            "head_dim": config.divide("d_model", "n_heads", hidden, heads),
            "intermediate": 4 * hidden,  # whatever `expansion_ratio` says
            "vocab": config.count("vocab_size"),
            "max_positions": config.count("max_seq_len"),
            "tied": config.flag("tie_word_embeddings", True),
        }

    def linear_names(self) -> list[str]:
        return ["attn.Wqkv", "attn.out_proj", "ffn.up_proj", "ffn.down_proj"]

    def forward(self, model: Scope, ids: Tensor, attention: Tensor, labels: Tensor) -> Tensor:
        model.begin("embeddings")
        hidden = self._decoder(model, ids, attention)
        return decoder_loss(model, hidden, ids, labels, "transformer.wte")

    def _decoder(self, model: Scope, ids: Tensor, attention: Tensor) -> Tensor:
        setup = model.build.setup
        masks.check_positions(model, attention.shape[1], "positions (max_seq_len)")
        hidden = model.build.method.embedded(model, model.embedding("transformer.wte", self.vocab, self.hidden, ids))
        seq = hidden.shape[1]
        assert self.max_positions is not None
        bias = _alibi(self.heads, self.max_positions)
        mask = masks.causal_mask(attention, seq, "eager", hidden.dtype, None, padded=setup.explicit_mask)
        assert mask is not None
        hidden = model.layers(self.block, hidden, cast(mask, "bool"), bias)
        model.begin("head")
        return model.norm("transformer.norm_f", hidden)

    def block(self, layer: Scope, x: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        """One decoder layer: (batch, seq, hidden) → the same."""
        normed = layer.norm("norm_1", x)
        residual = x
        attended, _ = self.attention(layer, normed, mask, bias)
        attended = layer.sublayer("attention", attended, residual)
        x = add(dropout(attended, self.residual_dropout), residual)
        normed = layer.norm("norm_2", x)
        residual = x
        x = layer.sublayer("mlp", self.mlp(layer, normed), residual)
        return add(dropout(x, self.residual_dropout), residual)

    def attention(self, layer: Scope, x: Tensor, mask: Tensor, bias: Tensor) -> Any:
        """Multi-head attention with a bias by distance, from one fused projection; also returns the weights."""
        batch, seq, _ = x.shape
        fused = layer.linear("attn.Wqkv", x, 3 * self.hidden)
        if self.clips:
            fused = clamp(fused, low=True, high=True)
        q, k, v = (
            transpose(reshape(y, (batch, seq, self.heads, self.head_dim)), 1, 2)
            for y in split(fused, [self.hidden] * 3, 2)
        )
        k, v = extended(layer, k, v)
        with tape().belonging_to("attention"):
            scores = mul(matmul(q, transpose(k, -1, -2)), self.head_dim**-0.5)
            scores = fill_where(add(scores, narrow(bias, 2, k.shape[-2])), mask)
            weights = dropout(cast(softmax(cast(scores, "fp32")), v.dtype), self.residual_dropout)
            out = contiguous(permute(matmul(weights, v), (0, 2, 1, 3)))
        return layer.linear("attn.out_proj", view(out, (batch, seq, self.hidden)), self.hidden), weights

    def mlp(self, layer: Scope, x: Tensor) -> Tensor:
        """Two linear layers with GELU between."""
        return layer.linear("ffn.down_proj", gelu(layer.linear("ffn.up_proj", x, self.intermediate)), self.hidden)


def _alibi(heads: int, longest: int) -> Tensor:
    """What is added to a head's scores of a key, by how far it is from the last: (heads, 1, longest).

    It is of all positions that the model has, whatever the batch has (`build_mpt_alibi_tensor`).
    """
    alibi = view(fill("arange.start", (longest,), "i32"), (1, 1, 1, longest))
    n = 2 ** ceil(log2(heads))
    base = mul(cast(fill("arange.start", (n,), "i64"), "fp32"), 8 / n)
    slopes = view(mul(unary("reciprocal", unary("pow.Scalar", base)), 1.0), (1, n, 1, 1))
    if n != heads:
        slopes = narrow(cat((narrow(slopes, 1, n // 2, 2), narrow(slopes, 1, n // 2, 2)), 1), 1, heads)
    return squeeze(mul(alibi, slopes), 0)
