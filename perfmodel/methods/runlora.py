"""RunLoRA: LoRA whose products are computed in the order that needs the fewest FLOPs.

One operator computes b + xW + (xU)V in four forward and eight backward orders; the authors pick one of each per layer
shape (github.com/KamikaziZen/RunLoRA, runlora/runlora.py). Adapters have the base's dtype.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..tape.core import Tensor
from ..tape.custom import BACKWARDS, FORWARDS, run_lora
from ..tape.dims import Dim, decide
from ..tape.pointwise import mul
from ..tape.shape import t
from .base import Linear, method, option, positive
from .targeted import Targeted, base_bias, base_weight

if TYPE_CHECKING:
    from ..step import Step


Formula = Callable[[Dim, Dim, Dim, Dim], Dim]  # tokens T, inputs n, outputs m, rank r → FLOPs

FORWARD_FLOPS: dict[int, Formula] = {
    1: lambda T, n, m, r: 2 * T * n * m + 2 * T * r * (n + m),
    2: lambda T, n, m, r: 2 * T * n * m + 2 * n * m * r,
    3: lambda T, n, m, r: 2 * T * n * m + 2 * T * r * (n + m),
    4: lambda T, n, m, r: 2 * T * n * m + 2 * n * m * r,
}
BACKWARD_FLOPS: dict[int, Formula] = {  # gradients of x, U and V
    1: lambda T, n, m, r: 2 * T * n * m + 6 * T * n * r + 4 * T * m * r,
    2: lambda T, n, m, r: 4 * T * n * m + 4 * T * n * r + 2 * T * m * r + 2 * n * m * r,
    3: lambda T, n, m, r: 4 * T * n * m + 2 * T * r * (n + m) + 4 * n * m * r,
    4: lambda T, n, m, r: 4 * T * n * m + 6 * n * m * r,
    5: lambda T, n, m, r: 2 * T * n * m + 4 * T * r * (n + m) + 2 * n * m * r,
    6: lambda T, n, m, r: 4 * T * n * m + 4 * T * r * (n + m) + 2 * n * m * r,
    7: lambda T, n, m, r: 4 * T * n * m + 2 * T * r * (n + m) + 4 * n * m * r,
    8: lambda T, n, m, r: 4 * T * n * m + 2 * T * r * (n + m) + 4 * n * m * r,
}


@dataclass(frozen=True)
class Choice:
    """The orders chosen for a layer, and the FLOPs of all: the chosen ones have the fewest unless they were fixed."""

    layer: str
    copies: int
    forward: int
    backward: int
    forward_flops: dict[int, Dim]
    backward_flops: dict[int, Dim]


@method("runlora", title="RunLoRA", source="https://arxiv.org/abs/2312.03415")
@dataclass(frozen=True)
class RunLora(Targeted):
    """LoRA with its products in the cheapest of four forward and eight backward orders, chosen per layer shape."""

    adapter_dtype: str | None = option(None, "must be the base's dtype: the operator mixes both in one product")
    r: Any = option(8, "rank")
    alpha: float = option(8.0, "scale numerator; changes no cost")
    choose: str = option("flops", "criterion of the choice: flops")
    forward: int | None = option(None, "a forward order from 1 to 4 instead of the choice")
    backward: int | None = option(None, "a backward order from 1 to 8 instead of the choice")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "r", positive("method runlora: r", self.r))
        if self.choose != "flops":
            raise UserError(f"method runlora: choose {self.choose!r} is unknown: use flops")
        for name, value, known in (("forward", self.forward, FORWARDS), ("backward", self.backward, BACKWARDS)):
            if value is not None and value not in known:
                raise UserError(f"method runlora: {name} must be from 1 to {known[-1]}, got {value}")

    def dtype_beside(self, dtype: str) -> str:
        if self.adapter_dtype not in (None, dtype):
            raise UserError(f"method runlora: adapter_dtype must be the base's, {dtype}; got {self.adapter_dtype}")
        return dtype

    def orders(self, tokens: Dim, n: Dim, m: Dim) -> tuple[int, int]:
        """Forward and backward order for x (tokens, n) and W (n, m)."""
        return (
            self.forward or _fewest(FORWARD_FLOPS, tokens, n, m, self.r),
            self.backward or _fewest(BACKWARD_FLOPS, tokens, n, m, self.r),
        )

    def adapted(self, layer: Linear, x: Tensor, dtype: str) -> Tensor:
        if layer.scope.build.setup.amp:
            raise UserError("method runlora: its operator does not run under autocast; leave out --amp")
        self.check_rank(layer, self.r)
        weight, bias = base_weight(layer), base_bias(layer)
        u = layer.adapter("lora_U", (layer.n_in, self.r), dtype)
        v = layer.adapter("lora_V", (self.r, layer.n_out), dtype)
        w = weight if layer.conv1d else t(weight)
        tokens = x.numel // x.shape[-1]
        return run_lora(x, w, mul(u, self.alpha), v, bias, *self.orders(tokens, layer.n_in, layer.n_out))


def _fewest(flops: dict[int, Formula], tokens: Dim, n: Dim, m: Dim, r: Dim) -> int:
    """The first order with the fewest FLOPs, as the authors take it; gradients of x, U and V are assumed."""
    best = 1
    for order, formula in flops.items():
        if decide(formula(tokens, n, m, r) < flops[best](tokens, n, m, r)):
            best = order
    return best


def choices(step: "Step") -> list[Choice]:
    """What a recorded step of RunLoRA chose for every adapted layer, and why."""
    chosen = step.method
    if not isinstance(chosen, RunLora):
        raise UserError(f"method {chosen.name} chooses no orders; use runlora")
    tokens, found = step.setup.batch * step.setup.seq, []
    adapters = {p.name: p for p in step.parameters if p.kind == "adapter"}
    for name, u in adapters.items():
        if name.endswith(".lora_U"):
            layer = name.removesuffix(".lora_U")
            sizes = (tokens, u.shape[0], adapters[layer + ".lora_V"].shape[1], chosen.r)
            forward, backward = chosen.orders(*sizes[:3])
            flops = ({i: f(*sizes) for i, f in table.items()} for table in (FORWARD_FLOPS, BACKWARD_FLOPS))
            found.append(Choice(layer, u.count, forward, backward, *flops))
    return found
