"""Llama and its kin as Megatron-Core trains them: `GPTModel` of Transformer Engine's layers, one QKV, one gate and up.

A model of transformers becomes it by `megatron:` before its name, as Megatron-Bridge makes it of one. Weights are bf16
beside fp32 gradients and masters. Attention takes Transformer Engine's fused kernel, priced as the one that PyTorch
picks; the cross entropy is Megatron's native fused one. Of a LoRA the adapters are Megatron-Bridge's
(`ParallelLinearAdapter`).

Source: megatron-core 0.16.1, models/gpt/gpt_model.py, transformer/{transformer_layer,attention,mlp}.py,
tensor_parallel/layers.py, pipeline_parallel/schedules.py; megatron-bridge 0.3.1, recipes/llama/llama3.py.
"""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from ..errors import UserError
from ..program.dims import product
from ..program.ranks import Ranks
from ..tape.attention import fused_attention
from ..tape.core import emit, tape
from ..tape.elementary import div
from ..tape.gather import clamp
from ..tape.packages import megatron
from ..tape.packages.megatron import used
from ..tape.packages.megatron_model import fused_rotary, swiglu, vocab_parallel_loss, with_residual, words
from ..tape.pointwise import add, cast, cat, mul
from ..tape.scores import sum_all
from ..tape.shape import clone, contiguous, reshape, split, transpose, unsqueeze, view
from ..tape.tensor import Parameter, Tensor
from . import masks
from .base import Architecture, Linear, Scope
from .config import MEGATRON, Config
from .heads import beside_loss
from .llama import divided
from .norms import rms_norm
from .registered import architecture, from_config
from .rewrites import Pair
from .traits import Targets, Traits

LAYERS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")  # Megatron-Bridge's targets (`peft/lora.py`)
FORMS = ("llama", "mistral", "qwen2", "qwen3")  # model types that Megatron-Bridge turns into this program


@architecture("megatron_gpt")
@dataclass(frozen=True, eq=False, repr=False)
class MegatronGpt(Architecture):
    """Dims of a GPT of Megatron-Core.

    Attributes:
        qkv_bias, head_norms: whether queries, keys and values have a bias; whether heads of the first two are normed.
    """

    qkv_bias: bool = False
    head_norms: bool = False

    of_megatron: ClassVar[bool] = True
    layer_path: ClassVar[str] = "decoder.layers"
    registers_late: ClassVar[tuple[str, ...]] = ("self_attention.linear_qkv",)
    traits: ClassVar[Traits] = Traits(
        head="causal", norm=rms_norm, norms=("layer_norm_weight", "final_layernorm"),
        targets=Targets(lora=LAYERS), attention=("sdpa",), reentrant=("sdpa",), cache=None,
    )  # fmt: skip

    @classmethod
    def dims(cls, config: Config) -> dict[str, Any]:
        config.one_of(MEGATRON, "", FORMS)
        values = {**config.values, "model_type": config.values[MEGATRON]}
        given = from_config(Config(values, config.origin, config.name))
        if given.classifier is not None or any(given.window_of(i) for i in range(given.layers)):
            what = "a classifier" if given.classifier is not None else "a sliding window"
            raise UserError(f"{config.origin}: {what} is not modelled in Megatron-Core's program")
        known = {f.name for f in fields(Architecture)} - {"name", "model_type", "note", "classifier"}
        biases = {"qkv_bias": getattr(given, "qkv_bias", False), "head_norms": config.values[MEGATRON] == "qwen3"}
        return {**{name: getattr(given, name) for name in known}, **biases}

    def linear_names(self) -> list[str]:
        return ["self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"]

    def cuts(self, name: str) -> str:
        return "columns" if name.endswith(("linear_qkv", "linear_fc1")) else "rows"

    def part_of(self, ranks: int) -> Self:
        return divided(self, ranks)

    def staged(self) -> None:
        if self.tied:
            raise UserError(f"pp: {self.name} shares one weight between its embedding and its head: use --pp 1")

    def forward(self, model: Scope, ids: Tensor, attention: Tensor, labels: Tensor) -> Tensor:
        model.begin("embeddings")
        shared, setup, given = shared_of(model), model.build.setup, model.build.received
        if given is None:  # a local of `GPTModel.forward`, so there until it returns
            given = words(self._rows(model, "embedding.word_embeddings.weight", "embedding"), ids, shared)
            given.requires_grad |= setup.checkpoint != "none"  # `maybe_enable_recompute_inputs_grad` of frozen words
        turns = masks.model_buffer((setup.seq, 1, 1, self.head_dim), "fp32")
        x = model.layers(self.block, given, turns)
        model.begin("head")
        if not model.build.ends:
            return x
        x = megatron.rms_norm(x, used(model.parameter("decoder.final_layernorm.weight", (self.hidden,), "norm")))
        name, kind = ("embedding.word_embeddings", "embedding") if self.tied else ("output_layer", "weight")
        weight = self._rows(model, f"{name}.weight", kind)
        logits = beside_loss(model, megatron.shared_linear(x, weight, "columns", shared))
        losses = vocab_parallel_loss(logits, contiguous(transpose(labels, 0, 1)), shared)
        return _mean(contiguous(transpose(losses, 0, 1)))

    def _rows(self, model: Scope, name: str, kind: str) -> Parameter:
        """A weight of which each rank has a part of the vocabulary."""
        ranks = model.build.setup.tp
        weight = model.parameter(name, (self.vocab // ranks, self.hidden), kind)
        weight.elements = weight.numel * ranks
        return used(weight)

    def block(self, layer: Scope, x: Tensor, turns: Tensor) -> Tensor:
        """One decoder layer: (seq, batch, hidden) → the same, of shared tokens a rank's own."""
        x = with_residual(self.attention(layer, x, turns), x)
        gated = swiglu(self.columns(layer, "mlp.linear_fc1", x, 2 * self.intermediate))
        return with_residual(self.rows(layer, "mlp.linear_fc2", gated), x)

    def attention(self, layer: Scope, x: Tensor, turns: Tensor) -> Tensor:
        """Grouped-query attention of this rank's heads, summed over ranks."""
        group, d = self.heads // self.kv_heads, self.head_dim
        fused = self.columns(layer, "self_attention.linear_qkv", x, (self.heads + 2 * self.kv_heads) * d)
        fused = view(fused, (*fused.shape[:2], self.kv_heads, (group + 2) * d))
        q, k, v = split(fused, [group * d, d, d], 3)
        q = reshape(q, (*q.shape[:2], self.heads, d))
        if self.head_norms:
            q, k = (self.head_norm(layer, name, y) for name, y in (("q", q), ("k", k)))
        q, k = fused_rotary(q, turns), fused_rotary(k, turns)
        with tape().belonging_to("attention"):
            q, k, v = (transpose(transpose(y, 0, 1), 1, 2) for y in (q, k, contiguous(v)))
            out = transpose(transpose(fused_attention(q, k, v), 1, 2), 0, 1)
        out = reshape(out, (*out.shape[:2], self.heads * d))
        return self.rows(layer, "self_attention.linear_proj", out)

    def head_norm(self, layer: Scope, name: str, y: Tensor) -> Tensor:
        """The norm of each head of queries (q) or keys (k)."""
        path = f"self_attention.{name}_layernorm.weight"
        return megatron.rms_norm(contiguous(y), used(layer.parameter(path, (self.head_dim,), "norm")))

    def columns(self, layer: Scope, name: str, x: Tensor, width: Any) -> Tensor:
        """A norm and a linear layer that is cut by columns, with what the method puts beside it."""
        shared, of = shared_of(layer), layer.linear_layer(name, x.shape[-1], width)
        norm = used(layer.parameter(f"{name}.layer_norm_weight", (x.shape[-1],), "norm"))
        biased = self.qkv_bias and name.endswith("linear_qkv")
        bias = of.cut.counted(used(layer.parameter(f"{name}.bias", (width,), "bias"))) if biased else None
        weight, pair = _weight(of), layer.build.method.pair(of)
        out, given = megatron.norm_linear(x, norm, weight, bias, shared, gives_input=pair is not None)
        return out if pair is None else _adapted(out, given, pair, "columns", shared)

    def rows(self, layer: Scope, name: str, x: Tensor) -> Tensor:
        """A linear layer that is cut by rows, with what the method puts beside it."""
        shared, of = shared_of(layer), layer.linear_layer(name, x.shape[-1], self.hidden)
        weight, pair = _weight(of), layer.build.method.pair(of)
        out = megatron.shared_linear(x, weight, "rows", shared)
        return out if pair is None else _adapted(out, x, pair, "rows", shared)


def shared_of(scope: Scope) -> megatron.LayerRanks:
    """The ranks that share layers."""
    setup = scope.build.setup
    return megatron.LayerRanks(Ranks(setup.tp), setup.sequence_parallel)


def _weight(layer: Linear) -> Parameter:
    return layer.cut.counted(used(layer.scope.parameter(f"{layer.name}.weight", (layer.n_out, layer.n_in), "weight")))


def _adapted(out: Tensor, x: Tensor | None, pair: Pair, by: str, shared: megatron.LayerRanks) -> Tensor:
    assert x is not None
    with tape().belonging_to("adapter"):
        return add(out, megatron.beside(x, *pair, by, shared))


def _mean(losses: Tensor) -> Tensor:
    """`loss_func` of (batch, seq) losses: their sum where the mask is 1, by how many those are, and what is logged."""
    count = product(losses.shape)
    mask = masks.model_buffer((count,), "fp32")
    loss = sum_all(mul(view(losses, (count,)), mask))
    tokens = cast(emit("clone", (sum_all(mask),), (), "fp32"), "i32")
    cat((unsqueeze(clone(loss.alias()), 0), cast(unsqueeze(tokens, 0), "fp32")), 0)
    return div(loss, clamp(tokens, low=True))
