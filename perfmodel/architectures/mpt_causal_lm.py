"""MPT as llm-foundry trains it: its own program beside transformers', `mpt_causal_lm` in its training files.

Learned positions, biases, norms in the dtype of autocast (`low_precision_layernorm`), attention in one kernel of
(batch, seq, heads, head_dim), the flash-attn package's cross entropy over logits as they are. Behind backward Composer
computes the loss twice more for its metrics, cross entropy and perplexity, by PyTorch's functions and so in fp32
(`use_train_metrics`; accuracy, which joined them later, is left out). `max_seq_len` is the size of the position table:
its benchmarks set it to the length.

With `attn_impl: triton` the kernel of 2022 runs, which takes as long with a causal mask as without one (forward:
github.com/Dao-AILab/flash-attention/issues/142; backward about half as fast as FlashAttention-2's, arXiv 2307.08691,
section 4.1). `flash` takes padding out and puts it back, which is left out, as are ALiBi and rotary positions.

Source: mosaicml/llm-foundry, llmfoundry/models/mpt/modeling_mpt.py, layers/{attention,blocks,ffn,norm}.py;
mosaicml/composer, trainer/trainer.py (`_eval_train_metrics`), metrics/nlp.py; flash-attn, losses/cross_entropy.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from ..program.dims import product
from ..setup import Setup
from ..tape import nn
from ..tape.attention import flash_attn
from ..tape.core import emit, record, tape
from ..tape.custom import autocasting
from ..tape.gather import clamp
from ..tape.packages.flash_attn import fused_cross_entropy
from ..tape.pointwise import add, cast, fill, gelu
from ..tape.scores import sum_all
from ..tape.shape import clone, narrow, split, unsqueeze, view, view_as
from ..tape.tensor import Parameter, Tensor
from . import masks
from .base import Architecture, Scope
from .config import Config
from .heads import beside_loss, lm_head
from .mpt import Mpt
from .registered import architecture
from .traits import Targets, Traits

METRICS = ("LanguageCrossEntropy", "LanguagePerplexity")


def low_precision_norm(parameter: Callable[[str], Parameter], x: Tensor, setup: Setup) -> Tensor:
    """`LPLayerNorm`: all of it in autocast's dtype, and autocast off."""
    low, given = tape().autocast, [x, parameter("weight"), parameter("bias")]
    x, weight, bias = (cast(t, low) for t in given) if low else given
    with autocasting(None):
        return nn.layer_norm(x, weight, bias)


@architecture("mpt_causal_lm")
@dataclass(frozen=True)
class MptCausalLM(Architecture):
    """Dims of an MPT of llm-foundry.

    Attributes:
        clips: whether queries, keys and values are clamped (`clip_qkv`).
        skips: whether the attention's kernel leaves out what the causal mask hides.
        measures: whether metrics of the training are computed.
    """

    clips: bool = False
    skips: bool = True
    measures: bool = True

    layer_path: ClassVar[str] = "transformer.blocks"
    traits: ClassVar[Traits] = Traits(
        head="causal", norm=low_precision_norm, norms=("norm_1", "norm_2", "norm_f"), targets=Targets(lora=("Wqkv",)),
        attention=("flash2",), reentrant=("flash2",), cache=None,
    )  # fmt: skip

    @classmethod
    def dims(cls, config: Config) -> dict[str, Any]:
        config.refuse(
            learned_pos_emb=True, no_bias=False, norm_type="low_precision_layernorm", expansion_ratio=4,
            tie_word_embeddings=True, resid_pdrop=0.0, emb_pdrop=0.0, logit_scale=None, embedding_fraction=1.0,
        )  # fmt: skip
        attention = Config(config.table("attn_config"), f"{config.origin}: attn_config", config.name)
        attention.refuse(
            attn_type="multihead_attention", attn_pdrop=0.0, alibi=False, rope=False, qk_ln=False, qk_gn=False,
            softmax_scale=None, attn_uses_sequence_id=False,
        )  # fmt: skip
        return {
            **Mpt.widths(config),
            "clips": attention.number("clip_qkv", None) is not None,
            "skips": attention.one_of("attn_impl", "flash", ("flash", "triton")) == "flash",
            "measures": config.flag("use_train_metrics", True),
        }

    def linear_names(self) -> list[str]:
        return ["attn.Wqkv", "attn.out_proj", "ffn.up_proj", "ffn.down_proj"]

    def forward(self, model: Scope, ids: Tensor, attention: Tensor, labels: Tensor) -> Tensor:
        model.begin("embeddings")
        masks.check_positions(model, attention.shape[1])
        assert self.max_positions is not None
        words = "transformer.wte"
        embedded = model.build.method.embedded(model, model.embedding(words, self.vocab, self.hidden, ids))
        positions = unsqueeze(fill("arange.start", (embedded.shape[1],), "i64"), 0)
        located = model.embedding("transformer.wpe", self.max_positions, self.hidden, positions)
        hidden = model.layers(self.block, add(embedded, located))
        model.begin("head")
        hidden = model.norm("transformer.norm_f", hidden)
        logits = beside_loss(model, lm_head(model, hidden, words, self.vocab))
        if not model.build.labelled:
            return logits
        if self.measures:
            model.build.after = partial(_measured, logits, labels)
        return _loss(logits, labels)

    def block(self, layer: Scope, x: Tensor) -> Tensor:
        """One decoder layer: (batch, seq, hidden) → the same."""
        normed = layer.norm("norm_1", x)
        x = add(x, layer.sublayer("attention", self.attention(layer, normed), x))
        normed = layer.norm("norm_2", x)
        return add(x, layer.sublayer("mlp", self.mlp(layer, normed), x))

    def attention(self, layer: Scope, x: Tensor) -> Tensor:
        """Multi-head attention from one fused projection."""
        fused = layer.linear("attn.Wqkv", x, 3 * self.hidden, bias=True)
        if self.clips:
            fused = clamp(fused, low=True, high=True)
        shape = (*x.shape[:-1], self.heads, self.head_dim)
        q, k, v = (view(y, shape) for y in split(fused, [self.hidden] * 3, 2))
        with tape().belonging_to("attention"):
            out = view(flash_attn(q, k, v, causal=self.skips), x.shape)
        return layer.linear("attn.out_proj", out, self.hidden, bias=True)

    def mlp(self, layer: Scope, x: Tensor) -> Tensor:
        """Two linear layers with GELU between."""
        x = gelu(layer.linear("ffn.up_proj", x, self.intermediate, bias=True))
        return layer.linear("ffn.down_proj", x, self.hidden, bias=True)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of (batch, seq, vocab) logits as they are: labels are rolled by one, the last of a sample left out."""
    targets = emit("roll", (labels,), labels.shape, "i64")
    _ignore_last(targets)
    return fused_cross_entropy(_flat(logits), view(targets, (targets.numel,)))


def _measured(logits: Tensor, labels: Tensor) -> None:
    """The metrics of a micro-batch, under autocast: labels move by one in place, then the loss once for each."""
    seq = labels.shape[1]
    record("copy_", (narrow(labels, 1, seq - 1), clone(narrow(labels, 1, seq - 1))), (narrow(labels, 1, seq - 1),))
    _ignore_last(labels)
    targets = view(labels, (labels.numel,))
    with tape().autocasting():
        for _ in METRICS:
            loss = nn.cross_entropy(_flat(logits), targets)
            counted = sum_all(emit("ne.Scalar", (targets,), targets.shape, "bool"))
            record("add_.Tensor", (masks.model_buffer(()), counted), (masks.model_buffer(()),))
            record("add_.Tensor", (masks.model_buffer((), "fp32"), loss), (masks.model_buffer((), "fp32"),))


def _ignore_last(labels: Tensor) -> None:
    """`labels[:, -1] = -100`."""
    batch, seq = labels.shape
    last = view_as("select.int", labels, (batch,), (seq,))
    record("fill_.Tensor", (last, masks.model_buffer(())), (last,))


def _flat(logits: Tensor) -> Tensor:
    return view(logits, (product(logits.shape[:-1]), logits.shape[-1]))
