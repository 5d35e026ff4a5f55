"""Mixture of experts: a router sends every token to a few of many MLPs. What the architectures that have one share.

transformers keeps the weights of all experts of a block in one tensor and runs them as `experts_implementation` says;
its default, on any device, are grouped products over tokens that were sorted by expert; "eager" is a loop over the
experts that are hit, which reads on the host who they are.
Source: transformers/integrations/moe.py (`grouped_mm_experts_forward`), the `forward` of each model's experts.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import UserError
from ..program.dims import product
from ..program.op import Attrs
from ..program.routing import Routing, exponent_of
from ..tape.core import emit, tape
from ..tape.elementary import sum_dim
from ..tape.gather import picked, rows_of, top_values, zeros_like
from ..tape.grouped import ends_of_groups, grouped_mm, inverse_order, one_hot, sort_values
from ..tape.inplace import add_rows, divide_in_place
from ..tape.linalg import linear
from ..tape.nn import softmax
from ..tape.pointwise import cast, mul
from ..tape.scores import unbound
from ..tape.shape import permute, split, transpose, unsqueeze, view
from ..tape.split import select
from ..tape.tensor import Tensor
from .base import Scope
from .config import Config
from .llama import Llama
from .masks import read_scalar

# PEFT's table for Qwen's kind (`_MOE_TARGET_MODULE_MAPPING`)
STACKED = (
    ("gate", "gate.weight"), ("gate_proj", "gate_up_proj"), ("up_proj", "gate_up_proj"), ("down_proj", "down_proj"),
)  # fmt: skip


@dataclass(frozen=True)
class Mixture(Llama):
    """Dims of a Llama whose MLPs, all or some, are mixtures of experts.

    Attributes:
        experts: MLPs of a mixture.
        top_k: experts that a token goes to.
        expert_width: width of one of them.
    """

    experts: int = 0
    top_k: int = 0
    expert_width: int = 0

    router: ClassVar[str] = "mlp.gate"  # its name in a block
    masked: ClassVar[int] = 1  # numbers behind those of the experts that the loop over them knows, and skips
    counted: ClassVar[tuple[str, ...]] = ("num_experts", "num_local_experts")  # keys of one number; the last by default

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        config.refuse(output_router_logits=False)  # an auxiliary loss on the loads

    @classmethod
    def widths(cls, config: Config) -> dict[str, Any]:
        written = next((key for key in cls.counted if key in config.values), cls.counted[-1])
        experts, top_k = (cls.count(config, key, 0) for key in (written, "num_experts_per_tok"))
        if not 0 < top_k <= experts:
            raise UserError(f"{config.origin}: num_experts_per_tok {top_k} must be from 1 to the {experts} experts")
        found = super().widths(config)
        return {**found, "experts": experts, "top_k": top_k, "expert_width": found["intermediate"]}

    def linear_names(self) -> list[str]:
        dense = any(not self.is_mixture(i) for i in range(self.layers))
        return [name for name in super().linear_names() if dense or not name.startswith("mlp.")]

    def stacked_names(self) -> list[str]:
        return [f"{self.router}.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

    def is_mixture(self, layer: int) -> bool:
        """Whether a block's MLP is a mixture."""
        return True

    def layer_kind(self, layer: int) -> Hashable:
        return super().layer_kind(layer), self.is_mixture(layer)

    def active_share(self, name: str) -> tuple[int, int]:
        return (self.top_k, self.experts) if ".experts." in name else (1, 1)

    def mlp(self, layer: Scope, x: Tensor) -> Tensor:
        return self.mixture(layer, x) if self.is_mixture(layer.index) else super().mlp(layer, x)

    def mixture(self, layer: Scope, x: Tensor) -> Tensor:
        """The experts of a block, weighted by its router: (batch, seq, hidden) → the same."""
        shape = x.shape
        x = view(x, (product(shape[:-1]), self.hidden))
        weights, chosen = self.route(layer, x)
        return view(self.run_experts(layer, x, weights, chosen), shape)

    def route(self, layer: Scope, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and int64 numbers, both (tokens, top_k), of the experts that every token (tokens, hidden) goes to."""
        tape().part.host.modules += 1
        logits = linear(x, layer.stacked(f"{self.router}.weight", (self.experts, self.hidden)))
        probabilities = softmax(logits, "fp32")
        top, chosen = top_values(probabilities, self.top_k)
        return self.scaled(top, logits.dtype), chosen

    def scaled(self, top: Tensor, dtype: str) -> Tensor:
        """The weights of the experts from the router's probabilities (tokens, top_k)."""
        return divide_in_place(top, sum_dim(top, 1, keep=True))

    def run_experts(self, layer: Scope, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Every token (tokens, hidden) through its experts, as the setup runs them: (tokens, hidden)."""
        tape().part.host.modules += 1
        run = self.loop_experts if layer.build.setup.loops_experts else self.group_experts
        return run(layer, x, weights, chosen)

    def group_experts(self, layer: Scope, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """`run_experts` by grouped products."""
        rows: Any = x.shape[0] * self.top_k
        weights, chosen = view(weights, (rows,)), view(chosen, (rows,))
        chosen, order = sort_values(chosen)
        selected = rows_of(x, emit("floor_divide", (order,), (rows,), "i64"))
        weights = rows_of(weights, order)
        ends = ends_of_groups(chosen, self.experts)
        biases: list[Tensor] = []
        out = self.expert_linear(layer, "gate_up_proj", selected, 2 * self.expert_width, chosen, ends, biases)
        out = self.gated(out)
        out = self.expert_linear(layer, "down_proj", out, self.hidden, chosen, ends, biases)
        weighted = mul(out, unsqueeze(weights, -1))
        weighted = rows_of(weighted, inverse_order(order))
        out = cast(sum_dim(view(weighted, (x.shape[0], self.top_k, self.hidden)), 1), x.dtype)
        layer.cached.clear()
        return out

    def expert_linear(
        self, layer: Scope, name: str, x: Tensor, n_out: int, chosen: Tensor, ends: Tensor, biases: list[Tensor]
    ) -> Tensor:
        """Rows (rows, n_in) through the linear layers of the experts that they were sorted by.

        `biases` keeps what was added to each row until the next layer's is there, as transformers' variable does.
        """
        weight = layer.stacked(f"mlp.experts.{name}", (self.experts, n_out, x.shape[1]))
        return grouped_mm(x, transpose(weight, -2, -1), ends, self.routing(layer))

    def loop_experts(self, layer: Scope, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """`run_experts` one after another, those that are hit."""
        out, width = zeros_like(x), x.shape[1]
        flags = permute(one_hot(chosen, self.experts + self.masked), (2, 1, 0))
        loads = emit("sum.dim_IntList", (flags,), (flags.shape[0],), "i64", attrs=Attrs(dims=(1, 2)))
        turns = self.routing(layer).turns(x.shape[0] * self.top_k)
        hit = emit("gt.Scalar", (loads,), loads.shape, "bool")
        hits = unbound(emit("nonzero", (hit,), (sum(times for _, times in turns), 1), "i64"))
        stacks: dict[str, Tensor] = {}
        for rows, times in _recorded(turns):
            tape().part.take_turns(times)
            number = select(hits[0], 0)
            read_scalar(emit("eq.Scalar", (number,), (), "bool"))
            read_scalar(number)
            place, token = unbound(emit("nonzero", (select(flags, 0),), (rows, 2), "i64"), 1)
            selected = rows_of(x, token)
            wide = self.expert_product(layer, "gate_up_proj", selected, 2 * self.expert_width, number, stacks)
            state = self.gated(wide)
            state = self.expert_product(layer, "down_proj", state, width, number, stacks)
            state = mul(state, picked(unsqueeze(weights, -1), token, place))
            out = add_rows(out, token, cast(state, x.dtype), times)
        tape().part.take_turns(1)
        layer.cached.clear()
        return out

    def expert_product(
        self, layer: Scope, name: str, x: Tensor, n_out: int, number: Tensor, stacks: dict[str, Tensor]
    ) -> Tensor:
        """Rows (rows, n_in) through the linear layer of one expert, whose number the host reads.

        `stacks` has the weights of all experts that were asked for before.
        """
        if name not in stacks:
            stacks[name] = layer.stacked(f"mlp.experts.{name}", (self.experts, n_out, x.shape[1]))
        read_scalar(number)
        return linear(x, select(stacks[name], 0))

    def routing(self, layer: Scope) -> Routing:
        """The load of the experts that the setup assumes."""
        return Routing(self.experts, self.top_k, exponent_of(layer.build.setup.routing))

    def gated(self, x: Tensor) -> Tensor:
        """Gate and up projection side by side (rows, 2·width) → (rows, width)."""
        gate, up = split(x, (self.expert_width, self.expert_width), -1)
        return mul(self.activation(gate), up)


def _recorded(turns: list[tuple[Any, int]]) -> Iterator[tuple[Any, int]]:
    """Turns of a loop as they are recorded: of more than three alike the first, those between as one, and the last.

    The first still finds the local variables of other turns, and in backward nothing is added to the last one's
    gradients.
    """
    for rows, times in turns:
        yield from [(rows, n) for n in ((1, times - 2, 1) if times > 3 else (1,) * times)]
