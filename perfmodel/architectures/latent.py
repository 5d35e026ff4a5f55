"""Multi-head latent attention, and mixtures with experts that every token goes to: what DeepSeek's kin share.

Queries, and keys with values, are expanded from latents of low rank; some dims of a head turn with the position, in
keys the same ones for all heads. Behind the first blocks, whose MLPs are dense, a router (its weight always in fp32)
chooses groups of experts first.
Source: transformers/models/deepseek_v3/modeling_deepseek_v3.py.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from ..errors import UserError
from ..program.dims import product
from ..tape.core import tape
from ..tape.gather import mark, top_values, zeros_like
from ..tape.inplace import put_in_part
from ..tape.linalg import linear
from ..tape.pointwise import add, cast, cat, fill, unary
from ..tape.shape import expand, narrow, reshape, split, transpose, unsqueeze, view
from ..tape.tensor import Tensor
from .attend import attend
from .base import Scope
from .config import Config
from .llama import Llama, Masks
from .moe import STACKED, Mixture
from .traits import Targets, Traits

SHARED = "mlp.shared_experts"  # the MLP of the experts that every token goes to, as one


@dataclass(frozen=True)
class Latent(Mixture):
    """Dims of a model of DeepSeek's kind; `rotary` dims of a query's or key's `head_dim` turn.

    Attributes:
        q_rank, kv_rank: widths of the latents of queries, and of keys with values; None: queries have none.
        v_dim: width of a head's values.
        dense: the blocks whose MLP is no mixture.
        shared: width of the MLP beside the experts.
        groups, top_groups: groups of experts, and how many of them a token may go to.
        normalised: whether the weights of a token's experts add up to 1.
    """

    q_rank: int | None = None
    kv_rank: int = 0
    v_dim: int = 0
    dense: tuple[int, ...] = ()
    shared: int = 0
    groups: int = 1
    top_groups: int = 1
    normalised: bool = False

    traits: ClassVar[Traits] = replace(
        Llama.traits,
        norms=(*Llama.traits.norms, "q_a_layernorm", "kv_a_layernorm"),
        targets=Targets(),
        fused=(),
        stacked=STACKED,
        four_dims=("kv_b_proj",),
        cache=None,  # which holds latents, of other sizes than PEFT's virtual tokens
    )

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        heads, kv_heads = config.count("num_attention_heads"), config.values.get("num_key_value_heads")
        if kv_heads not in (None, heads):
            raise UserError(
                f"{config.origin}: num_key_value_heads {kv_heads} must be num_attention_heads, {heads}: latents are "
                "expanded to keys and values of all heads"
            )

    @classmethod
    def head_width(cls, config: Config, hidden: int, heads: int) -> int:
        return cls.count(config, "qk_nope_head_dim", 0) + cls.count(config, "qk_rope_head_dim", 0)

    @classmethod
    def widths(cls, config: Config) -> dict[str, Any]:
        width = cls.count(config, "moe_intermediate_size", 0)
        dims = {
            **super().widths(config),
            "q_rank": cls.count(config, "q_lora_rank", 0) or None,
            "kv_rank": cls.count(config, "kv_lora_rank", 0),
            "rotary": cls.count(config, "qk_rope_head_dim", 0),
            "v_dim": cls.count(config, "v_head_dim", 0),
            "expert_width": width,
            "shared": width * cls.count(config, "n_shared_experts", 0),
        }
        config.check_rotary("qk_rope_head_dim", dims["rotary"])
        return {**dims, "dense": cls.dense_blocks(config, dims["layers"])}

    @classmethod
    def dense_blocks(cls, config: Config, layers: int) -> tuple[int, ...]:
        """The blocks whose MLP is no mixture: the first so many."""
        given = config.count("first_k_dense_replace", default=cls.defaults.get("first_k_dense_replace", 0), least=0)
        return tuple(range(min(given, layers)))

    @classmethod
    def grouped(cls, config: Config, experts: int, least: int) -> dict[str, Any]:
        """The groups of experts, of at least so many each, and how many a token may go to."""
        groups, chosen = cls.count(config, "n_group", 0), cls.count(config, "topk_group", 0)
        if not (0 < chosen <= groups and experts % groups == 0 and experts // groups >= least):
            raise UserError(
                f"{config.origin}: n_group {groups} must divide the {experts} experts into groups of {least} or more, "
                f"of which topk_group, {chosen}, are chosen"
            )
        return {"groups": groups, "top_groups": chosen}

    @classmethod
    def biases(cls, config: Config) -> dict[str, Any]:
        bias = config.flag("attention_bias", False)
        return {"qkv_bias": bias, "output_bias": bias}

    def is_mixture(self, layer: int) -> bool:
        return layer not in self.dense

    def linear_names(self) -> list[str]:
        queries = ["q_a_proj", "q_b_proj"] if self.q_rank else ["q_proj"]
        names = [f"self_attn.{name}" for name in (*queries, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")]
        mlps = [path for path, there in (("mlp", self.dense), (SHARED, len(self.dense) < self.layers)) if there]
        return names + [f"{path}.{name}_proj" for path in mlps for name in ("gate", "up", "down")]

    def attention(self, layer: Scope, x: Tensor, mask_of: Masks, cos: Tensor, sin: Tensor) -> Any:
        assert self.rotary is not None
        batch, seq = x.shape[:2]
        q = self.queries(layer, x)
        q_pass, q_rot = split(q, (self.head_dim - self.rotary, self.rotary), -1)
        compressed = layer.linear("self_attn.kv_a_proj_with_mqa", x, self.kv_rank + self.rotary, bias=self.qkv_bias)
        latent, k_rot = split(compressed, (self.kv_rank, self.rotary), -1)
        latent = view(layer.norm("self_attn.kv_a_layernorm", latent), (batch, 1, seq, self.kv_rank))
        k_rot = view(k_rot, (batch, 1, seq, self.rotary))
        q_rot, k_rot = self.rotated(layer, q_rot, k_rot, cos, sin)
        query = cat((q_pass, q_rot), -1)
        k, v = self.expanded(layer, latent, k_rot)
        mask = mask_of[self.reach(layer.index)]
        out, weights = attend(layer, query, k, v, mask, causal=True, form="upcast", p=self.attention_dropout)
        out = reshape(out, (batch, seq, self.heads * self.v_dim))
        return layer.linear("self_attn.o_proj", out, self.hidden, bias=self.output_bias), weights

    def queries(self, layer: Scope, x: Tensor) -> Tensor:
        """(batch, heads, seq, head_dim), through their latent if they have one."""
        if self.q_rank:
            x = layer.norm(
                "self_attn.q_a_layernorm", layer.linear("self_attn.q_a_proj", x, self.q_rank, bias=self.qkv_bias)
            )
        q = layer.linear(f"self_attn.q_{'b_' if self.q_rank else ''}proj", x, self.heads * self.head_dim)
        return transpose(view(q, (*q.shape[:-1], self.heads, self.head_dim)), 1, 2)

    def expanded(self, layer: Scope, latent: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        """`expand_kv`: keys and values of all heads from a latent and the turned dims, both (batch, 1, seq, …)."""
        plain, batch, seq = self.head_dim - k_rot.shape[-1], latent.shape[0], latent.shape[2]
        kv = layer.linear("self_attn.kv_b_proj", latent, self.heads * (plain + self.v_dim))
        kv = transpose(view(kv, (batch, seq, self.heads, plain + self.v_dim)), 1, 2)
        k_plain, v = split(kv, (plain, self.v_dim), -1)
        k_rot = expand(k_rot, (batch, self.heads, seq, k_rot.shape[-1]))
        k = fill("new_empty", (batch, self.heads, seq, self.head_dim), kv.dtype, kv)
        for part in (k_plain, k_rot):
            k = put_in_part(k, partial(narrow, dim=-1, size=part.shape[-1]), part)
        return k, v

    def mixture(self, layer: Scope, x: Tensor) -> Tensor:
        flat = (product(x.shape[:-1]), self.hidden)
        weights, chosen = self.route(layer, view(x, flat))
        routed = view(self.run_experts(layer, view(x, flat), weights, chosen), x.shape)
        tape().part.host.modules += 2  # the shared MLP and its activation
        return add(routed, self.gated_mlp(layer, x, SHARED, self.shared))

    def logits(self, layer: Scope, x: Tensor) -> Tensor:
        """The router's, in fp32: (tokens, hidden) → (tokens, experts)."""
        tape().part.host.modules += 1
        weight = layer.stacked(f"{self.router}.weight", (self.experts, self.hidden), kept="fp32")
        return linear(cast(x, "fp32"), cast(weight, "fp32"))

    def by_group(self, scores: Tensor) -> Tensor:
        """(tokens, experts) → (tokens, groups, experts of one)."""
        return view(scores, (scores.shape[0], self.groups, self.experts // self.groups))

    def outside(self, best: Tensor) -> Tensor:
        """Whether an expert, (tokens, experts), is of none of the groups that `best`, (tokens, groups), chooses."""
        _, chosen = top_values(best, self.top_groups)
        flags = zeros_like(best)
        mark(flags, chosen)
        each = expand(unsqueeze(flags, -1), (*best.shape, self.experts // self.groups))
        return unary("bitwise_not", cast(reshape(each, (best.shape[0], self.experts)), "bool"))
